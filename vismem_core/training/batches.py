"""Samples as token batches, drawn in an order that a seed fixes and a resumed run continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from vismem_core.answers.checking import prepare
from vismem_core.answers.late import split
from vismem_core.base.backbone import Backbone
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample, Skipped

from .balance import Work


@dataclass(frozen=True)
class Batch:
    """B questions and their answers.

    Attributes:
        inputs: left-padded prompts, as ``generate`` takes them.
        answers: token ids of each answer, the end of the turn included.
        given: how many of them are given, and not to be learnt.
        work: the step's work in all processes, where these questions are a part of it.
    """

    samples: Sequence[Sample]
    inputs: BatchFeature
    answers: list[list[int]]
    given: list[int]
    work: Work | None = None

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


def part_of(backbone: Backbone, work: Work, process: int) -> Batch:
    """A process's part of a step's work, which may be none."""
    own = [work.samples[number] for number in work.of(process)]
    return replace(make_batch(backbone, own), work=work) if own else Batch([], BatchFeature(), [], [], work)


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
        self._order = lru_cache(2)(self._permutation)  # a batch may run over the end of one

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self.draw()

    def draw(self, count: int | None = None) -> list[int]:
        """The next batch, or so many indices; it may run over the end of an epoch into the next one."""
        count = self.batch if count is None else count
        drawn = self.at(self.position, count)
        self.position += count
        return drawn

    def at(self, position: int, count: int) -> list[int]:
        """The indices from a position on."""
        places = (divmod(place, self.size) for place in range(position, position + count))
        return [int(self._order(epoch)[offset]) for epoch, offset in places]

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))
