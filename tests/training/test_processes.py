"""Two processes do the step of one process with twice the batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
SETTINGS = {
    "sft": ["train.objective=sft", "train.formation={steps: 3, lr: 3e-4}", "train.invocation={steps: 0, lr: 1e-2}"],
    "grpo": [
        "train.objective=grpo",
        "train.grpo={group: 4, resample: 2, max_new_tokens: 8, rewards: ['call:samples:fickle']}",
        "train.grpo.formation={steps: 2, lr: 1e-3}",
        "train.grpo.invocation={steps: 2, lr: 1e-2}",
    ],
}
WORKER = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_run import run
run(Path(sys.argv[1]), sys.argv[2:])
"""


def launch(output: Path, processes: int, batch: int, objective: str) -> None:
    """What ``accelerate launch --cpu --num_processes N`` starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = [
        f"train.{'' if objective == 'sft' else 'grpo.'}{stage}.batch={batch}" for stage in ("formation", "invocation")
    ]
    plain = ["memory.short.dropout=0", "memory.long.dropout=0"]  # two processes draw other dropout than one
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    shared = {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        for rank in range(processes)
    ]
    command = [sys.executable, "-c", WORKER, str(output), *SETTINGS[objective], *sizes, *plain]
    running = [
        subprocess.Popen(command, env=os.environ | shared | own, stderr=subprocess.PIPE, text=True) for own in ranks
    ]
    for own in running:
        _, errors = own.communicate(timeout=240)
        assert own.returncode == 0, errors


@pytest.mark.parametrize("objective", SETTINGS)
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path, objective: str) -> None:
    launch(tmp_path / "two", 2, 2, objective)
    launch(tmp_path / "one", 1, 4, objective)
    two, one = (load_file(tmp_path / name / "memory.safetensors") for name in ("two", "one"))
    for name, expected in one.items():
        torch.testing.assert_close(
            two[name], expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    ]
    assert len(rows[0]) == len(rows[1]) > 0
    assert objective == "sft" or any(row["resampled"] for row in rows[0])
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        for figure, value in theirs.items():
            expected = value if isinstance(value, str | bool) else pytest.approx(value, abs=1e-4, rel=1e-3)
            assert ours[figure] == expected, figure
