"""A training run: its stages, its files, its report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback

from vismem_core.answers import metric, reward
from vismem_core.answers.checking import checked
from vismem_core.config import Config, TrainConfig, to_dict
from vismem_core.errors import ConfigError, TrainingError
from vismem_core.files import card, checkpoint
from vismem_core.files.lock import alone
from vismem_core.files.samples import Dataset, OnBad, Sample, Skipped
from vismem_core.memory.memory import Memory

from . import state
from .callbacks import Callbacks, parse
from .callbacks import checked as checked_callback
from .closing import Closing, course, lost
from .display import Display
from .draws import Draws
from .folder import BASIS, BEST, SETTINGS, Basis, basis, read_json, refuse
from .formation import Formation
from .formation_grpo import FormationGrpo
from .heldout import Heldout
from .invocation import InvocationStage
from .invocation_grpo import InvocationGrpo
from .loop import Loop
from .metrics import finite_json
from .peers import Peers
from .processes import Processes
from .record import Record
from .stage import Stage
from .trackers import Trackers

Check = Literal["all", "lazy"]
SHARED = "put --output on a disk that all machines share"
SLOW = 10
"""Seconds that new files may take to be seen by other machines."""


def train(
    memory: Memory,
    train_data: Sequence[Sample],
    heldout: Sequence[Sample],
    config: Config,
    output: str | Path,
    *,
    resume: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
    on_bad: OnBad = "fail",
    check: Check = "all",
    callbacks: Sequence[TrainerCallback] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, save, measure.

    Args:
        output: gets ``memory.safetensors`` and ``vismem.json`` (the memory), ``metrics.jsonl`` (a row per step and per
            evaluation), ``samples.jsonl`` (answers at evaluations), ``best`` (the memory that was best in them),
            ``config.json`` (settings), ``run.json`` (base and data) and ``report.json``.
        resume: go on with the run in ``output``, on its base and its data; a finished run gives its report.
        groups: see :func:`vismem_core.answers.evaluation.evaluate`.
        on_bad: what to do about a sample that this model cannot use: end with an error, or leave it out and list it in
            the report's ``skipped``.
        check: find such samples of files before the first step (``all``), or when they are met (``lazy``).
        callbacks: are told of each step, after those of the settings; see :mod:`vismem_core.training.callbacks`.

    Returns:
        The report.

    Raises:
        DataError: a bad sample, by file and line.
        TrainingError: ``output`` holds another run, the loss is not finite, a callback failed, or a signal ended it.
            Whatever ends a run, its last whole step is saved first.
    """
    began, output = time.monotonic(), Path(output)
    console = console or Console(stderr=True)
    run = Run(memory, config, output, console, on_bad, callbacks)
    with ExitStack() as stack:
        stack.enter_context(Peers(*run.processes.rank, run.save))
        if run.finished(resume):
            run.say(f"{output}: this run is finished; nothing was left to do")
            return read_json(output / card.REPORT)
        run.say(f"training in {run.processes.told(memory.backbone.device)}")
        usable, asked = run.usable(train_data, check), run.usable(heldout, check)
        run.open(usable, asked, resume, {"on_bad": on_bad, "check": check}, stack)
        stack.enter_context(run.display)
        stack.enter_context(run.trackers)
        stages = run.stages()
        closing = Closing(memory, asked, config.train, groups, run.lost)
        questions = Heldout(memory, asked, config.train, run.processes, run.lost)
        if stages and run.processes.leads:
            closing.rehearse()
        run.processes.wait()
        for name in stages:
            run.train(name, usable, questions)
        if run.processes.leads:
            closing.refuse_nonsense(output)
            memory.save(output, training=to_dict(config.train))
        run.processes.wait()
        report = closing.measure(run.display.measuring, run.processes)
        if not run.processes.first:
            return {}
        report |= course(output, questions.metric.name)
        report["data_wait"] = round(run.waited / run.stepped, 4) if run.stepped else 0.0
        report["skipped"] = lost(usable, asked, left_out=run.left_out)
        report["seconds"] = round(time.monotonic() - began, 1)
        checkpoint.write_card(output, report)
        checkpoint.atomically(output / card.REPORT, lambda path: path.write_text(finite_json(report, indent=2) + "\n"))
        (output / state.FILE).unlink(missing_ok=True)
    return report


class Run:
    """One run in one directory."""

    def __init__(
        self,
        memory: Memory,
        config: Config,
        output: Path,
        console: Console,
        on_bad: OnBad,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self.memory, self.config, self.output, self.console, self.on_bad = memory, config, output, console, on_bad
        reward.parse(config.train.grpo.rewards)  # a misspelt one is told before anything is written
        metric.parse(config.train.metric)
        told = [*parse(config.train.callbacks), *map(checked_callback, callbacks)]
        if memory.policy and config.train.objective == "sft":
            raise ConfigError("memory.policy.trains=lora: only GRPO trains it; use --objective grpo or sft+grpo")
        memory.backbone.end_of_turn  # noqa: B018 - a base without any is told now
        self.processes = Processes(memory.model)
        self.parts = self.processes.count
        self.done: state.State | None = None
        self.save: Callable[[], str | None] = lambda: None
        self.left_out: list[Skipped] = []
        self.waited, self.stepped = 0.0, 0.0
        self.display = Display(console, shown=self.processes.first)
        self.trackers = Trackers(config.train.trackers, output, to_dict(config))
        self.callbacks = Callbacks(told, config.train, memory, self.processes, output)

    @property
    def lost(self) -> list[Skipped] | None:
        """What gets bad samples, where they may be left out."""
        return self.left_out if self.on_bad == "skip" else None

    def say(self, message: str) -> None:
        """One line for people, from the first process."""
        if self.processes.first:
            self.console.print(Text(message), soft_wrap=True)

    def warn(self, message: str) -> None:
        """One line of warning."""
        self.say(f"warning: {message}")

    def finished(self, resume: bool) -> bool:
        """Whether the directory holds this run, and to its end.

        Raises:
            TrainingError: it holds another one, or this one and ``resume`` is not set.
        """
        path, now = self.output / SETTINGS, _flat(json.loads(json.dumps(to_dict(self.config))))
        self.processes.same(now | {"--resume": resume}, "give all processes the same settings")
        holds = {"a run in --output": path.exists(), "a finished run there": (self.output / card.REPORT).exists()}
        self.processes.same(holds, SHARED)
        refuse(self.output, resume)
        if not path.exists():
            return False
        before = _flat(read_json(path))
        for key in before | now:
            if (was := before.get(key)) != (wanted := now.get(key)):
                told = f"{key} is {was!r} there and {wanted!r} here"
                raise TrainingError(f"{path}: {told}; give the same settings to --resume, or choose another --output")
        return holds["a finished run there"]

    def usable(self, data: Sequence[Sample], check: Check) -> Sequence[Sample]:
        """The samples that this model can use; those of a file are looked at now, unless ``check`` is lazy."""
        if check == "lazy" or not isinstance(data, Dataset) or not data.told:
            return data
        if not self.processes.first:
            self.processes.wait()  # what the first one finds is remembered
        with self.display.checking(len(data)) as progress:
            told = checked(
                self.memory.backbone,
                data,
                self.on_bad,
                progress=progress,
                warn=lambda text: self.say(f"warning: {text}"),
            )
        if self.processes.first:
            self.processes.wait()
        if lost := told.skipped[len(data.skipped) :]:
            self.warn(f"bad rows are left out: {len(lost)}")
            for own in lost:
                self.say(f"  {own}")
        return told

    def open(
        self,
        data: Sequence[Sample],
        heldout: Sequence[Sample],
        resume: bool,
        rows: Mapping[str, Any],
        stack: ExitStack,
    ) -> None:
        """Make or enter the directory, which nobody else enters until ``stack`` is closed."""
        now = Basis.of(self.memory, data, heldout, self.processes.count, rows)
        fresh = not (self.output / SETTINGS).exists()
        self.processes.wait()  # until all have looked
        if self.processes.first:
            if fresh and resume:
                self.say(f"{self.output}: no run is there yet; this one begins")
            self.output.mkdir(parents=True, exist_ok=True)
            stack.enter_context(alone(self.output / "run"))
            refuse(self.output, resume)  # another may have come first
            checkpoint.sweep(self.output)
            checkpoint.sweep(self.output / BEST)
            if fresh:
                now.write(self.output)
                text = json.dumps(to_dict(self.config), indent=2) + "\n"
                checkpoint.atomically(self.output / SETTINGS, lambda place: place.write_text(text))
        self.processes.wait()
        self._agree(now)
        if fresh:
            return
        before = basis(self.output)
        if before is not None:
            before.check(now, self.output / BASIS)
            self.parts = before.processes
            if self.parts != self.processes.count:
                self.say(
                    f"this run began on {self.parts} processes and goes on on {self.processes.count}; the steps' "
                    "batches stay as large as they were"
                )
        if (self.output / state.FILE).exists():
            self.done = state.load(self.output, self.memory)
        done = (self.done.stage, self.done.step, self.done.rank, self.done.finished) if self.done else None
        self.processes.same({"a state to go on from": done}, SHARED)
        if self.done:
            self.say(f"{self.output}: goes on after {self.done.stage}, step {self.done.step}")
            self.left_out = list(self.done.left_out)

    def _agree(self, now: Basis) -> None:
        """See that all processes train the same memory on the same rows, and write and read in one place."""
        if self.processes.rank[1] == 1:
            return
        for _ in range(SLOW):  # a disk that machines share may show new files late
            if (self.output / BASIS).exists():
                break
            time.sleep(1)
        data = {f"{name} {key}": own for name in ("data", "heldout") for key, own in getattr(now, name).items()}
        base = {f"base {key}": own for key, own in now.base.items()}
        told = {**data, **base, "processes": now.processes, **{f"rows {key}": own for key, own in now.rows.items()}}
        told |= {f"version of {name}": version(name) for name in ("vismem", "torch", "transformers")}
        self.processes.same(told, "give all processes the same model, data and installation")
        there = (self.output / BASIS).exists() and json.dumps(read_json(self.output / BASIS), sort_keys=True)
        self.processes.same({"the run's files in --output": there}, SHARED)

    def stages(self) -> list[str]:
        """The stages that are still to be run."""
        train = self.config.train
        wanted = [name for name in OBJECTIVES[train.objective] if train.stage in (STAGES[name][0], "all")]
        return wanted[wanted.index(self.done.stage) :] if self.done else wanted

    def train(self, name: str, data: Sequence[Sample], heldout: Heldout) -> None:
        """Run one stage, from where the run stands, to its end."""
        settings, processes = self.config.train, self.processes
        stage = STAGES[name][1](self.memory, settings, processes)
        batch = stage.settings.batch * self.parts
        draws = Draws(self.memory.backbone, data, batch, settings.seed, processes, self.lost, stage.pieces)
        stage.draw = draws
        loop = Loop(
            name,
            stage,
            draws,
            self.memory,
            settings,
            processes,
            self.output,
            self.left_out,
            self.callbacks,
            heldout,
            self.say,
        )
        if self.done and self.done.stage == name:
            loop.restore(self.done)
        self.display.begin(name, stage.settings.steps, loop.done)
        files = (self.output, list(STAGES), name, loop.mark, processes.first)
        record = Record(*files, self.trackers, self.display)
        self.save = partial(loop.save, record)
        try:
            loop.run(record)
        finally:
            draws.close()
        self.waited, self.stepped = self.waited + draws.waited, self.stepped + loop.seconds


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat


def _formation(memory: Memory, config: TrainConfig, processes: Processes) -> Stage:
    return Formation(memory, config.formation, processes, config.image_dropout)


STAGES: dict[str, tuple[str, Callable[[Memory, TrainConfig, Processes], Stage]]] = {
    "formation": ("formation", _formation),
    "invocation": ("invocation", InvocationStage),
    "formation_grpo": ("formation", FormationGrpo),
    "invocation_grpo": ("invocation", InvocationGrpo),
}
"""Name in the log -> which of the two stages it belongs to, and what makes it; in the order they run."""
OBJECTIVES = {
    "sft": ("formation", "invocation"),
    "grpo": ("formation_grpo", "invocation_grpo"),
    "sft+grpo": ("formation", "formation_grpo", "invocation_grpo"),
}
