"""Answering samples in batches, with the place of every invocation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria

from vismem_core.config import Kind
from vismem_core.files.samples import Sample, Skipped
from vismem_core.memory.memory import Memory

from .checking import prepare
from .late import EndsLate, split

TAIL = 8
"""Tokens before a text's last characters, which decode them as the whole text does."""


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
    stop: Sequence[str] = (),
    **generation: Any,
) -> Iterator[Answer]:
    """Answers, in order, batch by batch; greedy ones by default.

    Args:
        trigger: another trigger than the memory's own, as a spec.
        left_out: samples that cannot be used get no answer and are added here; without it the first one raises.
        stop: texts that end an answer; ``text`` ends before the first of them, ``marked`` holds what was written.
        generation: what else ``generate`` takes, such as ``do_sample``, ``temperature`` and ``top_p``.

    Raises:
        DataError: a bad sample, by its name.
    """
    for first in range(0, len(samples), batch):
        chosen = [samples[at] for at in range(first, min(first + batch, len(samples)))]
        usable, inputs = prepare(memory.backbone, chosen, left_out)
        if inputs is not None:
            with memory.triggered(trigger) if trigger else nullcontext():
                yield from _answer(memory, usable, inputs, max_new_tokens, stop, generation)


def _answer(
    memory: Memory,
    samples: Sequence[Sample],
    inputs: BatchFeature,
    max_new_tokens: int,
    stop: Sequence[str],
    generation: Mapping[str, Any],
) -> Iterator[Answer]:
    inputs, given = split(memory.backbone, samples, inputs)
    width = inputs["input_ids"].shape[1]
    ask: dict[str, Any] = {"do_sample": False, **generation, "max_new_tokens": max_new_tokens + max(map(len, given))}
    if any(given):
        ask |= _late(memory, given, width)
    if stop:
        ask["stopping_criteria"] = [*ask.get("stopping_criteria", ()), _Stops(memory, width, given, stop)]
    with torch.no_grad():
        ids = memory.model.generate(**inputs, **ask)
    for row, sample in enumerate(samples):
        written = ids[row, width:].tolist()
        places = tuple(Place(own.kind, own.position) for own in memory.trace.row(row))
        yield _read(memory, sample, written, places, len(given[row]), stop)


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


class _Stops(StoppingCriteria):
    """A row is done when what it wrote by itself holds one of ``stop``.

    transformers' own criterion takes vocabularies apart, and not all tokenizers'.
    """

    def __init__(self, memory: Memory, width: int, given: Sequence[Sequence[int]], stop: Sequence[str]) -> None:
        self.tokenizer, self.first = memory.backbone.processor.tokenizer, memory.tokens.first
        self.width, self.given, self.stop = width, [len(own) for own in given], stop
        self.tail = max(map(len, stop)) + TAIL

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        rows = zip(input_ids[:, self.width :].tolist(), self.given, strict=True)
        words = [[own for own in ids if own < self.first][given:] for ids, given in rows]
        texts = [self.tokenizer.decode(own[-self.tail :], skip_special_tokens=True) for own in words]
        return torch.tensor([any(own in text for own in self.stop) for text in texts], device=input_ids.device)


def _ends(memory: Memory) -> set[int]:
    ends = memory.model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _read(
    memory: Memory, sample: Sample, written: list[int], places: tuple[Place, ...], given: int, stop: Sequence[str]
) -> Answer:
    tokenizer = memory.backbone.processor.tokenizer
    stops = _ends(memory)
    texts = [at for at, own in enumerate(written) if own < memory.tokens.first]
    length = next((at + 1 for at in texts[given:] if written[at] in stops), None)
    while length is None and stop and written[-1:] == [tokenizer.pad_token_id]:
        written = written[:-1]
    written = written[:length]  # rows that are done may go on while others do
    cuts = [0, *(place.position for place in places), len(written)]
    pieces = [tokenizer.decode(written[start:stop], skip_special_tokens=True) for start, stop in pairwise(cuts)]
    words = [own for own in written if own < memory.tokens.first][given:]
    text = tokenizer.decode(words, skip_special_tokens=True)
    text = text[: min((at for own in stop if (at := text.find(own)) >= 0), default=len(text))].strip()
    marks = ["", *(f"‹{place.kind}›" for place in places)]
    marked = " ".join(
        part for pair in zip(marks, pieces, strict=True) for part in (own.strip() for own in pair) if part
    )
    return Answer(sample.id, text, places, marked, len(written))
