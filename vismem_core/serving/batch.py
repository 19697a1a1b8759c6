"""One batch of answers: the decoding loop with each row's own limits, sampling and end."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria

from vismem_core.decoding.loop import Decoder
from vismem_core.decoding.session import Session
from vismem_core.decoding.turn import TURN
from vismem_core.memory.memory import Memory
from vismem_core.memory.trace import Trace
from vismem_core.training.rollout import draw

from .lanes import Baton
from .writing import Answer

LEAST = 1e-6
"""Of a temperature and of ``top_p``, which may be told as 0."""
COPY = 0x100000000
"""By so much the seeds of triggers differ between answers to one request, as between ``num_return_sequences``."""


class Row:
    """An answer that is being decoded, and how its tokens are drawn.

    Args:
        gone: whether nobody waits for it any more.
    """

    def __init__(
        self,
        answer: Answer,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        gone: Callable[[], bool] = lambda: False,
    ) -> None:
        self.answer, self.temperature, self.top_p, self.gone = answer, temperature, top_p, gone
        told = None if seed is None else f"{seed}/{answer.index}"
        self._chances = random.Random(told)

    def chance(self) -> float:
        """The next draw, from 0 to 1; its own, whoever its neighbours are."""
        return self._chances.random()

    def take(self, token: int) -> bool:
        """A token more; whether the row is done."""
        return self.gone() or self.answer.take(token)


class _Batch(Decoder):
    def __init__(self, memory: Memory, session: Session, rows: Sequence[Row]) -> None:
        super().__init__(memory, session, memory.active_trigger, Trace())
        self.told = rows

    def _start(self, input_ids: Tensor, model_kwargs: dict[str, Any], output: Any, copies: int) -> None:
        super()._start(input_ids, model_kwargs, output, copies)
        for row, own in zip(self.rows, self.told, strict=True):
            row.seed += COPY * own.answer.index

    def _room(self, row: int, room: int | None) -> int | None:
        return self.told[self.order[row]].answer.left

    def _select(self, scores: Tensor, sample: bool) -> Tensor:
        rows = [self.told[own] for own in self.order]
        drawn = [at for at, row in enumerate(rows) if row.temperature > 0]
        tokens = scores.argmax(-1)
        if drawn:
            told = [[max(own, LEAST) for own in (rows[at].temperature, rows[at].top_p)] for at in drawn]
            temperatures, top_p = scores.new_tensor(told).split(1, dim=1)
            chances = scores.new_tensor([rows[at].chance() for at in drawn])
            tokens[drawn] = draw((scores[drawn] / temperatures).log_softmax(-1), chances, top_p)
        return tokens

    def _kept(self, alive: list[bool]) -> list[int] | None:
        """Rows that are done leave as soon as they are half of the batch, unless steps are compiled for so many."""
        if 2 * sum(alive) > len(alive) or self.passes.inner.compile is not None:
            return None
        return [row for row, own in enumerate(alive) if own]


class _Steps(StoppingCriteria):
    """Between two passes: rows get their tokens, and other batches their turn."""

    def __init__(self, batch: _Batch, baton: Baton) -> None:
        self.batch, self.baton = batch, baton

    def __call__(self, input_ids: Tensor, scores: object, **rest: object) -> Tensor:
        own = zip(self.batch.order, input_ids[:, -1].tolist(), strict=True)
        done = [self.batch.told[row].take(token) for row, token in own]
        if self.baton.wanted:
            with self.batch.session.apart(), TURN.lent(), self.baton.lent():
                pass
        return torch.tensor(done, device=input_ids.device)


def decode(memory: Memory, inputs: BatchFeature, rows: Sequence[Row], trigger: str, baton: Baton) -> None:
    """Write the answers of ``rows``, one to each prompt; each is what it is alone.

    Args:
        trigger: who invokes memory, as a spec.
        baton: that this thread has.
    """
    with memory.triggered(trigger), torch.no_grad():
        memory.follow()
        active = memory.active_trigger
        session = Session(memory.backbone, memory.needs(active.kinds if active.active else ()))
        batch = _Batch(memory, session, rows)
        most = max(row.answer.most for row in rows)
        steps = [_Steps(batch, baton)]
        memory.hook.decode(batch, **inputs, max_new_tokens=most, do_sample=False, stopping_criteria=steps)
