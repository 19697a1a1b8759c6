"""A training run: its stages, its files, its report."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from .. import checkpoint
from ..config import Config, StageConfig, TrainConfig, to_dict
from ..data import Sample
from ..errors import ConfigError, TrainingError
from ..evaluation import evaluate
from ..memory import Memory
from ..reward import parse
from . import state
from .batches import Batch, Sampler, make_batch
from .display import Display
from .folder import METRICS, REPORT, SETTINGS, refuse
from .formation import Formation
from .formation_grpo import FormationGrpo
from .invocation import InvocationStage
from .invocation_grpo import InvocationGrpo
from .metrics import Metrics
from .processes import Processes
from .stage import Stage
from .trackers import Trackers

TRIES = 10
"""Steps in a row that may be skipped because their gradient is not finite."""


def train(
    memory: Memory,
    train_data: Sequence[Sample],
    heldout: Sequence[Sample],
    config: Config,
    output: Path,
    *,
    resume: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, save, measure.

    Args:
        output: gets ``memory.safetensors`` and ``vismem.json`` (the memory), ``metrics.jsonl`` (a row per step),
            ``config.json`` and ``report.json``.
        resume: go on with the run in ``output``; a finished run gives its report.
        groups: see :func:`vismem_core.evaluation.evaluate`.

    Returns:
        The report.

    Raises:
        TrainingError: ``output`` holds another run, or the loss is not finite.
    """
    began = time.monotonic()
    console = console or Console(stderr=True)
    run = Run(memory, config, output, console)
    if run.open(resume):
        if run.processes.first:
            console.print(Text(f"{output}: this run is finished; nothing was left to do"), soft_wrap=True)
        report: dict[str, Any] = json.loads((output / REPORT).read_text(encoding="utf-8"))
        return report
    with run.display, run.trackers:
        for name in run.stages():
            run.train(name, train_data)
        if run.processes.first:
            checkpoint.save(memory, output, {"training": to_dict(config.train)})
            report = run.measure(heldout, groups)
    run.processes.wait()
    if not run.processes.first:
        return {}
    report["seconds"] = round(time.monotonic() - began, 1)
    checkpoint.atomically(output / REPORT, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    (output / state.FILE).unlink(missing_ok=True)
    return report


class Run:
    """One run in one directory."""

    def __init__(self, memory: Memory, config: Config, output: Path, console: Console) -> None:
        self.memory, self.config, self.output, self.console = memory, config, output, console
        parse(config.train.grpo.rewards)  # a misspelt one is told before anything is written
        if memory.policy and config.train.objective == "sft":
            raise ConfigError("memory.policy.trains=lora: only GRPO trains it; use --objective grpo or sft+grpo")
        self.processes = Processes(memory.model)
        self.done: tuple[str, int, dict[str, Tensor]] | None = None
        self.display = Display(console, shown=self.processes.first)
        self.trackers = Trackers(config.train.trackers, output, to_dict(config))

    def open(self, resume: bool) -> bool:
        """Make or enter the directory; True if its run is finished already."""
        settings = to_dict(self.config)
        path = self.output / SETTINGS
        fresh = not path.exists()
        refuse(self.output, resume)
        self.processes.wait()  # until all have looked
        if fresh:
            if self.processes.first:
                if resume:
                    self.console.print(Text(f"{self.output}: no run is there yet; this one begins"), soft_wrap=True)
                self.output.mkdir(parents=True, exist_ok=True)
                checkpoint.atomically(path, lambda place: place.write_text(json.dumps(settings, indent=2) + "\n"))
            return False
        before, now = _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(json.loads(json.dumps(settings)))
        for key in before | now:
            if (was := before.get(key)) != (wanted := now.get(key)):
                told = f"{key} is {was!r} there and {wanted!r} here"
                raise TrainingError(f"{path}: {told}; give the same settings to --resume, or choose another --output")
        if (self.output / REPORT).exists():
            return True
        if (self.output / state.FILE).exists():
            self.done = state.load(self.output, self.memory)
        return False

    def stages(self) -> list[str]:
        """The stages that are still to be run."""
        train = self.config.train
        wanted = [name for name in OBJECTIVES[train.objective] if train.stage in (STAGES[name][0], "all")]
        return wanted[wanted.index(self.done[0]) :] if self.done else wanted

    def train(self, name: str, data: Sequence[Sample]) -> None:
        """Run one stage to its end."""
        memory, seed = self.memory, self.config.train.seed
        stage = STAGES[name][1](memory, self.config.train, self.processes)
        settings, parameters = stage.settings, stage.parameters()
        groups = [{"params": [own], "name": name, "rate": rate} for name, own, rate in parameters]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98))
        sampler = Sampler(len(data), settings.batch * self.processes.count, seed)
        first = skipped = 0

        def draw(count: int) -> Batch | None:
            drawn = sorted((data[at] for at in sampler.draw(count)), key=lambda own: -len(own.answer or ""))
            own = self.processes.part(drawn)
            return make_batch(memory.backbone, own) if own else None

        stage.draw = draw
        if self.done and self.done[0] == name:
            first = self.done[1]
            state.restore(optimizer, self.done[2])
            stage.restore(state.part(self.done[2], "stage."))
            sampler.position = int(self.done[2]["sampler.position"])
        metrics = Metrics(self.output / METRICS, list(STAGES), name, first, self.processes.first)
        self.display.begin(name, settings.steps, first)
        interrupted = _Interrupt(self.processes.count)
        with _only(memory, parameters), metrics, self.processes.graphs(), interrupted:
            for step in range(first, settings.steps):
                key = f"{seed}/{name}/{step}"
                torch.manual_seed(Random(key).getrandbits(63))
                batch = draw(sampler.batch)
                assert batch is not None
                memory.zero_grad()
                optimizer.zero_grad()
                figures = stage.accumulate(batch, key, step / settings.steps)
                norm = self._update(optimizer, parameters, _rate(step, settings), settings.clip)
                stage.stepped()
                skipped = 0 if math.isfinite(norm) else skipped + 1
                if skipped == TRIES:
                    raise TrainingError(
                        f"{name}: the gradient was not finite in {TRIES} steps in a row, the last one number "
                        f"{step + 1}; lower the learning rate (--set train...lr)"
                    )
                row = {"stage": name, "step": step + 1, **figures, "norm": norm, "skipped": bool(skipped)}
                metrics.add(row)
                self.trackers.log(row)
                self.display.step(row)
                due = interrupted or (step + 1) % self.config.train.save_every == 0
                if due and step + 1 < settings.steps:  # after the last step the stage is not finished yet
                    metrics.flush()
                    self._save(optimizer, stage, name, step + 1, sampler.position)
                    interrupted.tell(f"{name}, step {step + 1}")
            memory.eval()
            if first < settings.steps:
                stage.finish()
        self._save(optimizer, stage, name, settings.steps, sampler.position)
        interrupted.tell(f"the end of {name}")

    def _save(self, optimizer: torch.optim.Optimizer, stage: Stage, name: str, steps: int, position: int) -> None:
        if self.processes.first:
            state.save(self.output, self.memory, optimizer, name, steps, position, stage.state())

    def _update(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[tuple[str, nn.Parameter, float]],
        rate: float,
        clip: float,
    ) -> float:
        """A step of the optimiser, unless the gradient is not finite; the gradient's norm."""
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        trained = [own for _, own, _ in parameters]
        self.processes.add_gradients(trained)
        norm = nn.utils.clip_grad_norm_(trained, clip).item()
        if math.isfinite(norm):
            optimizer.step()
        return norm

    def measure(self, heldout: Sequence[Sample], groups: Mapping[str, Sequence[str]] | None) -> dict[str, Any]:
        """Held-out accuracy under all conditions."""
        settings = self.config.train
        return evaluate(
            self.memory,
            heldout,
            groups=groups,
            per_type=settings.eval_samples,
            batch=settings.eval_batch,
            max_new_tokens=settings.max_new_tokens,
            progress=self.display.measuring,
        )


class _Interrupt:
    """Ctrl-C inside the context lets a step end and be saved; a second one does not wait, nor do several processes."""

    def __init__(self, processes: int) -> None:
        self.waits = processes == 1 and threading.current_thread() is threading.main_thread()
        self.came = False

    def __bool__(self) -> bool:
        return self.came

    def __enter__(self) -> None:
        if self.waits:
            self.before = signal.signal(signal.SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self.waits:
            signal.signal(signal.SIGINT, self.before)

    def _note(self, *_: object) -> None:
        self.came = True
        signal.signal(signal.SIGINT, self.before)

    def tell(self, where: str) -> None:
        """End the run here if it was interrupted."""
        if self.came:
            raise TrainingError(f"interrupted after {where}, which is saved; the same command with --resume goes on")


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return flat


class _only:
    """Gradients for the given parameters of a memory and no others, inside the context."""

    def __init__(self, memory: Memory, parameters: Sequence[tuple[str, nn.Parameter, float]]) -> None:
        chosen = {name for name, _, _ in parameters}
        self.others = [tensor for name, tensor in memory.trained().items() if name not in chosen]

    def __enter__(self) -> None:
        for tensor in self.others:
            tensor.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for tensor in self.others:
            tensor.requires_grad_(True)


def _rate(step: int, settings: StageConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    share = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * share))


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
