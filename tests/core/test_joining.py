"""Rows that join a running batch, or whose place another takes, are what they are alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from random import Random
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from bases import FAMILIES, QUESTIONS, Base, Question, config, mini, tied, untied
from model_types import build
from torch import Tensor
from transformers import StoppingCriteria

from vismem_core.decoding.loop import Decoder
from vismem_core.decoding.session import Session
from vismem_core.memory.memory import Memory
from vismem_core.memory.trace import Trace
from vismem_core.testing.base import NO_END

FULL = 4
"""Rows in a batch at most."""
HOW = NO_END | {"no_repeat_ngram_size": 2}
"""Processors look at what was written before."""


class Joined(Decoder):
    """Questions of which some are asked at first, and each other one as soon as chance and room allow it.

    Attributes:
        ids, logits: what each question's row wrote, and what it wrote that from, by number.
    """

    def __init__(self, base: Base, memory: Memory, asked: list[tuple[int, int]], seed: int = 0, first: int = 2) -> None:
        super().__init__(memory, Session(memory.backbone, memory.needs()), memory.active_trigger, Trace())
        self.base, self.seed, self.waiting, self.chance = base, seed, asked[first:], Random(seed)
        self.asked, self.most = asked[:first], dict(asked)
        self.ids, self.logits = defaultdict[int, list[int]](list), defaultdict[int, list[Tensor]](list)

    def question(self, number: int) -> Question:
        return QUESTIONS[(number + self.seed) % len(QUESTIONS)]

    def read(self) -> Joined:
        questions = [self.question(number) for number, _ in self.asked]
        self.memory.hook.decode(
            self, **self.base.inputs(*questions), **HOW, max_new_tokens=2**20, stopping_criteria=[_Own(self)]
        )
        return self

    def _guests(self) -> Iterator[Decoder]:
        free = FULL - self.line.alive.count(True)
        while self.waiting and free > 0 and self.chance.random() < 0.4:
            count = min(free, self.chance.choice((1, 2)), len(self.waiting))
            guest = Joined(self.base, self.memory, self.waiting[:count], self.seed, first=count)
            guest.guest, self.waiting, free = True, self.waiting[count:], free - count
            with self.session.apart():
                guest.read()
            guest.order = [number for number, _ in guest.asked]
            yield guest

    def _kept(self, alive: list[bool]) -> list[int] | None:
        return [row for row, own in enumerate(alive) if own] if self.chance.random() < 0.1 else None

    def _room(self, row: int, room: int | None) -> int | None:
        return self.most[self.order[row]] - self.rows[row].step

    def _choices(self, logits: Tensor, room: int | None, running: list[bool]) -> Any:
        told = super()._choices(logits, room, running)
        for row, own in enumerate(running):
            if own:
                self.logits[self.order[row]].append(told[0][row])
        return told

    def _note(self, tokens: list[int]) -> None:
        super()._note(tokens)
        for row, own in enumerate(self.line.alive):
            if own:
                self.ids[self.order[row]].append(tokens[row])


class _Own(StoppingCriteria):  # type: ignore[misc]
    """Each row ends at its own length."""

    def __init__(self, decoder: Joined) -> None:
        self.decoder = decoder

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        own = self.decoder
        pairs = zip(own.order, own.rows, strict=True)
        return torch.tensor([row.step + 1 >= own.most[number] for number, row in pairs])


def compare(base: Base, memory: Any, seed: int) -> Joined:
    """Nine questions in one batch, and each of them alone."""
    chance = Random(seed)
    asked = [(at, chance.choice((1, 5, 9, 14)) if at else 40) for at in range(9)]
    host = Joined(base, memory, asked, seed, first=1 + seed % 2).read()
    alone(base, memory, host)
    return host


def alone(base: Base, memory: Any, host: Joined) -> None:
    assert not host.waiting
    for number, most in host.most.items():
        output = base.generate(host.question(number), **HOW, max_new_tokens=most)
        assert host.ids[number] == output.answers[0].tolist()
        places = [(own.kind, own.position) for own in host.trace.row(number)]
        assert places == [(own.kind, own.position) for own in memory.trace.invocations]
        expected = torch.cat(output.logits)
        got = torch.stack(host.logits[number])[:, : expected.shape[1]]  # the base's are as wide as its vocabulary
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def windowed() -> Base:
    return tied(window=8)


def gemma() -> Base:
    return Base(*build("gemma3"))


def stateful() -> Base:
    return Base(*build("qwen3_5"))


def indexed() -> Base:
    return Base(*build("dots3_note"))


LONG = [pytest.param(own, marks=pytest.mark.long) for own in (untied, gemma, indexed, mini, *FAMILIES)]
SETTINGS = {
    "recompute": config(context="recompute"),
    "images leave": config(drop_image_after_invocation=True),
    "at the images' places": config(places="image"),
    "together": config(trigger="schedule:2=short,6=long"),
    "cross": config(builder="cross"),
    "the policy's": config(trigger="policy", distance=2),
}


@pytest.mark.parametrize("make", [tied, windowed, stateful, *LONG])
def test_rows_that_join_are_what_they_are_alone(make: Any) -> None:
    base = make()
    memory = base.attach()
    host = compare(base, memory, seed=1)
    assert len(host.trace) > 5


@pytest.mark.long
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_whatever_memory_is_made_of(settings: Any) -> None:
    base = tied()
    memory = base.attach(settings)
    if memory.trigger == "policy":
        with torch.no_grad():
            memory.tokens.head *= 8.0
    assert len(compare(base, memory, seed=2).trace) > 5


@pytest.mark.long
@pytest.mark.parametrize("make", [windowed, stateful])
def test_rows_that_invoke_nothing_are_the_bases(make: Any) -> None:
    base = make()
    memory = base.attach(config(trigger="never"))
    compare(base, memory, seed=4)
    memory.trigger = "anywhere:0.05"
    assert 0 < len({own.row for own in compare(base, memory, seed=5).trace.invocations}) < 9


def test_nobody_joins_while_an_end_token_has_been_fed_ahead() -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:1=short"))
    host = Joined(base, memory, [(0, 12), (1, 9), (3, 5)], first=1)
    host.chance = Mock(random=lambda: float(host.rows[0].step < 2), choice=max)
    alone(base, memory, host.read())
    assert len(host.trace) == 3
