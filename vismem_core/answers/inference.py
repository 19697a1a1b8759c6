"""Answering samples in batches, with the place of every invocation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from vismem_core.config import Kind
from vismem_core.files.samples import Sample, Skipped
from vismem_core.memory.memory import Memory

from .checking import prepare
from .late import EndsLate, split


@dataclass(frozen=True)
class Place:
    """Where an answer invoked memory: the index of the invocation token among the answer's tokens."""

    kind: Kind
    position: int


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Attributes:
        text: without memory tokens, and without what was given.
        marked: the text with ``‹short›`` or ``‹long›`` at each invocation.
        tokens: how many tokens were written, memory tokens included.
    """

    sample_id: str
    text: str
    invocations: tuple[Place, ...]
    marked: str
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def answers(
    memory: Memory,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 256,
    batch: int = 8,
    trigger: str | None = None,
    left_out: list[Skipped] | None = None,
) -> Iterator[Answer]:
    """Greedy answers, in order, batch by batch.

    Args:
        trigger: another trigger than the memory's own, as a spec.
        left_out: samples that cannot be used get no answer and are added here; without it the first one raises.

    Raises:
        DataError: a bad sample, by its name.
    """
    for first in range(0, len(samples), batch):
        chosen = [samples[at] for at in range(first, min(first + batch, len(samples)))]
        usable, inputs = prepare(memory.backbone, chosen, left_out)
        if inputs is not None:
            with memory.triggered(trigger) if trigger else nullcontext():
                yield from _answer(memory, usable, inputs, max_new_tokens)


def _answer(memory: Memory, samples: Sequence[Sample], inputs: BatchFeature, max_new_tokens: int) -> Iterator[Answer]:
    inputs, given = split(memory.backbone, samples, inputs)
    width = inputs["input_ids"].shape[1]
    ask: dict[str, Any] = {"max_new_tokens": max_new_tokens + max(map(len, given)), "do_sample": False}
    if any(given):
        ask |= _late(memory, given, width)
    with torch.no_grad():
        ids = memory.model.generate(**inputs, **ask)
    for row, sample in enumerate(samples):
        written = ids[row, width:].tolist()
        places = tuple(Place(own.kind, own.position) for own in memory.trace.row(row))
        yield _read(memory, sample, written, places, len(given[row]))


def _late(memory: Memory, given: Sequence[list[int]], width: int) -> dict[str, Any]:
    """What makes ``generate`` write what is given, and stop at no end in it."""
    everything, first = range(memory.tokens.first), memory.tokens.first

    def allowed(row: int, ids: Tensor) -> Sequence[int]:
        return given[row][len(ids) - width :][:1] or everything

    stops = EndsLate(width, [len(own) for own in given], first, sorted(_ends(memory)))
    pad = memory.backbone.processor.tokenizer.pad_token_id
    return {
        "prefix_allowed_tokens_fn": allowed,
        "stopping_criteria": [stops],
        "eos_token_id": None,
        "pad_token_id": pad,
    }


def _ends(memory: Memory) -> set[int]:
    ends = memory.model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _read(memory: Memory, sample: Sample, written: list[int], places: tuple[Place, ...], given: int) -> Answer:
    tokenizer = memory.backbone.processor.tokenizer
    stops = _ends(memory)
    texts = [at for at, own in enumerate(written) if own < memory.tokens.first]
    length = next((at + 1 for at in texts[given:] if written[at] in stops), len(written))
    written = written[:length]  # rows that are done may go on while others do
    cuts = [0, *(place.position for place in places), len(written)]
    pieces = [tokenizer.decode(written[start:stop], skip_special_tokens=True) for start, stop in pairwise(cuts)]
    words = [own for own in written if own < memory.tokens.first][given:]
    text = tokenizer.decode(words, skip_special_tokens=True).strip()
    marks = ["", *(f"‹{place.kind}›" for place in places)]
    marked = " ".join(
        part for pair in zip(marks, pieces, strict=True) for part in (own.strip() for own in pair) if part
    )
    return Answer(sample.id, text, places, marked, length)
