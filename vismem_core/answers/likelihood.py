"""How likely a model finds answers that are given, with memory invoked where it would be while writing them.

Memory is invoked where decoding invokes it: where the trigger says so, and by the policy where an invocation token is
the likeliest of all. Then the given text goes on. So an answer that greedy decoding writes is scored on the very road
on which it is written; with memory off it is the base's own likelihood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature

from vismem_core.decoding.loop import ROOM, Decoder
from vismem_core.decoding.session import Session
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample
from vismem_core.memory import trigger as triggers
from vismem_core.memory.memory import Memory
from vismem_core.memory.trace import Trace

from .checking import prepare
from .inference import Place


@dataclass(frozen=True)
class Likelihood:
    """How likely one answer is.

    Attributes:
        logprob: sum of the log-probabilities of its tokens, in nats, each among the base's vocabulary.
        greedy: whether greedy decoding writes it.
        tokens: how many it has.
        invocations: counted as in :class:`vismem_core.answers.inference.Answer`, memory tokens included.
    """

    sample_id: str
    logprob: float
    greedy: bool
    tokens: int
    invocations: tuple[Place, ...]


def likelihoods(
    memory: Memory, samples: Sequence[Sample], *, batch: int = 8, trigger: str | None = None
) -> Iterator[Likelihood]:
    """The likelihoods of the samples' answers, in order, batch by batch.

    An answer begins right behind what the chat template writes before it, without the blanks it may begin with. The
    end of the turn is no part of it.

    Args:
        trigger: another trigger than the memory's own, as a spec.

    Raises:
        DataError: a bad sample, by its name, one without an answer, or one that is ``late``.
    """
    for first in range(0, len(samples), batch):
        chosen = samples[first : first + batch]
        if odd := next((own for own in chosen if own.answer is None or own.late), None):
            raise DataError(f"{odd.name}: " + ("it has no answer" if odd.answer is None else "it is late"))
        usable, inputs = prepare(memory.backbone, chosen)
        if inputs is not None:
            with memory.triggered(trigger) if trigger else nullcontext():
                yield from _score(memory, usable, inputs)


def _score(memory: Memory, samples: Sequence[Sample], inputs: BatchFeature) -> Iterator[Likelihood]:
    tokenizer = memory.backbone.processor.tokenizer
    given: list[list[int]] = [
        tokenizer((own.answer or "").lstrip(), add_special_tokens=False)["input_ids"] for own in samples
    ]
    memory.trace, read = Trace(), _Reading(memory, given)
    if any(given):
        memory.follow()
        with torch.no_grad():
            memory.hook.decode(
                read,
                **inputs,
                max_new_tokens=max(map(len, given)) + 2 * memory.config.budget + ROOM,
                stopping_criteria=[read.done],
                do_sample=False,
                eos_token_id=None,
                pad_token_id=tokenizer.pad_token_id,
            )
        memory.trace = read.trace
    for row, (own, ids) in enumerate(zip(samples, given, strict=True)):
        places = tuple(Place(one.kind, one.position) for one in memory.trace.row(row))
        yield Likelihood(own.id, read.logprobs[row], read.greedy[row], len(ids), places)


class _Reading(Decoder):
    """Decoding in which every row writes what it is given, and invokes memory as if it chose."""

    def __init__(self, memory: Memory, given: Sequence[Sequence[int]]) -> None:
        trigger = memory.active_trigger if memory.enabled else triggers.parse("never")
        super().__init__(memory, Session(memory.backbone, memory.needs(trigger.kinds)), trigger, Trace())
        self.given = given
        self.logprobs, self.greedy, self.count = [0.0] * len(given), [True] * len(given), [0] * len(given)

    def _choices(self, logits: Tensor, room: int | None, running: list[bool]) -> tuple[Tensor, dict[int, int]]:
        self._text = logits.log_softmax(-1)
        return super()._choices(logits, room, running)

    def _select(self, scores: Tensor, sample: bool) -> Tensor:
        tokens: list[int] = super()._select(scores, sample=False).tolist()
        for row, (best, given) in enumerate(zip(tokens, self.given, strict=True)):
            at = self.count[row]
            if best >= self.tokens.first or at >= len(given):
                continue
            tokens[row] = given[at]
            self.count[row] += 1
            self.logprobs[row] += float(self._text[row, given[at]])
            self.greedy[row] &= best == given[at]
        return torch.tensor(tokens, device=scores.device)

    def done(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        """A stopping criterion: which rows (B,) have written all they were given."""
        ended = [count >= len(given) for count, given in zip(self.count, self.given, strict=True)]
        return torch.tensor(ended, device=input_ids.device)
