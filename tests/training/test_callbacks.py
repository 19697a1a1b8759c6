"""Callbacks: told in the Trainer's order, obeyed, named when they fail, and resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from runs import run
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from vismem_core.errors import ConfigError, TrainingError
from vismem_core.training import loop as loops
from vismem_core.training.callbacks import OVER, parse

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
EVERY = "train.evaluation={every: 2, samples: 1, shown: 0}"


class Recorder(TrainerCallback, ExportableState):
    """Notes what it is told, and does at an event what it is asked to do there."""

    def __init__(self, **does: Any) -> None:
        self.does, self.told, self.heard, self.seen = does, list[str](), 0, list[Any]()

    def __getattribute__(self, name: str) -> Any:
        if name not in EVENTS:
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **more: Any) -> None:
            self.told.append(name)
            self.heard += name == "on_step_end"
            self.seen.append((name, more.get("stage"), state.global_step, args, more))
            if name in self.does:
                self.does[name](state, control)

        return note

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"heard": self.heard}}


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x - labels).pow(2).mean()}


def trainers(folder: Path) -> list[str]:
    """What the Trainer tells a callback of four steps, with an evaluation and a save after every second one."""
    told = Recorder()
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 4
    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=1, logging_steps=1, eval_strategy="steps",
        eval_steps=2, save_steps=2, report_to="none", disable_tqdm=True, use_cpu=True,
        accelerator_config={"use_configured_state": True},
    )  # fmt: skip
    Trainer(Line(), args, train_dataset=rows, eval_dataset=rows, callbacks=[told]).train()
    return told.told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    recorder = Recorder()
    run(tmp_path_factory.mktemp("told") / "run", [EVERY, "train.invocation.steps=4"], callbacks=[recorder])
    return recorder


def test_events_come_in_the_trainers_order(told: Recorder, tmp_path: Path) -> None:
    left_out = {"on_epoch_begin", "on_epoch_end", "on_prediction_step"}
    expected = [name for name in trainers(tmp_path) if name not in left_out]
    assert expected[-2:] == ["on_log", "on_train_end"]  # what the Trainer sums up is not logged here
    expected = [*expected[:-2], expected[-1]]
    assert told.told == [*expected, *expected[1:]]  # the second stage is a training too, of the same callbacks


def test_callbacks_are_told_where_training_is(told: Recorder) -> None:
    ends = [(stage, step) for name, stage, step, *_ in told.seen if name == "on_step_end"]
    assert ends == [(stage, step) for stage in ("formation", "invocation") for step in range(1, 5)]
    _, _, _, args, more = next(own for own in told.seen if own[0] == "on_evaluate")
    assert more["metrics"].keys() == {"eval_exact", "eval_exact_short", "eval_exact_long"}
    assert (args.max_steps, args.learning_rate, args.eval_steps, args.save_steps) == (4, 1e-3, 2, 2)
    logs = next(own for own in told.seen if own[0] == "on_log")[4]["logs"]
    assert logs["loss"] > 0 and logs["epoch"] == 3 / 8
    assert more["memory"].model is more["model"] and more["processing_class"] and more["optimizer"]


def test_what_they_ask_for_is_done(tmp_path: Path) -> None:
    def ask(state: Any, control: Any) -> None:
        control.should_evaluate = state.global_step == 1
        control.should_save = state.global_step == 2
        control.should_training_stop = state.global_step == 3

    recorder = Recorder(on_step_end=ask)
    report = run(tmp_path / "run", ["train.save_every=50"], callbacks=[recorder])
    assert report["steps"] == {"formation": 3, "invocation": 3}
    places = [(name, stage, step) for name, stage, step, *_ in recorder.seen if name in ("on_evaluate", "on_save")]
    assert places[:3] == [("on_evaluate", "formation", 1), ("on_save", "formation", 2), ("on_save", "formation", 3)]
    assert (tmp_path / "run" / "best").is_dir()


def test_one_that_raises_is_named_after_the_step_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(state: Any, control: Any) -> None:
        if state.global_step == 3:
            raise ValueError("no\nbeacon")

    first = Recorder(on_step_end=fail)
    with pytest.raises(TrainingError, match=r"^callback Recorder failed in on_step_end: ValueError: no beacon$"):
        run(tmp_path / "run", [EVERY], callbacks=[first])
    assert "saved after formation, step 3; --resume goes on" in " ".join(capsys.readouterr().err.split())
    again = Recorder()
    run(tmp_path / "run", [EVERY], callbacks=[again], resume=True)
    assert again.heard == 2 + 1 + 3  # what it had heard of at the last step that it was told of, and all since
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows if "loss" in row] == [
        *(("formation", step) for step in range(1, 5)),
        *(("invocation", step) for step in range(1, 4)),
    ]


@pytest.mark.long
def test_a_stage_that_was_to_end_ends_when_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(state: Any, control: Any) -> None:
        control.should_training_stop = state.global_step == 2

    with monkeypatch.context() as patch:
        patch.setattr(loops.Loop, "_finish", lambda *_: (_ for _ in ()).throw(RuntimeError("the power is out")))
        with pytest.raises(RuntimeError, match="the power"):
            run(tmp_path / "run", callbacks=[Recorder(on_step_end=stop)])
    assert run(tmp_path / "run", resume=True)["steps"] == {"formation": 2, "invocation": 3}


class Patient(TrainerCallback):
    def __init__(self, patience: str = "7") -> None:
        self.patience = int(patience)


def test_specs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_callbacks")
    vars(module).update(Patient=Patient, nothing=lambda: None)
    monkeypatch.setitem(sys.modules, "my_callbacks", module)
    (own,) = parse(["call:my_callbacks:Patient"])
    assert isinstance(own, Patient) and own.patience == 7
    for spec, why in {
        "call:my_callbacks:nothing": "NoneType is no instance of transformers.TrainerCallback",
        "call:my_callbacks:Missing": "does not load: AttributeError",
        "call:my_own:Watch": "set PYTHONPATH",
        "call:Watch": "takes package.module:Class",
        "call": "cannot be made: TypeError",
    }.items():
        with pytest.raises(ConfigError, match=why):
            parse([spec])


def test_what_is_no_callback_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Recorder is no instance"):
        run(tmp_path / "run", callbacks=[Recorder])
    with pytest.raises(ConfigError, match="does not load"):
        run(tmp_path / "run", ["train.callbacks=['call:my_own:Watch']"])
    assert not (tmp_path / "run").exists()


def test_flags_are_put_down_where_transformers_puts_them_down() -> None:
    from transformers import TrainerControl
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

    flags = ("should_log", "should_evaluate", "should_save", "should_training_stop")
    handler = CallbackHandler([DefaultFlowCallback()], None, None, None, None)
    for event in set(EVENTS) - {"on_train_begin", "on_step_end", "on_epoch_begin", "on_epoch_end"}:
        control = TrainerControl(**dict.fromkeys(flags, True))
        more = {"logs": {}} if event == "on_log" else {"metrics": {}} if event in ("on_evaluate", "on_predict") else {}
        getattr(handler, event)(None, None, control, **more)
        assert {flag for flag in flags if not getattr(control, flag)} == set(OVER.get(event, ())), event
