"""Two processes do the step of one process with twice the batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from bases import tied
from launch import launch
from runs import run
from safetensors.torch import load_file
from samples import SAMPLES

from vismem_core.config import Config
from vismem_core.errors import TrainingError
from vismem_core.training.processes import Processes
from vismem_core.training.run import train

SETTINGS = {
    "sft": ["train.objective=sft", "train.formation={steps: 3, lr: 3e-4}", "train.invocation={steps: 0, lr: 1e-2}"],
    "grpo": [
        "train.objective=grpo",
        "train.grpo={explore: 0, group: 4, resample: 2, max_new_tokens: 8, rewards: ['call:samples:fickle']}",
        "train.grpo.formation={steps: 2, lr: 2e-4}",  # ten times what may differ: Adam makes much of the smallest sums
        "train.grpo.invocation={steps: 2, lr: 1e-2}",
    ],
    "dealt": [
        "train.objective=grpo",
        "train.stage=invocation",
        "train.grpo={explore: 0.75, group: 4, max_new_tokens: 8, rewards: ['call:samples:unlike']}",
        "train.grpo.invocation={steps: 3, lr: 1e-2}",
    ],
}
EVALUATED = [
    "train.metric=anls",
    "train.evaluation={every: 2, samples: 1, shown: 2, keep: best, patience: 1}",
    "train.callbacks=['call:samples:Once']",
]
"""Evaluations, and one more that a callback in one of the processes asks for; where nothing improves, a stage ends."""
WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_processes import SETTINGS, one
for objective in SETTINGS:
    one(Path(sys.argv[1]) / objective, objective, 2)
"""
"""What each of two processes does: all objectives one after the other, since starting takes longest."""


def one(output: Path, objective: str, batch: int) -> None:
    """This process's part of a run."""
    sizes = [
        f"train.{'' if objective == 'sft' else 'grpo.'}{stage}.batch={batch}" for stage in ("formation", "invocation")
    ]
    plain = ["memory.short.dropout=0", "memory.long.dropout=0"]  # two processes draw other dropout than one
    run(output, [*SETTINGS[objective], *sizes, *plain, *EVALUATED])


@pytest.mark.parametrize(("engine", "name"), [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP")])
def test_engines_that_do_not_fit_are_refused(
    engine: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(TrainingError, match=rf"{name} is not supported.*--device tensor.*ddp\.yaml"):
        train(tied().attach(), SAMPLES, SAMPLES, Config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_see_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"one of 2 processes.*ACCELERATE_USE_CPU=true"):
        Processes()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_work_is_dealt_evenly(count: int) -> None:
    """Parts of a batch sorted by length: totals differ by less than two lengths do, and each has a longest one."""
    everyone = [object.__new__(Processes) for _ in range(count)]
    for index, own in enumerate(everyone):
        vars(own)["_state"] = SimpleNamespace(process_index=index, num_processes=count)
    for seed in range(20):
        rng = Random(seed)
        lengths = sorted((round(rng.lognormvariate(4, 1)) for _ in range(8 * count)), reverse=True)
        parts = [own.part(lengths) for own in everyone]
        assert sorted(length for part in parts for length in part) == sorted(lengths)
        totals = [sum(part) for part in parts]
        assert max(totals) - min(totals) <= lengths[0] - lengths[-1]
        assert sorted((max(part) for part in parts), reverse=True) == lengths[:count]


@pytest.mark.long
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    launch([sys.executable, "-c", WORKER, str(tmp_path / "two")], 2)
    for objective in SETTINGS:
        one(tmp_path / "one" / objective, objective, 4)
        same(objective, *(tmp_path / name / objective for name in ("two", "one")))


def same(objective: str, *runs: Path) -> None:
    two, alone = (load_file(place / "memory.safetensors") for place in runs)
    for name, expected in alone.items():
        torch.testing.assert_close(
            two[name], expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{objective}, {name}: {text}"
        )
    rows = [[json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()] for place in runs]
    assert len(rows[0]) == len(rows[1]) > 0
    steps = [row for row in rows[0] if "loss" in row]
    assert objective != "grpo" or any(row["resampled"] for row in steps)
    assert objective != "dealt" or all(row["choices"] for row in steps)
    assert len(steps) < len(rows[0])
    answers = [(place / "samples.jsonl").read_text() for place in runs]
    assert answers[0] == answers[1]
    bests = [load_file(place / "best" / "memory.safetensors") for place in runs]
    for name, expected in bests[1].items():
        torch.testing.assert_close(bests[0][name], expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        for figure, value in theirs.items():
            expected = value if isinstance(value, str | bool) else pytest.approx(value, abs=1e-4, rel=1e-3)
            assert ours[figure] == expected, (objective, figure)
