"""Replaced latents: what enters is the replacement, invocations stay, and the memory is itself again afterwards."""

import pytest
import torch
from bases import QUESTIONS, Base, config

from vismem_core.memory.controls import REPLACEMENTS, noise


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_the_replacement_enters(base: Base, how: str) -> None:
    memory = base.attach(config(trigger="schedule:0=short,6=long"))
    base.model.generation_config.eos_token_id = None
    whole = base.generate(*QUESTIONS)
    formed = [own.latents for own in memory.trace.invocations]
    with memory.replaced(how):
        output = base.generate(*QUESTIONS)
        entered = [own.latents for own in memory.trace.invocations]
    assert not torch.equal(torch.stack(output.logits), torch.stack(whole.logits))
    first = [REPLACEMENTS[how](own[None])[0] for own in formed[: len(QUESTIONS)]]  # later ones saw replaced contexts
    torch.testing.assert_close(torch.stack(entered[: len(QUESTIONS)]), torch.stack(first), atol=1e-5, rtol=1e-4)
    again = base.generate(*QUESTIONS)
    assert torch.equal(torch.stack(again.logits), torch.stack(whole.logits))


def test_noise_has_the_size_of_what_it_replaces_and_none_of_its_direction() -> None:
    latents = torch.randn(3, 5, 512) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    drawn = noise(latents)
    torch.testing.assert_close(drawn.pow(2).mean(-1), latents.pow(2).mean(-1))
    assert torch.cosine_similarity(drawn, latents, dim=-1).abs().max() < 0.25
    assert torch.equal(noise(latents), drawn)


def test_an_unknown_replacement_is_named(base: Base) -> None:
    memory = base.attach(config())
    with pytest.raises(KeyError, match="silence"), memory.replaced("silence"):
        pass
