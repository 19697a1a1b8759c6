"""Memory that needs nothing of the language model enters in the pass of its invocation token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, internvl, tied, untied
from torch import Tensor
from transformers import StoppingCriteria

from vismem_core.testing.base import NO_END
from vismem_plugins.formers.lora import VisionLora


def passes(base: Base, *questions: Any, **options: Any) -> tuple[Any, list[int]]:
    """An answer and how many tokens each pass took in."""
    widths: list[int] = []

    def hear(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        told = kwargs.get("inputs_embeds")
        widths.append((kwargs["input_ids"] if told is None else told).shape[1])

    handle = base.model.register_forward_pre_hook(hear, with_kwargs=True)
    output = base.generate(*questions, **NO_END, **options)
    handle.remove()
    return output, widths[1:]


@pytest.mark.parametrize("make", [tied, untied, internvl])
@pytest.mark.parametrize("rows", [1, 2], ids=["alone", "together"])
def test_it_saves_the_end_tokens_pass(make: Any, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make()
    memory = base.attach(config(trigger="schedule:2=short,6=long"))
    short, long = memory.config.short.length, memory.config.long.length
    early, told = passes(base, *QUESTIONS[:rows], max_new_tokens=10)
    latents = [own.latents for own in memory.trace.invocations]
    riders = rows * (1 + memory.config.query.length + long)  # one packed sequence
    assert told == [1, 1, short + 2, 1, 1, riders, long + 1, 1]
    monkeypatch.setattr(VisionLora, "early", False)
    late, others = passes(base, *QUESTIONS[:rows], max_new_tokens=10)
    assert others == [1, 1, 1, short + 1, 1, 1, riders, long + 1, 1]
    assert early.sequences.equal(late.sequences)
    for one, other in zip(early.logits, late.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for one, invocation in zip(latents, memory.trace.invocations, strict=True):
        torch.testing.assert_close(one, invocation.latents, atol=1e-5, rtol=1e-5)
    mine, theirs = (output.past_key_values.layers[-1].keys for output in (early, late))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_it_waits_where_images_leave() -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:2=short", drop_image_after_invocation=True))
    _, told = passes(base, QUESTIONS[0], max_new_tokens=6)
    assert told == [1, 1, 1, memory.config.short.length + 1, 1]


class StopAt(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == self.token


def test_a_stop_in_between_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:2=short"))
    stop = StopAt(memory.tokens.invocation("short"))
    early, told = passes(base, QUESTIONS[0], stopping_criteria=[stop])
    assert told[-1] == memory.config.short.length + 2
    monkeypatch.setattr(VisionLora, "early", False)
    late, others = passes(base, QUESTIONS[0], stopping_criteria=[stop])
    assert others[-1] == 1
    assert early.sequences.equal(late.sequences)
    mine, theirs = (output.past_key_values.layers[-1].keys for output in (early, late))
    assert mine.shape == theirs.shape
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
