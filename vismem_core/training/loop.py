"""The steps of one stage: what is drawn, what the optimiser does, what is saved, and what may end it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from signal import SIGINT

import torch
from torch import nn

from vismem_core.config import StageConfig, TrainConfig, to_dict
from vismem_core.errors import DataError, RunInterruptedError, TrainingError
from vismem_core.files import checkpoint
from vismem_core.files.samples import Skipped
from vismem_core.memory.memory import Memory

from .batches import Batch
from .callbacks import Callbacks
from .draws import Draws
from .folder import BEST
from .heldout import Heldout
from .interrupt import Interrupt
from .metrics import Mark
from .processes import Processes
from .record import Record
from .stage import Stage, only
from .state import Saver, State, part, restore

TRIES = 10
"""Steps in a row that may be skipped because their gradient is not finite."""


class Loop:
    """One stage, from its first step, or where a state left it, to its end.

    Args:
        draws: what gives it batches.
        left_out: bad samples that were met so far; saved with each state.
        callbacks: are told of each step, and may end the stage.
        heldout: what it is evaluated on, where evaluations are asked for.
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
        callbacks: Callbacks,
        heldout: Heldout,
        say: Callable[[str], None],
    ) -> None:
        self.name, self.stage, self.draws, self.memory = name, stage, draws, memory
        self.config, self.processes, self.output, self.say = config, processes, output, say
        self.callbacks, self.heldout = callbacks, heldout
        self.parameters, settings = stage.parameters(), stage.settings
        groups = [{"params": [own], "name": name, "rate": rate} for name, own, rate in self.parameters]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
        )
        self.done, self.rank, self.finished, self.seconds = 0, 0, False, 0.0
        self.saver = Saver(output, memory, self.optimizer, stage, name, left_out)
        if (batch := draws.sampler.batch) < processes.count:
            raise TrainingError(f"{name}: a batch of {batch} is too small for {processes.count} processes")
        callbacks.open(name, settings, self.optimizer)

    @property
    def mark(self) -> Mark:
        """How far it is."""
        return self.done, self.rank

    def restore(self, done: State) -> None:
        """Go on from a state of this stage."""
        self.done, self.rank, self.finished = done.step, done.rank, done.finished
        restore(self.optimizer, done.tensors)
        self.stage.restore(part(done.tensors, "stage."))
        self.draws.position = int(done.tensors["sampler.position"])
        self.callbacks.restore(done.step, done.callbacks)

    def run(self, record: Record) -> None:
        """Take the steps that are left, and finish the stage.

        Args:
            record: gets a row for each step and each evaluation.

        Raises:
            TrainingError: a signal came, a callback failed, or nothing is learnt any more.
        """
        interrupt = Interrupt(self.processes)
        with (
            record,
            self._saved_whatever_happens(record, interrupt),
            only(self.memory, self.parameters),
            interrupt,
        ):
            self.callbacks.tell("on_train_begin")
            if not self.finished:
                self._steps(record, interrupt)
            self._finish(record, interrupt)
            self.callbacks.tell("on_train_end")
            if interrupt.agreed():
                raise KeyboardInterrupt

    def _steps(self, record: Record, interrupt: Interrupt) -> None:
        """Steps until the last one, or until a callback asks for the end."""
        steps, skipped = self.stage.settings.steps, 0
        if self._due():  # the run ended before it was evaluated here
            self._evaluate(record, interrupt)
        while self.done < steps and not self.callbacks.stopping:
            began, waited = time.perf_counter(), self.draws.waited
            self.callbacks.tell("on_step_begin")
            figures, norm = self._gradients(self.done)
            self.callbacks.tell("on_pre_optimizer_step")
            skipped = 0 if math.isfinite(norm) else skipped + 1
            row = {"stage": self.name, "step": self.done + 1, **figures, "norm": norm, "skipped": bool(skipped)}
            with interrupt.held(), self.saver.torn():
                self._step(self.done, norm)
                record.write(row)
                self.done, self.rank = self.done + 1, 0
                self._whole()
            self.seconds += time.perf_counter() - began
            record.stepped({**row, "data_wait": self.draws.waited - waited})
            self.callbacks.stepped(self.done, self.draws.position / self.draws.sampler.size, row)
            self._whole()
            if skipped == TRIES:
                raise TrainingError(
                    f"{self.name}: the gradient was not finite in {TRIES} steps in a row, the last one number "
                    f"{self.done}; lower the learning rate (--set train...lr)"
                )
            if self.done == steps or self.callbacks.stopping:
                break
            if interrupt.agreed():
                raise KeyboardInterrupt
            if self._due():
                self._evaluate(record, interrupt)
            if self.done % self.config.save_every == 0 or self.callbacks.control.should_save:
                with interrupt.held():
                    self.save(record)
                self.callbacks.tell("on_save")

    def _finish(self, record: Record, interrupt: Interrupt) -> None:
        """The stage's own end, its last evaluation, and what it ends with."""
        self.memory.eval()
        if not self.finished:
            self.stage.finish()
            self.finished, self.rank = True, 0
        with interrupt.held():
            self._whole()
            self.save(record)
        if interrupt.agreed():
            raise KeyboardInterrupt
        if self.config.evaluation.every and self.rank < 2:
            self._evaluate(record, interrupt)
        best = self.callbacks.best
        if self.config.evaluation.keep == "best" and best and best != (self.done, True):
            checkpoint.read(self.output / BEST, self.memory.backbone).fill(self.memory.trained())
            self.say(f"{self.name} ends with what was best, of step {best[0]}")
            self._whole()
        with interrupt.held():
            self.save(record)
        self.callbacks.tell("on_save")

    def _due(self) -> bool:
        """Whether an evaluation is due after this step."""
        every = self.config.evaluation.every
        asked = self.callbacks.control.should_evaluate or (self.done and every and self.done % every == 0)
        return bool(asked) and not self.rank

    def _evaluate(self, record: Record, interrupt: Interrupt) -> None:
        """Ask held-out questions; the best memory so far is saved beside the run."""
        self.draws.settle()
        self.memory.eval()
        found = self.heldout.ask(self.stage.ways, record.display.evaluating)
        row = {"stage": self.name, "step": self.done, "finished": self.finished, **found.figures}
        with interrupt.held():
            record.write(row, found.shown)
            best = self.callbacks.evaluated(found.figures, self.finished)
            if best and self.processes.first:
                self.memory.save(self.output / BEST, training=to_dict(self.config), evaluated=row)
            self.rank = 1 + self.finished
            self._whole()
            if best:
                self.save(record)
        record.evaluated(row, found.shown, best)
        self.processes.wait()

    def _whole(self) -> None:
        position, told = self.draws.position, self.callbacks.to_json()
        self.saver.whole(self.done, position, self.rank, told, finished=self.finished)

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
    def _saved_whatever_happens(self, record: Record, interrupt: Interrupt) -> Iterator[None]:
        """Before anything ends the run, its last whole step is on disk."""
        try:
            yield
        except BaseException as error:
            where = None
            try:
                where = self.save(record)
            except OSError as full:
                self.say(f"{self.output}: the last step could not be saved ({full.strerror or full})")
            if isinstance(error, KeyboardInterrupt):
                told = f"{where}, which is saved" if where else "what was saved before"
                advice = "the same command with --resume goes on"
                raise RunInterruptedError(f"interrupted after {told}; {advice}", interrupt.came or SIGINT) from None
            if where:
                self.say(f"{self.output}: saved after {where}; --resume goes on from there")
            raise

    def save(self, record: Record) -> str | None:
        """Write the last whole step if it is not on disk yet; say which it is."""
        if not self.processes.first:
            return self.saver.where  # the first one writes it
        record.flush()
        return self.saver.write()


def _some(batch: Batch, name: str) -> Batch:
    if not len(batch):
        raise DataError(f"{name}: a process has no usable sample in this step; raise the batch")
    return batch


def _rate(step: int, settings: StageConfig) -> float:
    """Linear warm-up, then a cosine to zero."""
    warm = max(1, round(settings.warmup * settings.steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    share = (step - warm) / max(1, settings.steps - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * share))
