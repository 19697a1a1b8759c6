"""A training run: its stages, its files, its report."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from .. import checkpoint
from ..config import Config, StageConfig, to_dict
from ..data import Sample
from ..errors import ConfigError, TrainingError
from ..evaluation import evaluate
from ..memory import Memory
from . import state
from .batches import Batch, Sampler, make_batch
from .formation import Formation
from .invocation import InvocationStage

METRICS, REPORT, SETTINGS = "metrics.jsonl", "report.json", "config.json"
OBJECTIVES = ("sft",)


class Stage(Protocol):
    """What a stage gives to the loop; an objective is a class of this form."""

    name: str
    settings: StageConfig

    def parameters(self) -> list[tuple[str, nn.Parameter, float]]:
        """What trains: name, tensor, learning rate relative to the stage's."""

    def loss(self, batch: Batch, rng: Random) -> tuple[Tensor, dict[str, float]]:
        """A loss and figures for the log; all chance comes from ``rng`` and torch's default generator."""

    def finish(self) -> None:
        """Called once after the last step."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know beyond the parameters."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""


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
    run = Run(memory, config, output, console or Console(stderr=True))
    if run.open(resume):
        report: dict[str, Any] = json.loads((output / REPORT).read_text(encoding="utf-8"))
        return report
    with run.progress:
        for stage in run.stages():
            run.train(stage, train_data)
        checkpoint.save(memory, output, {"training": to_dict(config.train)})
        report = run.measure(heldout, groups)
    report["seconds"] = round(run.seconds_before + time.monotonic() - began, 1)
    checkpoint.atomically(output / REPORT, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    (output / state.FILE).unlink(missing_ok=True)
    return report


class Run:
    """One run in one directory."""

    def __init__(self, memory: Memory, config: Config, output: Path, console: Console) -> None:
        self.memory, self.config, self.output = memory, config, output
        self.done: tuple[str, int, dict[str, Tensor]] | None = None
        self.seconds_before = 0.0
        self.progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )

    def open(self, resume: bool) -> bool:
        """Make or enter the directory; True if its run is finished already."""
        self._known_objective()
        settings = to_dict(self.config)
        path = self.output / SETTINGS
        if not path.exists():
            if self.output.exists() and any(self.output.iterdir()):
                raise TrainingError(f"{self.output}: not empty, and no run of vismem; choose another --output")
            self.output.mkdir(parents=True, exist_ok=True)
            checkpoint.atomically(path, lambda place: place.write_text(json.dumps(settings, indent=2) + "\n"))
            return False
        if not resume:
            raise TrainingError(f"{self.output}: holds a run; --resume it, or choose another --output")
        if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
            raise TrainingError(f"{path}: that run has other settings; give the same ones to --resume it")
        if (self.output / REPORT).exists():
            return True
        if (self.output / state.FILE).exists():
            self.done = state.load(self.output, self.memory)
        return False

    def _known_objective(self) -> None:
        if self.config.train.objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ConfigError(f"objective {self.config.train.objective!r} is not built in; known: {known}")

    def stages(self) -> list[Stage]:
        """The stages that are still to be run."""
        wanted: list[Stage] = []
        if self.config.train.stage in ("formation", "all"):
            wanted.append(Formation(self.memory, self.config.train.formation))
        if self.config.train.stage in ("invocation", "all"):
            wanted.append(InvocationStage(self.memory, self.config.train))
        if self.done:
            names = [stage.name for stage in wanted]
            return wanted[names.index(self.done[0]) :]
        return wanted

    def train(self, stage: Stage, data: Sequence[Sample]) -> None:
        """Run one stage to its end."""
        settings, memory = stage.settings, self.memory
        parameters = stage.parameters()
        groups = [{"params": [own], "name": name, "rate": rate} for name, own, rate in parameters]
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98))
        sampler = Sampler(len(data), settings.batch, self.config.train.seed)
        first = 0
        if self.done and self.done[0] == stage.name:
            first = self.done[1]
            state.restore(optimizer, self.done[2])
            stage.restore(state.part(self.done[2], "stage."))
        sampler.position = first * settings.batch
        _cut(self.output / METRICS, stage.name, first)
        task = self.progress.add_task(stage.name, total=settings.steps, completed=first, note="")
        memory.train()
        with _only(memory, parameters), (self.output / METRICS).open("a", encoding="utf-8") as metrics:
            for step in range(first, settings.steps):
                seed = f"{self.config.train.seed}/{stage.name}/{step}"
                torch.manual_seed(Random(seed).getrandbits(63))
                batch = make_batch(memory.backbone, [data[at] for at in sampler.draw()])
                loss, figures = stage.loss(batch, Random(seed))
                norm = self._update(optimizer, parameters, loss, _rate(step, settings), settings.clip)
                row = {"stage": stage.name, "step": step + 1, "loss": loss.item(), **figures, "norm": norm}
                metrics.write(json.dumps({key: _short(value) for key, value in row.items()}) + "\n")
                self.progress.update(task, advance=1, note=f"loss {loss.item():.3f}")
                if (step + 1) % self.config.train.save_every == 0:
                    metrics.flush()
                    state.save(self.output, memory, optimizer, stage.name, step + 1, stage.state())
        memory.eval()
        if first < settings.steps:
            stage.finish()
        state.save(self.output, memory, optimizer, stage.name, settings.steps, stage.state())

    @staticmethod
    def _update(
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[tuple[str, nn.Parameter, float]],
        loss: Tensor,
        rate: float,
        clip: float,
    ) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([own for _, own, _ in parameters], clip).item()
        if not math.isfinite(norm):
            raise TrainingError("the loss or its gradient is not finite; lower the learning rate (--set train...lr)")
        optimizer.step()
        return norm

    def measure(self, heldout: Sequence[Sample], groups: Mapping[str, Sequence[str]] | None) -> dict[str, Any]:
        """Held-out accuracy under all conditions."""
        settings = self.config.train
        task = self.progress.add_task("measuring", total=None, note="")

        def show(condition: str, done: int, count: int) -> None:
            self.progress.update(task, completed=done, total=count, note=condition)

        return evaluate(
            self.memory,
            heldout,
            groups=groups,
            per_type=settings.eval_samples,
            batch=settings.eval_batch,
            max_new_tokens=settings.max_new_tokens,
            progress=show,
        )


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


def _cut(path: Path, stage: str, steps: int) -> None:
    """Drop the rows of steps that an interrupted run took after its last saved state."""
    if not path.exists():
        return
    kept, order = [], ("formation", "invocation")
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if (order.index(row["stage"]), row["step"]) > (order.index(stage), steps):
            break
        kept.append(line + "\n")
    checkpoint.atomically(path, lambda place: place.write_text("".join(kept), encoding="utf-8"))


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
