"""Calls of one model in several threads and tasks do not see each other: each answer is the one it has alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, mini, tied

from vismem_core.decoding.turn import TURN, Turn
from vismem_core.memory.memory import Memory
from vismem_plugins.mosaic import mosaic

TRIGGERS = ("schedule:0=short", "schedule:0=long,4=short", "never", "anywhere:0.5", "off")
Answered = tuple[list[list[int]], list[tuple[int, str, int]]]


class StopError(Exception):
    """A user pressed stop."""


class Stops:
    """A streamer that ends a call after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, tokens: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise StopError

    def end(self) -> None:
        return


@dataclass(frozen=True)
class Call:
    """What one caller wants."""

    questions: tuple[int, ...]
    trigger: str
    stops: bool


def switched(memory: Memory, trigger: str) -> AbstractContextManager[None]:
    return memory.off() if trigger == "off" else memory.triggered(trigger)


def answer(base: Base, memory: Memory, inputs: dict[tuple[int, ...], Any], call: Call) -> Answered | None:
    options = {"streamer": Stops(3)} if call.stops and len(call.questions) == 1 else {}
    with switched(memory, call.trigger):
        try:
            ids = base.model.generate(**inputs[call.questions], max_new_tokens=8, do_sample=False, **options)
        except StopError:
            return None
        trace = [(own.row, own.kind, own.position) for own in memory.trace.invocations]
    return ids.tolist(), trace


def calls(count: int, questions: int, seed: int) -> list[Call]:
    chance = Random(seed)
    picks = [(at,) for at in range(questions)] + [(0, 1), (1, 2)]
    return [Call(chance.choice(picks), chance.choice(TRIGGERS), chance.random() < 0.2) for _ in range(count)]


def trained() -> tuple[Base, list[Any]]:
    samples = mosaic("heldout", types=["right", "most", "read", "list"])[:4]
    return mini(), [(own.prompt, own.load_images()) for own in samples]


def bf16() -> tuple[Base, list[Any]]:
    base = tied()
    base.model.to(torch.bfloat16)
    return base, QUESTIONS


@pytest.fixture(params=[trained, bf16], ids=["mini", "tiny in bf16"])
def told(request: pytest.FixtureRequest) -> Iterator[tuple[Base, Memory, dict[tuple[int, ...], Any], dict[Call, Any]]]:
    base, questions = request.param()
    memory = base.attach(config())
    backbone = memory.backbone
    picks = {own.questions for own in calls(400, 4, 0)}
    inputs = {pick: backbone.inputs(*map(list, zip(*(questions[at] for at in pick), strict=True))) for pick in picks}
    alone = {own: answer(base, memory, inputs, own) for own in dict.fromkeys(calls(400, 4, 0))}
    assert len({str(own) for own in alone.values()}) > 10  # they do differ
    yield base, memory, inputs, alone
    memory.detach()


@pytest.mark.long
def test_threads(told: Any) -> None:
    base, memory, inputs, alone = told
    wanted = calls(400, 4, 0)
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda own: answer(base, memory, inputs, own), wanted))
    wrong = [own for own, one in zip(wanted, got, strict=True) if one != alone[own]]
    assert wrong == []
    assert memory.enabled and memory.trigger == "anywhere:0.3"


@pytest.mark.long
def test_tasks(told: Any) -> None:
    base, memory, inputs, alone = told
    wanted = calls(400, 4, 0)

    async def caller(some: list[Call]) -> list[Any]:
        found = []
        for own in some:
            with switched(memory, own.trigger):
                await asyncio.sleep(0)  # others switch theirs meanwhile
                assert memory.enabled == (own.trigger != "off")
                found.append(await asyncio.to_thread(answer, base, memory, inputs, own))
        return found

    async def together() -> list[list[Any]]:
        return await asyncio.gather(*(caller(wanted[at::8]) for at in range(8)))

    for at, found in enumerate(asyncio.run(together())):
        assert found == [alone[own] for own in wanted[at::8]]


def test_switches_belong_to_who_entered_them() -> None:
    memory, seen = tied().attach(), []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with memory.off():
            inside.set()
            done.wait(10)
            seen.append(memory.enabled)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    assert memory.enabled
    memory.trigger = "never"  # what is assigned is for all
    with memory.triggered("anywhere:1"), memory.replaced("zero"):
        assert memory.active_trigger.spec == "anywhere:1" and memory.replacement is not None
        assert memory.trigger == "anywhere:1"
    assert memory.trigger == "never" and memory.replacement is None
    done.set()
    thread.join()
    assert seen == [False]


def test_a_result_carries_its_own_trace() -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=short"))
    first = base.generate(QUESTIONS[0])
    with memory.triggered("schedule:0=long,4=short"):
        second = base.generate(QUESTIONS[0])
    assert [own.kind for own in first.memory.invocations] == ["short"]
    assert [own.kind for own in second.memory.invocations] == ["long", "short"]
    assert memory.trace is second.memory


def test_a_pass_of_the_model_waits_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=short"))
    inputs = base.inputs(QUESTIONS[0])
    expected = base.generate(QUESTIONS[0], max_new_tokens=12).sequences
    plain = base.model(**inputs).logits
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.extend(base.model(**inputs).logits for _ in range(20)))
    thread.start()
    for _ in range(5):
        assert base.generate(QUESTIONS[0], max_new_tokens=12).sequences.equal(expected)
    thread.join()
    assert len(got) == 20 and all(own.equal(plain) for own in got)
    assert len(memory.trace) == 1


def free(turn: Turn) -> bool:
    """Whether another thread could have it."""
    found: list[bool] = []

    def take() -> None:
        got = turn._lock.acquire(timeout=0.2)
        found.append(got)
        if got:
            turn._lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_dies_leaves_nothing_behind(error: type[BaseException]) -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=short,4=long"))
    expected = base.generate(*QUESTIONS).sequences
    layer = base.model.model.language_model.layers[1]

    def fail(*args: Any) -> None:
        raise error

    for where in (nullcontext(), memory.off()):
        handle = layer.register_forward_hook(fail)
        with where, pytest.raises(error):
            base.generate(*QUESTIONS)
        handle.remove()
        assert free(TURN)
        assert base.generate(*QUESTIONS).sequences.equal(expected)
    handle = layer.register_forward_hook(fail)
    with pytest.raises(error):
        base.model(**base.inputs(QUESTIONS[0]))
    handle.remove()
    base.model(**base.inputs(QUESTIONS[0]))  # gives back what Ctrl-C left taken
    assert free(TURN)
