"""A training run: its stages, its files, its report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from vismem_core.answers.checking import checked, prepare
from vismem_core.answers.evaluation import evaluate
from vismem_core.answers.inference import answers
from vismem_core.answers.reward import parse
from vismem_core.config import KINDS, Config, TrainConfig, to_dict
from vismem_core.errors import ConfigError, TrainingError
from vismem_core.files import card, checkpoint
from vismem_core.files.lock import alone
from vismem_core.files.samples import Dataset, OnBad, Sample, Skipped
from vismem_core.memory.memory import Memory

from . import state
from .batches import Draws
from .display import Display
from .folder import BASIS, METRICS, SETTINGS, Basis, basis, read_json, refuse
from .formation import Formation
from .formation_grpo import FormationGrpo
from .invocation import InvocationStage
from .invocation_grpo import InvocationGrpo
from .loop import Loop
from .metrics import Metrics, finite_json
from .processes import Processes
from .stage import Stage
from .trackers import Trackers

REHEARSED = 2
"""Held-out samples on which the closing report is tried before the first step, and tokens of their answers."""
REHEARSED_TOKENS = 4

Check = Literal["all", "lazy"]


def train(
    memory: Memory,
    train_data: Sequence[Sample],
    heldout: Sequence[Sample],
    config: Config,
    output: Path,
    *,
    resume: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
    on_bad: OnBad = "fail",
    check: Check = "all",
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, save, measure.

    Args:
        output: gets ``memory.safetensors`` and ``vismem.json`` (the memory), ``metrics.jsonl`` (a row per step),
            ``config.json`` (settings), ``run.json`` (base and data) and ``report.json``.
        resume: go on with the run in ``output``, on its base and its data; a finished run gives its report.
        groups: see :func:`vismem_core.answers.evaluation.evaluate`.
        on_bad: what to do about a sample that this model cannot use: end with an error, or leave it out and list it in
            the report's ``skipped``.
        check: find such samples of files before the first step (``all``), or when they are met (``lazy``).

    Returns:
        The report.

    Raises:
        DataError: a bad sample, by file and line.
        TrainingError: ``output`` holds another run, the loss is not finite, or a signal ended it. Whatever ends a run,
            its last whole step is saved first.
    """
    began = time.monotonic()
    console = console or Console(stderr=True)
    run = Run(memory, config, output, console, on_bad)
    if run.finished(resume):
        run.say(f"{output}: this run is finished; nothing was left to do")
        return read_json(output / card.REPORT)
    run.say(f"training in {run.processes.told(memory.backbone.device)}")
    usable, asked = run.usable(train_data, check), run.usable(heldout, check)
    with ExitStack() as stack:
        run.open(usable, asked, resume, {"on_bad": on_bad, "check": check}, stack)
        stack.enter_context(run.display)
        stack.enter_context(run.trackers)
        stages = run.stages()
        if stages and run.processes.leads:
            run.rehearse(asked, groups)
        run.processes.wait()
        for name in stages:
            run.train(name, usable)
        if run.processes.leads:
            run.refuse_nonsense(asked)
            memory.save(output, training=to_dict(config.train))
            report = run.measure(asked, groups)
        run.processes.wait()
        if not run.processes.first:
            return {}
        report |= run.told(usable, asked)
        report["seconds"] = round(time.monotonic() - began, 1)
        checkpoint.write_card(output, report)
        checkpoint.atomically(output / card.REPORT, lambda path: path.write_text(finite_json(report, indent=2) + "\n"))
        (output / state.FILE).unlink(missing_ok=True)
    return report


class Run:
    """One run in one directory."""

    def __init__(self, memory: Memory, config: Config, output: Path, console: Console, on_bad: OnBad) -> None:
        self.memory, self.config, self.output, self.console, self.on_bad = memory, config, output, console, on_bad
        parse(config.train.grpo.rewards)  # a misspelt one is told before anything is written
        if memory.policy and config.train.objective == "sft":
            raise ConfigError("memory.policy.trains=lora: only GRPO trains it; use --objective grpo or sft+grpo")
        memory.backbone.end_of_turn  # noqa: B018 - a base without any is told now
        self.processes = Processes(memory.model)
        self.parts = self.processes.count
        self.done: state.State | None = None
        self.left_out: list[Skipped] = []
        self.display = Display(console, shown=self.processes.first)
        self.trackers = Trackers(config.train.trackers, output, to_dict(config))

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
        refuse(self.output, resume)
        path = self.output / SETTINGS
        if not path.exists():
            return False
        before, now = _flat(read_json(path)), _flat(json.loads(json.dumps(to_dict(self.config))))
        for key in before | now:
            if (was := before.get(key)) != (wanted := now.get(key)):
                told = f"{key} is {was!r} there and {wanted!r} here"
                raise TrainingError(f"{path}: {told}; give the same settings to --resume, or choose another --output")
        return (self.output / card.REPORT).exists()

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
            if fresh:
                now.write(self.output)
                text = json.dumps(to_dict(self.config), indent=2) + "\n"
                checkpoint.atomically(self.output / SETTINGS, lambda place: place.write_text(text))
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
            self.say(f"{self.output}: goes on after {self.done.stage}, step {self.done.step}")
            self.left_out = list(self.done.left_out)

    def stages(self) -> list[str]:
        """The stages that are still to be run."""
        train = self.config.train
        wanted = [name for name in OBJECTIVES[train.objective] if train.stage in (STAGES[name][0], "all")]
        return wanted[wanted.index(self.done.stage) :] if self.done else wanted

    def train(self, name: str, data: Sequence[Sample]) -> None:
        """Run one stage, from where the run stands, to its end."""
        stage = STAGES[name][1](self.memory, self.config.train, self.processes)
        draws = Draws(
            self.memory.backbone,
            data,
            stage.settings.batch * self.parts,
            self.config.train.seed,
            self.processes,
            self.left_out if self.on_bad == "skip" else None,
        )
        stage.draw = draws
        loop = Loop(
            name, stage, draws, self.memory, self.config.train, self.processes, self.output, self.left_out, self.say
        )
        if self.done and self.done.stage == name:
            loop.restore(self.done)
        self.display.begin(name, stage.settings.steps, loop.first)
        metrics = Metrics(self.output / METRICS, list(STAGES), name, loop.first, self.processes.first)
        loop.run(metrics, self._note)

    def _note(self, row: dict[str, Any]) -> None:
        self.trackers.log(row)
        self.display.step(row)

    def _few(self, data: Sequence[Sample]) -> list[Sample]:
        few: list[Sample] = []
        for at in range(len(data)):
            few += prepare(self.memory.backbone, [data[at]], self.left_out if self.on_bad == "skip" else None)[0]
            if len(few) == REHEARSED:
                break
        return few

    def rehearse(self, heldout: Sequence[Sample], groups: Mapping[str, Sequence[str]] | None) -> None:
        """Try the closing report on a few samples: what it cannot do is known before the first step."""
        few = self._few(heldout)
        self._evaluate(few, groups, min(REHEARSED_TOKENS, self.config.train.max_new_tokens))

    def measure(self, heldout: Sequence[Sample], groups: Mapping[str, Sequence[str]] | None) -> dict[str, Any]:
        """Held-out accuracy under all conditions."""
        return self._evaluate(heldout, groups, self.config.train.max_new_tokens, self.display.measuring)

    def _evaluate(
        self,
        data: Sequence[Sample],
        groups: Mapping[str, Sequence[str]] | None,
        max_new_tokens: int,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[str, Any]:
        settings = self.config.train
        return evaluate(
            self.memory,
            data,
            groups=groups,
            per_type=settings.eval_samples,
            batch=settings.eval_batch,
            max_new_tokens=max_new_tokens,
            left_out=self.left_out if self.on_bad == "skip" else None,
            progress=progress,
        )

    def refuse_nonsense(self, heldout: Sequence[Sample]) -> None:
        """See that what was trained is numbers, and makes numbers.

        Raises:
            TrainingError: a tensor or a latent vector holds NaN or infinity.
        """
        odd = state.not_finite(self.memory)
        for kind in KINDS if odd is None else ():
            few = self._few(heldout)
            for _ in answers(self.memory, few, max_new_tokens=REHEARSED_TOKENS, trigger=f"schedule:0={kind}"):
                if not all(own.latents.isfinite().all() for own in self.memory.trace.invocations):
                    odd = f"a latent vector of {kind} memory"
        if odd is not None:
            raise TrainingError(
                f"{self.output}: {odd} holds NaN or infinity, so this memory is not saved as finished; lower the "
                "learning rate (--set train...lr) and begin anew"
            )

    def told(self, data: Sequence[Sample], heldout: Sequence[Sample]) -> dict[str, Any]:
        """What a report says besides accuracies: rows that were left out, steps that were skipped."""
        rows = (self.output / METRICS).read_text(encoding="utf-8").splitlines()
        lost = [*getattr(data, "skipped", ()), *getattr(heldout, "skipped", ()), *self.left_out]
        return {
            "skipped": [asdict(own) for own in dict.fromkeys(lost)],
            "skipped_steps": sum(bool(json.loads(row)["skipped"]) for row in rows),
        }


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
