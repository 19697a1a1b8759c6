"""Prompts in place of silent groups: which are drawn, and that the step is that of the groups with signal alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bases import config, tied
from samples import SAMPLES

from vismem_core import Memory
from vismem_core.config import GrpoConfig, TrainConfig
from vismem_core.decoding.replay import Prompts, read_prompts
from vismem_core.training.batches import Batch, make_batch
from vismem_core.training.formation_grpo import FormationGrpo
from vismem_core.training.resample import resampled
from vismem_core.training.rollout import Group

DATA = [replace(sample, id=str(number)) for number, sample in enumerate([*SAMPLES, *SAMPLES])]
"""Those with odd numbers have signal."""


def drawn(memory: Memory, rounds: int, first: list[int], later: list[list[int]]) -> tuple[FormationGrpo, list[int]]:
    """A stage whose further draws are given, and how many it asked for each time."""
    settings = GrpoConfig(rewards=("call:samples:fickle",), group=4, max_new_tokens=10, resample=rounds)
    stage, asked, queue = FormationGrpo(memory, TrainConfig(grpo=settings)), [], iter(later)

    def draw(count: int) -> Batch:
        asked.append(count)
        return make_batch(memory.backbone, [DATA[at] for at in next(queue)])

    stage.draw = draw
    return stage, asked


@pytest.mark.parametrize(
    ("rounds", "later", "asked", "heard"),
    [
        (0, [], [], None),
        (1, [[4, 5]], [2], [1, 3, 5]),
        (2, [[4, 5], [7]], [2, 1], [1, 3, 5, 7]),
        (2, [[5, 7]], [2], [1, 3, 5, 7]),  # a full batch: no further round
    ],
)
def test_silent_groups_make_room(
    rounds: int, later: list[list[int]], asked: list[int], heard: list[int] | None
) -> None:
    memory = tied().attach(config())
    stage, told = drawn(memory, rounds, [0, 1, 2, 3], later)
    batch = make_batch(memory.backbone, DATA[:4])
    with memory.triggered("policy"):
        prompts = read_prompts(memory, batch.inputs)
    group = stage.sample(prompts, batch, "key", 0.0)
    prompts, whole = resampled(stage, prompts, batch, group, "key", 0.0)
    assert told == asked
    if heard is None:
        assert whole is group
        return
    order = [0, 1, 2, 3, *(at for own in later for at in own)]
    assert whole.heard is not None and whole.resampled == sum(asked)
    assert [order[at] for at in whole.heard.nonzero().flatten().tolist()] == heard
    assert whole.figures == group.figures

    loud = [at for at, own in enumerate(whole.heard.tolist()) if own]
    told_by = {at: place for place, at in enumerate(loud)}
    kept = [replace(own, prompt=told_by[own.prompt]) for own in whole.trajectories if own.prompt in told_by]
    alone = read_prompts(memory, make_batch(memory.backbone, [DATA[order[at]] for at in loud]).inputs)
    ours = learnt(memory, stage, prompts, whole)
    expected = learnt(memory, stage, alone, Group(kept, whole.rewards[loud], {}))
    assert expected.keys() == ours.keys() and len(ours) > 10
    for name, grad in expected.items():
        torch.testing.assert_close(ours[name], grad, atol=1e-4, rtol=1e-3, msg=name)


def learnt(memory: Memory, stage: FormationGrpo, prompts: Prompts, group: Group) -> dict[str, torch.Tensor]:
    """Gradients of one step."""
    for tensor in memory.trained().values():
        tensor.grad = None
    stage.learn(prompts, group)
    return {name: own.grad.clone() for name, own in memory.trained().items() if own.grad is not None}


def test_where_nothing_has_signal_nothing_leaves() -> None:
    memory = tied().attach(config())
    stage, asked = drawn(memory, 3, [0, 2], [[4], [6], [4]])
    figures = stage.accumulate(make_batch(memory.backbone, [DATA[0]]), "key", 0.0)
    assert asked == [1, 1, 1] and figures["resampled"] == 3 and figures["silent"] == 1.0
