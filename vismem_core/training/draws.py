"""Batches that are made while something else is done, the same ones at any time and in any number of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass, replace
from threading import Lock

from transformers import BatchFeature

from vismem_core.base.backbone import Backbone
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample, Skipped, seen

from .balance import Pieces, Work
from .batches import Batch, Sampler, usable_batch
from .processes import Processes

AHEAD = 2
"""Batches that are made before they are asked for."""
NOTICED = 0.02
"""Share of the time from which on waiting for data is worth threads on a CPU, which slow the step."""


@dataclass(frozen=True)
class _Round:
    """What was made of some drawn samples in this process: a batch of the usable ones, and the faults of the others.

    Attributes:
        samples: with their images decoded; :attr:`batch` holds some of them.
        work: all that was drawn, as the data has it.
        own: numbers of this process's samples in it.
    """

    work: Work
    own: list[int]
    samples: list[Sample]
    batch: Batch | None
    faults: list[Skipped]

    @property
    def bad(self) -> list[int]:
        """Numbers of the samples that cannot be used."""
        good = {id(sample) for sample in self.batch.samples} if self.batch else set()
        return [number for number, sample in zip(self.own, self.samples, strict=True) if id(sample) not in good]


class Draws:
    """Gives so many samples of the data as a batch, this process's part of them, which may be none.

    Batches are made in a thread while a step is taken, and their images decoded in several. What comes out is the same
    as if they were made when they are asked for.

    Args:
        batch: samples of a step, in all processes.
        left_out: bad samples are left out and added here, and further ones take their places; without it the first one
            raises.
        pieces: the pieces of work on a sample, where processes may share it.

    Attributes:
        position: where the samples stand that are yet to be given.
        waited: seconds that who asked has waited.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: Sequence[Sample],
        batch: int,
        seed: int,
        processes: Processes,
        left_out: list[Skipped] | None,
        pieces: Pieces | None = None,
    ) -> None:
        self.backbone, self.data, self.processes, self.left_out = backbone, data, processes, left_out
        self.pieces = pieces
        self.sampler, self.position = Sampler(len(data), batch, seed), 0
        self.beside, self.waited, self.began = backbone.device.type != "cpu", 0.0, time.perf_counter()
        self._maker = ThreadPoolExecutor(1, "vismem-batches")
        self._decoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "vismem-images")
        self._processor = Lock()  # tokenizers are one thread's at a time
        self._coming: dict[tuple[int, int], Future[_Round]] = {}

    def __call__(self, count: int) -> Batch:
        """All processes ask for the same number.

        Raises:
            DataError: a bad sample, or no good one is left.
        """
        began = time.perf_counter()
        try:
            return self._agreed(count)
        finally:
            self.waited += time.perf_counter() - began

    def ahead(self, count: int) -> None:
        """Begin to make the next batches beside what else is done: images are decoded while a GPU takes a step.

        On a CPU only where the data is waited for, since the step is slower for it.
        """
        self.beside = self.beside or self.waited > NOTICED * (time.perf_counter() - self.began)
        if not self.beside:
            return
        wanted = [(count, self.position + count * own) for own in range(AHEAD)]
        for key in self._coming.keys() - set(wanted):
            self._coming.pop(key).cancel()
        for own, position in wanted:
            if (own, position) not in self._coming:
                made = self._maker.submit(copy_context().run, self._round, own, position)
                self._coming[own, position] = made

    def settle(self) -> None:
        """Until the batches that are made ahead are there, for who uses the processor meanwhile."""
        wait(self._coming.values())

    def close(self) -> None:
        """End the threads; what they were about to make is not needed."""
        for own in (self._maker, self._decoders):
            own.shutdown(wait=True, cancel_futures=True)

    def _agreed(self, count: int) -> Batch:
        """A batch in which further samples have taken the places of bad ones, in all processes."""
        left_out = None if self.left_out is None else list(self.left_out)
        work, good = Work([], []), list[Sample]()
        batch, wanted, looked, position = None, count, 0, self.position
        while wanted:
            if looked > len(self.data) + count:
                one = f"; one of the faults: {left_out[0]}" if left_out else ""
                raise DataError(f"no usable sample is left in the data{one}")
            coming = self._coming.pop((wanted, position), None)
            own = coming.result() if coming else self._round(wanted, position)
            position, looked, batch = position + wanted, looked + wanted, own.batch
            bad = set(self.processes.everyones(own.bad))
            work += own.work.only(set(range(wanted)) - bad)
            good += [sample for number, sample in zip(own.own, own.samples, strict=True) if number not in bad]
            wanted = len(bad)
            if wanted and left_out is not None:  # an epoch later they are met again
                left_out = list(dict.fromkeys(self.processes.everyones([*left_out, *own.faults])))
        if looked > count:
            batch = self._usable(good, left_out) if good else None
        self.position = position
        if self.left_out is not None:
            self.left_out[:] = left_out or []
        plain = [work.samples[number] for number in work.of(self.processes.number)]
        return replace(batch, samples=plain, work=work) if batch else Batch([], BatchFeature(), [], [], work)

    def _round(self, count: int, position: int) -> _Round:
        """Some samples' part of this process; no other process is asked."""
        drawn = [self.data[at] for at in self.sampler.at(position, count)]
        longest = sorted(drawn, key=lambda one: -len(one.answer or ""))
        work = Work.dealt(longest, self.processes.count, self.pieces)
        own = work.of(self.processes.number)
        samples = list(self._decoders.map(seen, (work.samples[number] for number in own)))
        faults: list[Skipped] = []
        batch = self._usable(samples, None if self.left_out is None else faults) if samples else None
        return _Round(work, own, samples, batch, faults)

    def _usable(self, samples: Sequence[Sample], left_out: list[Skipped] | None) -> Batch | None:
        with self._processor:
            return usable_batch(self.backbone, samples, left_out)
