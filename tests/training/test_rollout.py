"""Rollouts: what the policy really said of each id, and that a trajectory does not depend on its neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bases import QUESTIONS, Base, config, tied
from reference import one_pass
from transformers.generation import CompileConfig

from vismem_core import Memory, Trace
from vismem_core.decoding.replay import Prompts, read_prompts
from vismem_core.decoding.room import RoomCache
from vismem_core.memory.trace import Invocation
from vismem_core.training import rollout
from vismem_core.training.replay import TrajectoryReplay
from vismem_core.training.rollout import Deal, Sampling, Trajectory, draw, rollouts

SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=20)
COPIES = [prompt for prompt in range(len(QUESTIONS)) for _ in range(3)]


@pytest.fixture
def base() -> Base:
    return tied()


def eager(base: Base, trigger: str = "policy", **options: object) -> Memory:
    """Memory whose policy often asks for it."""
    memory = base.attach(config(trigger=trigger, **options))
    with torch.no_grad():
        memory.tokens.head *= 4.0
    return memory


def prompts(memory: Memory, base: Base) -> Prompts:
    return read_prompts(memory, base.inputs(*QUESTIONS))


def test_quantiles() -> None:
    shares = torch.tensor([[0.2, 0.5, 0.3]]).log()
    at = {chance: draw(shares, torch.tensor([chance])).item() for chance in (0.0, 0.49, 0.51, 0.79, 0.81, 0.999999)}
    assert list(at.values()) == [1, 1, 2, 2, 0, 0]
    # The likeliest two make .8: chances are spread over them alone.
    assert [draw(shares, torch.tensor([chance]), 0.6).item() for chance in (0.6, 0.65, 0.99)] == [1, 2, 2]
    assert draw(shares, torch.tensor([0.99]), 1e-6).item() == 1


@pytest.mark.parametrize("shared", [0, 256])
@pytest.mark.parametrize("trigger", ["policy", "anywhere:0.3", "never"])
def test_a_trajectory_can_be_sampled_alone(
    base: Base, trigger: str, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its neighbours, although finished rows leave the batch early, and whether the prompt is held once."""
    monkeypatch.setattr(rollout, "SHARED", shared)
    memory = eager(base, trigger)
    read = prompts(memory, base)
    seeds = list(range(12, 24))
    together = rollouts(memory, read, COPIES, seeds, SAMPLING)
    assert len({len(own.ids) for own in together}) > 1  # some finish before others
    for number in (0, 4, 7, 11):
        (alone,) = rollouts(memory, read, [COPIES[number]], [seeds[number]], SAMPLING)
        assert alone.ids == together[number].ids
        assert alone.logprobs == pytest.approx(together[number].logprobs, abs=1e-4)
        assert alone.latents.keys() == together[number].latents.keys()


@pytest.mark.parametrize("shared", [0, 256])
@pytest.mark.long
def test_compiled_passes_sample_the_same(base: Base, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "SHARED", shared)
    plain = CompileConfig(backend="eager", mode="default")  # traced, and run as it is
    monkeypatch.setattr(base.model, "_default_compile_config", lambda: plain, raising=False)
    memory = eager(base, "anywhere:0.3")
    read, seeds = prompts(memory, base), list(range(12))
    expected = rollouts(memory, read, COPIES, seeds, SAMPLING)
    assert sum(len(own.latents) for own in expected) > 4
    memory.config = replace(memory.config, compile=True)
    for own, other in zip(rollouts(memory, read, COPIES, seeds, SAMPLING), expected, strict=True):
        assert own.ids == other.ids
        assert own.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("packs", [True, False])
def test_a_group_holds_its_prompt_once(base: Base, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "SHARED", 0)
    memory = eager(base, "anywhere:0.3")
    memory.backbone.packs = packs
    caches: list[RoomCache] = []
    aim = RoomCache.aim
    monkeypatch.setattr(RoomCache, "aim", lambda self, *counts: (caches.append(self), aim(self, *counts))[1])
    told = rollouts(memory, prompts(memory, base), COPIES, list(range(12)), SAMPLING)
    assert any(own.latents for own in told)
    width = prompts(memory, base).ids.shape[1]
    for cache in caches:
        assert (cache.sources is not None) == packs
        layer = cache.layers[0]
        assert layer.first == (width if packs else 0)
        if packs:
            assert layer.prompts is not None and layer.prompts[0].shape[0] == len(QUESTIONS)
    del caches[:]
    rollouts(memory, prompts(memory, base), [1, 0], [0, 1], SAMPLING)  # one of each: nothing to share
    assert caches and all(cache.sources is None for cache in caches)


def test_another_seed_is_another_trajectory(base: Base) -> None:
    memory = eager(base)
    told = rollouts(memory, prompts(memory, base), [0] * 8, list(range(8)), SAMPLING)
    assert len({tuple(own.ids) for own in told}) > 4


@pytest.mark.parametrize(("temperature", "dropout"), [(1.0, 0.0), (0.7, 0.0), (1.0, 0.5)])
def test_log_probabilities_are_those_of_one_plain_pass(base: Base, temperature: float, dropout: float) -> None:
    memory = eager(base)
    sampling = replace(SAMPLING, temperature=temperature, image_dropout=dropout)
    told = rollouts(memory, prompts(memory, base), COPIES, list(range(12)), sampling)
    assert any(own.drops_images for own in told) == bool(dropout)
    first = memory.tokens.first
    assert sum(len(own.latents) for own in told) > 4
    for own in told:
        memory.trace = Trace([Invocation(0, "short", at, vectors) for at, vectors in own.latents.items()])
        plain = one_pass(memory, base.inputs(QUESTIONS[own.prompt]), own.ids, hidden=own.drops_images)
        for at, token in enumerate(own.ids):
            asks = plain.asks[at].masked_fill(~torch.tensor(own.offered[at]), float("-inf"))
            text = plain.logits[at, :first].clone()
            text[list(memory.backbone.placeholders.values())] = float("-inf")  # no image is written
            everything = torch.cat([text, asks]) / temperature
            if own.chosen[at]:
                choice = token if token < first else plain.logits[at, :first].numel() + token - first
                expected = everything.log_softmax(-1)
                assert own.logprobs[at] == pytest.approx(expected[choice].item(), abs=1e-4)
                entropy = -(expected.exp() * expected).nan_to_num(0.0).sum().item()
                assert own.entropy[at] == pytest.approx(entropy, abs=1e-3)
            else:
                assert own.logprobs[at] == 0.0 and token >= first + 2  # nothing but an end token is forced here


def test_greedy_without_memory_is_generate(base: Base) -> None:
    memory = eager(base, "never")
    told = rollouts(memory, prompts(memory, base), [0, 1, 2, 3], [0] * 4, replace(SAMPLING, temperature=0.0))
    memory.detach()
    for own, question in zip(told, QUESTIONS, strict=True):
        expected = base.generate(question, max_new_tokens=20).answers[0].tolist()
        assert own.ids == expected


def test_the_other_kind_meets_the_same_chances(base: Base) -> None:
    memory = eager(base)
    read = prompts(memory, base)
    sampling = replace(SAMPLING, image_dropout=0.5)
    told = rollouts(memory, read, COPIES, list(range(12)), sampling)
    other = rollouts(memory, read, COPIES, list(range(12)), sampling, swapped=True)
    assert len({own.drops_images for own in told}) == 2
    assert [own.drops_images for own in told] == [own.drops_images for own in other]
    kinds = memory.tokens.kind
    compared = 0
    for own, turned in zip(told, other, strict=True):
        if not own.latents:
            assert turned.ids == own.ids
            continue
        first = own.invocations[0]
        assert turned.ids[:first] == own.ids[:first]
        assert {kinds(own.ids[first]), kinds(turned.ids[first])} == {"short", "long"}
        assert {own.ids[first + 1], turned.ids[first + 1]} == {memory.tokens.end("short"), memory.tokens.end("long")}
        compared += 1
    assert compared > 4


def test_dealt_choices_are_made_and_count(base: Base) -> None:
    """At the first place where the policy may ask; their log-probabilities are the policy's own."""
    memory = base.attach(config(trigger="policy"))
    with torch.no_grad():
        memory.tokens.head.zero_()
    read = prompts(memory, base)
    deals = [(0, "short"), (0, "long"), (0, "none"), None] * 4
    told = rollouts(memory, read, sorted([0, 1, 2, 3] * 4), list(range(16)), SAMPLING, deals=deals)  # type: ignore[arg-type]
    for own, deal in zip(told, deals, strict=True):
        kind = memory.tokens.kind(own.ids[0])
        if deal is not None:
            assert (kind or "none") == deal[1]
        assert own.chosen[0] and own.logprobs[0] < 0.0


@pytest.mark.parametrize("deal", ["none", "short"])
def test_a_dealt_choice_may_wait(base: Base, deal: Deal) -> None:
    """Without memory until then, though the policy would have asked; after a dealt none without memory to the end."""
    memory = eager(base, distance=1)
    memory.delimiters = frozenset(range(300))  # a thought ends everywhere
    read = prompts(memory, base)
    (own,) = rollouts(memory, read, [0], [3], SAMPLING, deals=[(3, deal)])
    (free,) = rollouts(memory, read, [0], [3], SAMPLING)
    with memory.triggered("never"):
        (plain,) = rollouts(memory, read, [0], [3], SAMPLING)
    assert own.dealt == 3 and free.invocations[0] < 3
    assert own.ids[:3] == plain.ids[:3] and own.offered[:3] == [[False, False]] * 3
    assert own.logprobs[:3] == pytest.approx(plain.logprobs[:3], abs=1e-5)
    if deal == "none":
        assert own.ids == plain.ids
    else:
        assert own.invocations[0] == 3 and memory.tokens.kind(own.ids[3]) == deal


def length(told: list[Trajectory]) -> list[int]:
    return [len(own.ids) for own in told]


def test_no_trajectory_is_longer_than_asked(base: Base) -> None:
    memory = eager(base)
    told = rollouts(memory, prompts(memory, base), COPIES, list(range(12)), replace(SAMPLING, max_new_tokens=7))
    assert max(length(told)) == 7
    for own in told:
        assert len(own.ids) == len(own.logprobs) == len(own.chosen) == len(own.offered) == len(own.entropy)
        assert all(memory.tokens.kind(own.ids[at]) for at in own.latents)


def test_no_image_token_is_sampled(base: Base) -> None:
    """Not where the policy likes nothing better."""
    memory = eager(base, "never")
    image = memory.backbone.placeholders["image"]
    likes = dict(base.model.named_modules())["lm_head"].register_forward_hook(
        lambda module, args, output: output.index_fill(-1, torch.tensor([image]), 50.0)
    )
    read = prompts(memory, base)
    told = rollouts(memory, read, COPIES, list(range(12)), SAMPLING)
    assert all(image not in own.ids for own in told)
    with torch.no_grad():
        again = TrajectoryReplay(memory, read, told, 1.0).logprobs(form=False)
    likes.remove()
    for row, own in enumerate(told):
        assert again[row, : len(own.ids)].tolist() == pytest.approx(own.logprobs, abs=1e-4)
