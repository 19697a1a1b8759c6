"""Two arms: for each question one kind of memory is right. Stage II learns which, from scores alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import samples
import tiny
import torch
from bases import config, tied

from vismem_core.config import KINDS, GrpoConfig, PolicyStageConfig, TrainConfig
from vismem_core.decoding.replay import read_prompts
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory
from vismem_core.training.batches import make_batch
from vismem_core.training.invocation_grpo import InvocationGrpo

QUESTIONS = [
    Sample("a", (tiny.picture(32, 32, 0),), "what is on the left ?", "short"),
    Sample("b", (tiny.picture(48, 32, 1),), "a bag , a coat and", "long"),
    Sample("c", (tiny.picture(32, 48, 2),), "is it a boot", "short"),
    Sample("d", (tiny.picture(24, 32, 3),), "the the the ?", "long"),
]
GRPO = GrpoConfig(
    rewards=("call:samples:right_arm",),
    group=12,
    max_new_tokens=4,
    cost=0.0,
    invocation=PolicyStageConfig(beta=0.0, target_kl=10.0),
)


def learn(memory: Memory, steps: int, **changes: Any) -> list[dict[str, float]]:
    samples.ARMS.update({memory.tokens.invocation(kind): kind for kind in KINDS})
    stage = InvocationGrpo(memory, TrainConfig(grpo=replace(GRPO, **changes)))
    optimizer = torch.optim.Adam([{"params": [own], "lr": 0.1 * rate} for _, own, rate in stage.parameters()])
    batch, figures = make_batch(memory.backbone, QUESTIONS), []
    for step in range(steps):
        optimizer.zero_grad()
        figures.append(stage.accumulate(batch, str(step), step / steps))
        optimizer.step()
        stage.stepped()
    return figures


@torch.no_grad()
def asks(memory: Memory) -> torch.Tensor:
    """The policy's probabilities of short and long at the start of each answer, (4, 2)."""
    hidden = read_prompts(memory, make_batch(memory.backbone, QUESTIONS).inputs).session.hidden[:, -1]
    logits = torch.cat([memory.backbone.head(hidden), memory.tokens.logits(hidden)], dim=1)
    return logits.softmax(-1)[:, -2:]


@pytest.mark.long
@pytest.mark.parametrize("alpha", [0.3, 0.0], ids=["penalties", "plain"])
def test_the_right_arm_is_learnt(alpha: float) -> None:
    memory = tied().attach(config(trigger="policy"))
    with torch.no_grad():
        memory.tokens.head.zero_()
    before = asks(memory)
    assert before.max() < 0.1
    learn(memory, 80, alpha=alpha)
    right = torch.tensor([KINDS.index(own.answer) for own in QUESTIONS])[:, None]  # type: ignore[arg-type]
    chosen = asks(memory)
    assert (chosen.gather(1, right) > 0.5).all() and (chosen.gather(1, 1 - right) < 0.1).all()


@pytest.mark.long
def test_what_is_never_sampled_is_never_learnt_without_exploration() -> None:
    """The paper's own form, from a policy that is sure of its next token."""
    memory = tied().attach(config(trigger="policy"))
    for explore, learnt in ((0.0, False), (0.75, True)):
        with torch.no_grad():
            state = mean_state(memory)
            memory.tokens.head.copy_((-16.0 * state / state.square().sum()).expand(2, -1))
        assert asks(memory).max() < 1e-6
        learn(memory, 80, explore=explore, max_new_tokens=3)  # room to ask at the start alone
        assert bool(asks(memory).max() > 0.1) is learnt


def mean_state(memory: Memory) -> torch.Tensor:
    hidden = read_prompts(memory, make_batch(memory.backbone, QUESTIONS).inputs).session.hidden[:, -1]
    return hidden.mean(0, keepdim=True)


def test_three_trajectories_try_the_choices_of_one_state() -> None:
    memory = tied().attach(config(trigger="policy"))
    memory.delimiters = frozenset(range(300))  # a thought ends everywhere
    stage = InvocationGrpo(memory, TrainConfig(grpo=replace(GRPO, group=8, max_new_tokens=8)))
    batch = make_batch(memory.backbone, QUESTIONS)
    samples.ARMS.update({memory.tokens.invocation(kind): kind for kind in KINDS})
    with memory.triggered("policy"):
        group = stage.sample(read_prompts(memory, batch.inputs), batch, "key", 0.0)
    assert group.tried is not None
    states, worth = group.tried
    assert len(states) == len(worth) == 2 * len(QUESTIONS)  # six of eight trajectories are dealt
    places = []
    for at, (state, values) in enumerate(zip(states, worth, strict=True)):
        first = at // 2 * 8 + at % 2 * 3
        three = group.trajectories[first : first + 3]
        if any(own.dealt is None for own in three):
            assert values.isnan().all()
            continue
        (place,) = {own.dealt for own in three}
        assert len({tuple(own.ids[:place]) for own in three}) == 1
        assert [memory.tokens.kind(own.ids[place]) for own in three] == [None, "short", "long"]
        for own in three:
            assert own.state is not None
            torch.testing.assert_close(own.state, state, atol=1e-5, rtol=1e-4)
        assert values.tolist() == group.rewards.flatten()[first : first + 3].tolist()
        places.append(place)
    assert 0 in places and max(places) > 0  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("group", "explore", "threes"), [(8, 0.75, 2), (16, 0.75, 4), (4, 1.0, 1), (2, 0.75, 0), (8, 0, 0)]
)
def test_so_many_threes_are_dealt(group: int, explore: float, threes: int) -> None:
    memory = tied().attach(config(trigger="policy"))
    stage = InvocationGrpo(memory, TrainConfig(grpo=replace(GRPO, group=group, explore=explore)))
    deals = stage.deals(make_batch(memory.backbone, QUESTIONS), "key")
    assert sum(own is not None for own in deals) == 3 * threes * len(QUESTIONS) and len(deals) == group * len(QUESTIONS)


def test_figures_of_a_step() -> None:
    memory = tied().attach(config(trigger="policy"))
    (figures,) = learn(memory, 1)
    assert 0.3 < figures["reward"] < 0.8  # up to a quarter of each group was dealt the right arm, a quarter none
    assert 0.1 < figures["short"] < 0.5 and 0.1 < figures["long"] < 0.5
    assert figures["p_type"] > 0.1 and figures["p_neg"] > 0.05 and figures["silent"] == 0
    assert figures["gain"] == pytest.approx(figures["reward"] - 0.5, abs=1e-6)  # the base invokes nothing


@pytest.mark.parametrize(("scale", "asks"), [(-16.0, 0.0), (16.0, 1.0)])
def test_what_the_policy_does_by_itself_is_told(scale: float, asks: float) -> None:
    memory = tied().attach(config(trigger="policy"))
    with torch.no_grad():
        state = mean_state(memory)
        memory.tokens.head.copy_((scale * state / state.square().sum()).expand(2, -1))
    (figures,) = learn(memory, 1, max_new_tokens=3)
    assert figures["own_asks"] == asks and 0.1 < figures["short"] + figures["long"] < 0.9  # others were dealt choices
    assert asks or figures["own_gain"] == 0.0
    (figures,) = learn(memory, 1, max_new_tokens=3, explore=1.0)
    assert "own_asks" not in figures
