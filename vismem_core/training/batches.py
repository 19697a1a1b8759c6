"""Samples as token batches, drawn in an order that a seed fixes and a resumed run continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from vismem_core.answers.checking import prepare
from vismem_core.answers.late import split
from vismem_core.base.backbone import Backbone
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample, Skipped

from .processes import Processes


@dataclass(frozen=True)
class Batch:
    """B questions and their answers.

    Attributes:
        inputs: left-padded prompts, as ``generate`` takes them.
        answers: token ids of each answer, the end of the turn included.
        given: how many of them are given, and not to be learnt.
    """

    samples: Sequence[Sample]
    inputs: BatchFeature
    answers: list[list[int]]
    given: list[int]

    def __len__(self) -> int:
        return len(self.answers)


def make_batch(backbone: Backbone, samples: Sequence[Sample]) -> Batch:
    """Load the images and tokenize.

    Raises:
        DataError: a bad sample, by its name.
    """
    batch = usable_batch(backbone, samples, None)
    assert batch is not None, "no samples"
    return batch


def usable_batch(backbone: Backbone, samples: Sequence[Sample], left_out: list[Skipped] | None) -> Batch | None:
    """As :func:`make_batch`, of the samples that can be used; None if none can.

    Args:
        left_out: gets the others; without it the first of them raises.
    """
    good, inputs = prepare(backbone, samples, left_out, answers=True)
    if inputs is None:
        return None
    inputs, given = split(backbone, good, inputs)
    answers = [[*first, *answer_ids(backbone, sample)] for first, sample in zip(given, good, strict=True)]
    return Batch(good, inputs, answers, [len(own) for own in given])


def answer_ids(backbone: Backbone, sample: Sample) -> list[int]:
    """The answer as the model would have to write it: its tokens and the end of the turn."""
    if sample.answer is None:
        raise DataError(f"{sample.name}: has no answer to train on")
    ids: list[int] = backbone.processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    return [*ids, backbone.end_of_turn]


def extended(inputs: BatchFeature, suffixes: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Prompts with tokens written after them, padded on the left again.

    Everything shaped like ``input_ids`` (masks, token types) grows along: by ones in the mask, by zeros elsewhere.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    fills = {name: 0 for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == ids.shape}
    lengths = mask.sum(1).tolist()
    width = max(length + len(suffix) for length, suffix in zip(lengths, suffixes, strict=True))
    grown: dict[str, Any] = dict(inputs)
    for name in fills:
        rows = []
        for row, suffix in enumerate(suffixes):
            own = inputs[name][row, mask[row]]
            tail = {"input_ids": list(suffix), "attention_mask": [1] * len(suffix)}.get(name, [0] * len(suffix))
            filler = own.new_full((width - len(own) - len(suffix),), pad if name == "input_ids" else 0)
            rows.append(torch.cat([filler, own, own.new_tensor(tail)]))
        grown[name] = torch.stack(rows)
    return grown


class Sampler:
    """Batches of indices: every epoch is a seeded permutation, and :attr:`position` says where it stands."""

    def __init__(self, size: int, batch: int, seed: int) -> None:
        if size < 1:
            raise DataError("the training data is empty")
        self.size, self.batch, self.seed, self.position = size, batch, seed, 0

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.draw()

    def draw(self, count: int | None = None) -> list[int]:
        """The next batch, or so many indices; it may run over the end of an epoch into the next one."""
        drawn, count = [], self.batch if count is None else count
        for place in range(self.position, self.position + count):
            epoch, offset = divmod(place, self.size)
            drawn.append(self._order(epoch)[offset])
        self.position += count
        return drawn

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return self._permutation


Made = tuple[Batch | None, int, "list[Skipped] | None"]
"""A batch, where the sampler stands behind it, and the samples that were left out so far."""


class Draws:
    """Gives so many samples of the data as a batch, this process's part of them; None if that is none.

    Args:
        batch: samples of a step, in all processes.
        left_out: bad samples are left out and added here, and further ones take their places; without it the first one
            raises.

    Attributes:
        position: where the samples stand that are yet to be given.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: Sequence[Sample],
        batch: int,
        seed: int,
        processes: Processes,
        left_out: list[Skipped] | None,
    ) -> None:
        self.backbone, self.data, self.processes, self.left_out = backbone, data, processes, left_out
        self.sampler, self.position = Sampler(len(data), batch, seed), 0
        self.beside = backbone.device.type != "cpu"
        self._worker = ThreadPoolExecutor(1, "vismem-batches")
        self._coming: tuple[tuple[int, int], Future[Made]] | None = None

    def __call__(self, count: int) -> Batch | None:
        """All processes ask for the same number.

        Raises:
            DataError: a bad sample, or no good one is left.
        """
        coming, self._coming = self._coming, None
        if coming and coming[0] == (count, self.position):
            batch, self.position, left_out = coming[1].result()
        else:
            wait([coming[1]] if coming else [])  # there is one sampler
            batch, self.position, left_out = self._make(count, self.position, self._left_out())
        if self.left_out is not None:
            self.left_out[:] = left_out or []
        return batch

    def ahead(self, count: int) -> None:
        """Begin to make the next batch beside what else is done: images are decoded while a GPU takes a step.

        Not where there are several processes, which agree on bad samples as they meet them; nor on a CPU, where the
        step is slower by more than what is won.
        """
        if self.beside and self.processes.count == 1:
            made = self._worker.submit(copy_context().run, self._make, count, self.position, self._left_out())
            self._coming = (count, self.position), made

    def settle(self) -> None:
        """Until the batch that is made ahead is there: two threads may not share a tokenizer's padding."""
        wait([self._coming[1]] if self._coming else [])

    def _left_out(self) -> list[Skipped] | None:
        return None if self.left_out is None else list(self.left_out)

    def _make(self, count: int, position: int, left_out: list[Skipped] | None) -> Made:
        good: list[Sample] = []
        batch, wanted, looked = None, count, 0
        self.sampler.position = position
        while wanted:
            if looked > len(self.data) + count:
                one = f"; one of the faults: {left_out[0]}" if left_out else ""
                raise DataError(f"no usable sample is left in the data{one}")
            drawn = sorted((self.data[at] for at in self.sampler.draw(wanted)), key=lambda own: -len(own.answer or ""))
            looked += wanted
            own = self.processes.part(drawn)
            batch = usable_batch(self.backbone, own, left_out) if own else None
            lost = len(own) - (len(batch) if batch else 0)
            wanted = int(self.processes.total(torch.tensor(float(lost))).item())
            if wanted and left_out is not None:  # an epoch later they are met again
                left_out = list(dict.fromkeys(self.processes.everyones(left_out)))
            if wanted or good:
                good += batch.samples if batch else []
                batch = None
        batch = usable_batch(self.backbone, good, left_out) if good else batch
        return batch, self.sampler.position, left_out
