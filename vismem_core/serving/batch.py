"""A batch of answers: the decoding loop with each row's own limits, sampling and end, which others may join."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria

from vismem_core.config import KINDS
from vismem_core.decoding.loop import Decoder
from vismem_core.decoding.session import Session
from vismem_core.memory import trigger as triggers
from vismem_core.memory.memory import Memory
from vismem_core.memory.trace import Trace
from vismem_core.training.rollout import draw

from .writing import Answer

LEAST = 1e-6
"""Of a temperature and of ``top_p``, which may be told as 0."""
COPY = 0x100000000
"""By so much the seeds of triggers differ between answers to one request, as between ``num_return_sequences``."""
ENDLESS = 2**30
"""Tokens that a batch may write which others join: its rows have limits of their own."""


class Row(triggers.Row):
    """An answer that is being decoded, and how its tokens are drawn.

    Args:
        trigger: who invokes memory, as a spec.
        gone: whether nobody waits for it any more.
    """

    def __init__(
        self,
        answer: Answer,
        trigger: str,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.answer, self.temperature, self.top_p, self.gone = answer, temperature, top_p, gone
        self.trigger = triggers.parse(trigger)
        told = None if seed is None else f"{seed}/{answer.index}"
        self._chances = random.Random(told)

    def chance(self) -> float:
        """The next draw, from 0 to 1; its own, whoever its neighbours are."""
        return self._chances.random()

    def take(self, token: int) -> bool:
        """A token more; whether the row is done."""
        return self.gone() or self.answer.take(token)


class Batch(Decoder):
    """Answers that are decoded together.

    Args:
        join: called between passes, may decode others with this as their ``host``.
        host: the batch that these answers join.
    """

    rows: list[Row]  # type: ignore[assignment]

    def __init__(
        self,
        memory: Memory,
        session: Session,
        rows: list[Row],
        join: Callable[[Batch], None] | None,
        host: Batch | None,
    ) -> None:
        super().__init__(memory, session, rows[0].trigger, Trace())
        self.told, self.join, self.guest = rows, join, host is not None
        self.coming: list[Batch] = []

    @property
    def busy(self) -> int:
        """Answers that are not over."""
        return self.line.alive.count(True)

    def _start(self, input_ids: Tensor, model_kwargs: dict[str, Any], output: Any, copies: int) -> None:
        super()._start(input_ids, model_kwargs, output, copies)
        for row, own in zip(self.rows, self.told, strict=True):
            own.seed = row.seed + COPY * own.answer.index
        self.rows = self.told

    def _room(self, row: int, room: int | None) -> int | None:
        return self.rows[row].answer.left

    def _trigger(self, row: int) -> triggers.Trigger:
        return self.rows[row].trigger

    def _select(self, scores: Tensor, sample: bool) -> Tensor:
        drawn = [at for at, row in enumerate(self.rows) if row.temperature > 0]
        tokens = scores.argmax(-1)
        if drawn:
            told = [[max(own, LEAST) for own in (self.rows[at].temperature, self.rows[at].top_p)] for at in drawn]
            temperatures, top_p = scores.new_tensor(told).split(1, dim=1)
            chances = scores.new_tensor([self.rows[at].chance() for at in drawn])
            tokens[drawn] = draw((scores[drawn] / temperatures).log_softmax(-1), chances, top_p)
        return tokens

    def _guests(self) -> Iterator[Batch]:
        self.trace.invocations.clear()  # answers know theirs
        if self.join is not None and self.passes.inner.compile is None:  # compiled passes are for so many rows
            with self.session.apart():
                self.join(self)
        while self.coming:
            yield self.coming.pop()

    def _kept(self, alive: list[bool]) -> list[int] | None:
        """Rows that are done leave once they are a quarter of the batch, unless passes are compiled for so many."""
        if 4 * sum(alive) > 3 * len(alive) or self.passes.inner.compile is not None:
            return None
        return [row for row, own in enumerate(alive) if own]


class _Steps(StoppingCriteria):
    """Between two passes rows get their tokens."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, input_ids: Tensor, scores: object, **rest: object) -> Tensor:
        own = zip(self.batch.rows, input_ids[:, -1].tolist(), strict=True)
        return torch.tensor([row.take(token) for row, token in own], device=input_ids.device)


def decode(
    memory: Memory,
    inputs: BatchFeature,
    rows: list[Row],
    join: Callable[[Batch], None] | None = None,
    host: Batch | None = None,
) -> None:
    """Write the answers of ``rows``, one to each prompt; each is what it is alone.

    Args:
        join, host: see :class:`Batch`.
    """
    with torch.no_grad():
        memory.follow()
        batch = Batch(memory, Session(memory.backbone, memory.needs(KINDS)), rows, join, host)
        most = max(row.answer.most for row in rows) if memory.config.compile else ENDLESS
        steps = [_Steps(batch)]
        memory.hook.decode(batch, **inputs, max_new_tokens=most, do_sample=False, stopping_criteria=steps)
    if host is not None:
        host.coming.append(batch)
