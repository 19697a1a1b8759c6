"""An answer while it is written: what is told of it, for whom, and what becomes of the others."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import pytest
from bases import mini

from vismem_core import Memory
from vismem_core.answers.checking import prepare
from vismem_core.answers.inference import answers
from vismem_core.base.embedded import embedded
from vismem_core.decoding.attach import attach
from vismem_core.errors import AttachError
from vismem_core.files.samples import Sample, question
from vismem_core.memory.trace import Invocation
from vismem_core.showing import cards
from vismem_core.showing.page import questions
from vismem_core.showing.writing import Wish, Writing

SHIPPED = questions("qwen2_5_vl")


@pytest.fixture(scope="module")
def shipped() -> Memory:
    base = mini()
    return attach(base.model, base.processor, embedded("qwen2_5_vl")[1].memory)


def writing(memory: Memory, asked: Sample, wish: Wish) -> Writing:
    _, inputs = prepare(memory.backbone, [asked])
    return Writing(memory, inputs, wish)


def test_it_grows_to_the_plain_answer(shipped: Memory) -> None:
    (asked,) = [own for own in SHIPPED if own.type == "list"]
    own = writing(shipped, asked, Wish("policy"))
    seen = [list(ids) for ids in own]
    assert all(later[: len(sooner)] == sooner for sooner, later in pairwise(seen))
    assert len(seen) == len(own.ids) > 10 and own.over
    (plain,) = answers(shipped, [asked])
    words = [one for one in own.ids if one < shipped.tokens.first]
    assert shipped.decode(words, skip_special_tokens=True).strip() == plain.text
    assert [one.position for one in own.trace.invocations] == [place.position for place in plain.invocations] != []


def test_two_at_once_get_what_each_asked_for(shipped: Memory) -> None:
    first, second = SHIPPED[:2]
    wishes = [(first, Wish("schedule:0=long")), (second, Wish(None)), (first, Wish("schedule:0=short,11=short", 1))]
    alone = [list(writing(shipped, *own))[-1] for own in wishes]
    writings = [writing(shipped, *own) for own in wishes]
    turns = [iter(own) for own in writings]
    while [own for own in turns if next(own, None)]:
        pass
    assert [own.ids for own in writings] == alone
    assert [[one.kind for one in own.trace.invocations] for own in writings] == [["long"], [], ["short"]]
    assert (shipped.trigger, shipped.budget) == ("policy", shipped.config.budget)


def test_the_budget_is_of_the_call_alone(shipped: Memory) -> None:
    kinds = []
    for budget in (0, 1, 2):
        own = writing(shipped, SHIPPED[3], Wish("schedule:0=long,11=short", budget))
        list(own)
        kinds.append([one.kind for one in own.trace.invocations])
    assert kinds == [[], ["long"], ["long", "short"]]
    with shipped.triggered("schedule:0=long", budget=0):
        assert (shipped.budget, shipped.columns(64)) == (0, 64)
    assert shipped.budget == shipped.config.budget > 0


def test_it_ends_when_nobody_reads_on(shipped: Memory) -> None:
    own = writing(shipped, SHIPPED[3], Wish("never", max_new_tokens=100000))
    own.inputs["min_new_tokens"] = 100000  # by itself it does not end
    before = set(threading.enumerate())
    for _ in own:
        if len(own.ids) == 3:
            break
    (thread,) = set(threading.enumerate()) - before
    thread.join(20)
    assert not thread.is_alive() and not own.over


def test_what_goes_wrong_reaches_the_reader(shipped: Memory) -> None:
    own = writing(shipped, SHIPPED[0], Wish("policy"))
    own.inputs["num_beams"] = 2
    with pytest.raises(AttachError, match="beam"):
        list(own)
    assert not own.over


def test_what_visitors_and_models_write_is_no_html(shipped: Memory) -> None:
    asked = Sample("own", (), "?", answer="<script>")
    own = writing(shipped, SHIPPED[0], Wish("policy"))
    list(own)
    plain = writing(shipped, SHIPPED[0], Wish())
    told = cards.cards(shipped, asked, own, plain)
    assert "&lt;script&gt;" in told and "<script>" not in told
    assert '<span class="short">‹short›</span>' in told and "✗" in told
    assert "<script>" not in cards.maps(SHIPPED[0].load_images()[0], [], [], "<script>")
    latents = own.trace.invocations[0].latents
    for looked, why in (([0.0, 0.0], "its query does not look"), ([], "read in tiles"), ([0.5, 0.5], "at token 0<")):
        assert why in cards.maps(SHIPPED[0].load_images()[0], [Invocation(0, "short", 0, latents)], [looked], "")


def test_shipped_questions_have_an_image_and_a_reference_each() -> None:
    assert len(SHIPPED) == 4 and all(own.answer and isinstance(own.images[0], Path) for own in SHIPPED)
    assert [own.id for own in questions("no such backbone")] == [own.id for own in SHIPPED]
    first = SHIPPED[0]
    assert question(first.prompt, [Path(str(first.images[0]))]).digest() == first.digest()
