"""Images that leave the cache once memory is formed: as if what follows had been masked off from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import FAMILIES, QUESTIONS, Base, config, llava, mini, rice, tied, untied
from reference import one_pass

from vismem_core import Memory

SEEN = [question for question in QUESTIONS if question[1]]


def forgetful(base: Base, trigger: str, **options: Any) -> Memory:
    memory = base.attach(config(trigger=trigger, drop_image_after_invocation=True, **options))
    base.model.generation_config.eos_token_id = None
    return memory


@pytest.mark.parametrize("make", [tied, untied, *(own for own in FAMILIES if own is not rice)])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("trigger", ["schedule:3=short", "schedule:0=long,6=short", "anywhere:0.3"])
def test_it_is_one_pass_with_images_masked(make: Any, trigger: str, packs: bool) -> None:
    base = make()
    memory = forgetful(base, trigger)
    memory.backbone.packs &= packs
    output = base.generate(*QUESTIONS)
    assert len(memory.trace) >= len(QUESTIONS)
    differs = False
    for row, question in enumerate(QUESTIONS):
        answer = output.answers[row].tolist()
        expected = one_pass(memory, base.inputs(question), answer, row, hidden=True).logits
        got = torch.stack([logits[row] for logits in output.logits])[:, : expected.shape[1]]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        plain = one_pass(memory, base.inputs(question), answer, row).logits
        differs |= not torch.allclose(got, plain, atol=1e-2)
        if trigger == "schedule:3=short":  # nothing is hidden before
            torch.testing.assert_close(got[:4], plain[:4], atol=1e-4, rtol=1e-4)
    assert differs


@pytest.mark.parametrize("make", [tied, mini, llava])
@pytest.mark.parametrize("context", ["cache", "recompute"])
def test_rows_alone_and_together(make: Any, context: str) -> None:
    base = make()
    memory = forgetful(base, "anywhere:0.3", context=context)
    together = base.generate(*QUESTIONS)
    latents = {(own.row, own.position): own.latents for own in memory.trace.invocations}
    assert len({position for _, position in latents}) > 3
    for row, question in enumerate(QUESTIONS):
        alone = base.generate(question)
        assert together.answers[row].tolist() == alone.answers[0].tolist()
        for own in memory.trace.invocations:
            torch.testing.assert_close(own.latents, latents[row, own.position], atol=1e-3, rtol=1e-3)


def test_the_first_memory_still_sees_the_image() -> None:
    base = tied()
    memory = forgetful(base, "schedule:2=long")
    base.generate(*QUESTIONS)
    first = memory.trace.invocations
    memory.detach()
    base = tied()
    memory = base.attach(config(trigger="schedule:2=long"))
    base.generate(*QUESTIONS)
    for own, other in zip(first, memory.trace.invocations, strict=True):
        torch.testing.assert_close(own.latents, other.latents, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("questions", [SEEN[:1], SEEN, QUESTIONS], ids=["one", "several", "and text"])
def test_columns_are_given_up_where_no_row_needs_them(questions: Any) -> None:
    """As many as the row with the fewest image tokens and padding has; the rest is masked."""
    base = tied()
    base.attach(config(trigger="schedule:1=short"))
    base.model.generation_config.eos_token_id = None
    token = base.model.config.image_token_id
    inputs = base.inputs(*questions)
    free = (inputs["attention_mask"] == 0).sum(1) + inputs["input_ids"].eq(token).sum(1)
    whole = base.generate(*questions).past_key_values.get_seq_length()
    base.model.vismem_memory.memory.detach()
    memory = forgetful(base, "schedule:1=short")
    cache = base.generate(*questions).past_key_values
    assert len(memory.trace) == len(questions)
    assert whole - cache.get_seq_length() == free.min() > 0
    assert {own.keys.shape[-2] for own in cache.layers} == {cache.get_seq_length()}


def test_off_by_default() -> None:
    assert not config().drop_image_after_invocation
