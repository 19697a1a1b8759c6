"""Latents that enter in their neighbours' pass give what latents that enter in one of their own give."""

from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, internvl, llava, llava_next, llava_onevision, tied, untied

from vismem_core.decoding.packing import Packing
from vismem_core.decoding.passes import Passes


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way latents went, insertion by insertion."""
    taken: list[str] = []
    for owner, name in ((Passes, "_packed"), (Passes, "_insert")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real, name=name: (taken.append(name), real(*args))[1])
    return taken


@pytest.mark.parametrize("context", ["cache", "recompute"])
@pytest.mark.parametrize("make", [tied, untied, llava, llava_next, llava_onevision, internvl])
def test_both_routes_agree(make: Any, context: str, routes: list[str]) -> None:
    base = make()
    memory = base.attach(config(context=context))
    packed = base.generate(*QUESTIONS)
    latents = [own.latents for own in memory.trace.invocations]
    assert set(routes) == {"_packed"}
    memory.backbone.packs = False
    routes.clear()
    apart = base.generate(*QUESTIONS)
    assert set(routes) == {"_insert"}
    assert packed.answers.tolist() == apart.answers.tolist()
    for one, other in zip(packed.logits, apart.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for one, invocation in zip(latents, memory.trace.invocations, strict=True):
        torch.testing.assert_close(one, invocation.latents, atol=1e-4, rtol=1e-4)
    mine, theirs = (output.past_key_values.layers[-1].keys for output in (packed, apart))
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_what_packing_would_garble_goes_apart(options: dict[str, Any], routes: list[str]) -> None:
    base = tied()
    base.attach(config())
    base.model.set_attn_implementation("eager" if "output_attentions" in options else "sdpa")
    base.generate(*QUESTIONS, **options)
    assert set(routes) == {"_insert"}


def test_the_attention_is_as_before_even_after_an_error(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    base.attach(config())
    before = base.model.get_decoder().config._attn_implementation

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Packing, "attend", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        base.generate(*QUESTIONS)
    assert base.model.get_decoder().config._attn_implementation == before
