"""The steps of one stage: what is drawn, what the optimiser does, what is saved, and what may end it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

from vismem_core.config import StageConfig, TrainConfig
from vismem_core.errors import DataError, RunInterruptedError, TrainingError
from vismem_core.files.samples import Skipped
from vismem_core.memory.memory import Memory

from .batches import Batch, Draws
from .interrupt import Interrupt
from .metrics import Metrics
from .processes import Processes
from .stage import Stage, only
from .state import Saver, State, part, restore

TRIES = 10
"""Steps in a row that may be skipped because their gradient is not finite."""


class Loop:
    """One stage, from its first step, or where a state left it, to its end.

    Args:
        draws: what gives it batches.
        left_out: bad samples that were met so far; saved with each state.
        say: told in one line what was saved when something ends the run.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        draws: Draws,
        memory: Memory,
        config: TrainConfig,
        processes: Processes,
        output: Path,
        left_out: Sequence[Skipped],
        say: Callable[[str], None],
    ) -> None:
        self.name, self.stage, self.draws, self.memory = name, stage, draws, memory
        self.config, self.processes, self.output, self.say = config, processes, output, say
        self.parameters, settings = stage.parameters(), stage.settings
        groups = [{"params": [own], "name": name, "rate": rate} for name, own, rate in self.parameters]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
        )
        self.first, self.finished = 0, False
        self.saver = Saver(output, memory, self.optimizer, stage, name, left_out)
        if (batch := draws.sampler.batch) < processes.count:
            raise TrainingError(f"{name}: a batch of {batch} is too small for {processes.count} processes")

    def restore(self, done: State) -> None:
        """Go on from a state of this stage."""
        self.first, self.finished = done.step, done.finished
        restore(self.optimizer, done.tensors)
        self.stage.restore(part(done.tensors, "stage."))
        self.draws.position = int(done.tensors["sampler.position"])

    def run(self, metrics: Metrics, note: Callable[[dict[str, Any]], None]) -> None:
        """Take the steps that are left, and finish the stage.

        Args:
            metrics: gets a row for each step.
            note: is told the same row when the step is done.

        Raises:
            TrainingError: a signal came, or nothing is learnt any more.
        """
        steps, interrupt = self.stage.settings.steps, Interrupt(self.processes)
        skipped = 0
        with (
            metrics,
            self._saved_whatever_happens(metrics),
            only(self.memory, self.parameters),
            interrupt,
        ):
            for step in range(self.first, steps):
                figures, norm = self._gradients(step)
                skipped = 0 if math.isfinite(norm) else skipped + 1
                row = {"stage": self.name, "step": step + 1, **figures, "norm": norm, "skipped": bool(skipped)}
                with interrupt.held(), self.saver.torn():
                    self._step(step, norm)
                    metrics.add(row)
                    self.saver.whole(step + 1, self.draws.position)
                note(row)
                if skipped == TRIES:
                    raise TrainingError(
                        f"{self.name}: the gradient was not finite in {TRIES} steps in a row, the last one number "
                        f"{step + 1}; lower the learning rate (--set train...lr)"
                    )
                if step + 1 == steps:
                    break
                if interrupt.agreed():
                    raise KeyboardInterrupt
                if (step + 1) % self.config.save_every == 0:
                    with interrupt.held():
                        self._save(metrics)
            self.memory.eval()
            if not self.finished:
                self.stage.finish()
            with interrupt.held():
                self.saver.whole(steps, self.draws.position, finished=True)
                self._save(metrics)
            if interrupt.agreed():
                raise KeyboardInterrupt

    def _gradients(self, step: int) -> tuple[dict[str, float], float]:
        """The gradients of a step, of all processes and clipped; its figures, and the gradients' norm before."""
        key = f"{self.config.seed}/{self.name}/{step}"
        torch.manual_seed(Random(key).getrandbits(63))
        size = self.draws.sampler.batch
        batch = self.draws(size)
        if step + 1 < self.stage.settings.steps:
            self.draws.ahead(size)
        self.memory.zero_grad()
        self.optimizer.zero_grad()
        figures = self.stage.accumulate(_some(batch, self.name), key, step / self.stage.settings.steps)
        trained = [own for _, own, _ in self.parameters]
        self.processes.add_gradients(trained)
        return figures, nn.utils.clip_grad_norm_(trained, self.stage.settings.clip).item()

    def _step(self, step: int, norm: float) -> None:
        """A step of the optimiser, unless the gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = _rate(step, self.stage.settings) * group["rate"]
        if math.isfinite(norm):
            self.optimizer.step()
        self.stage.stepped()

    @contextmanager
    def _saved_whatever_happens(self, metrics: Metrics) -> Iterator[None]:
        """Before anything ends the run, its last whole step is on disk."""
        try:
            yield
        except BaseException as error:
            where = None
            try:
                where = self._save(metrics)
            except OSError as full:
                self.say(f"{self.output}: the last step could not be saved ({full.strerror or full})")
            if isinstance(error, KeyboardInterrupt):
                told = f"{where}, which is saved" if where else "what was saved before"
                raise RunInterruptedError(f"interrupted after {told}; the same command with --resume goes on") from None
            if where:
                self.say(f"{self.output}: saved after {where}; --resume goes on from there")
            raise

    def _save(self, metrics: Metrics) -> str | None:
        """Write the last whole step if it is not on disk yet; say which it is."""
        if not self.processes.first:
            return self.saver.where  # the first one writes it
        metrics.flush()
        return self.saver.write()


def _some(batch: Batch | None, name: str) -> Batch:
    if batch is None:
        raise DataError(f"{name}: a process has no usable sample in this step; raise the batch")
    return batch


def _rate(step: int, settings: StageConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    share = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * share))
