"""Who does what in a step: the deal is even, the same everywhere, and leaves nothing out."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from bases import config, tied
from samples import SAMPLES

from vismem_core.config import GrpoConfig, TrainConfig
from vismem_core.training.balance import Work, balanced
from vismem_core.training.batches import part_of
from vismem_core.training.formation_grpo import FormationGrpo
from vismem_core.training.group import GroupStage
from vismem_core.training.invocation_grpo import InvocationGrpo
from vismem_core.training.processes import Processes


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_no_part_has_more_than_the_mean_and_one_item(parts: int) -> None:
    for seed in range(20):
        rng = Random(seed)
        costs = [rng.lognormvariate(3, 1) for _ in range(rng.randrange(1, 100))]
        owners = balanced(costs, parts)
        assert owners == balanced(costs, parts) and set(owners) <= set(range(parts))
        loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == part) for part in range(parts)]
        assert sum(loads) == pytest.approx(sum(costs))
        assert max(loads) <= sum(costs) / parts + max(costs) * (1 - 1 / parts) + 1e-9


def test_items_go_where_they_may() -> None:
    rng = Random(0)
    allowed = [sorted(rng.sample(range(4), rng.randrange(1, 4))) for _ in range(60)]
    owners = balanced([rng.random() for _ in allowed], 4, allowed)
    assert all(owner in own for owner, own in zip(owners, allowed, strict=True))
    assert balanced([5, 1, 1, 1], 2, [[1], [0, 1], [0, 1], [1]]) == [1, 0, 0, 1]


def test_equal_items_are_dealt_in_turn() -> None:
    assert balanced([1.0] * 7, 3) == [0, 1, 2, 0, 1, 2, 0]
    assert balanced([0.0] * 4, 2) == [0, 1, 0, 1]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_each_piece_is_done_once(processes: int) -> None:
    work = Work.dealt(SAMPLES, processes, lambda sample: [len(sample.answer or "")] * 3)
    pieces = [work.pieces(process) for process in range(processes)]
    assert sorted(piece for own in pieces for piece in own) == [(p, n) for p in range(len(SAMPLES)) for n in range(3)]
    assert [work.of(process) for process in range(processes)] == [sorted({p for p, _ in own}) for own in pieces]
    kept = work.only([2, 0]) + work.only([3])
    assert [sample.id for sample in kept.samples] == [SAMPLES[own].id for own in (0, 2, 3)]
    assert kept.owners == [work.owners[own] for own in (0, 2, 3)]


class Rank(Processes):
    """One of several; what the others would tell it was told when one process did everything."""

    def __init__(self, number: int, count: int, told: list[list[Any]]) -> None:
        super().__init__()
        self.at, self.among, self.told, self.asked = number, count, told, 0

    number = property(lambda self: self.at)  # type: ignore[assignment]
    count = property(lambda self: self.among)  # type: ignore[assignment]

    def everyones(self, items: Sequence[Any]) -> list[Any]:
        if self.among == 1:
            self.told.append(list(items))
        self.asked += 1
        theirs = self.told[self.asked - 1]
        for place, own in items:  # what this one did, the one did alike
            same(own, dict(theirs)[place])
        return theirs

    def total(self, value: torch.Tensor) -> torch.Tensor:
        return value


def same(ours: Any, theirs: Any) -> None:
    if isinstance(ours, tuple):
        assert ours[0].ids == theirs[0].ids and list(ours[1:]) == pytest.approx(list(theirs[1:]))
        assert ours[0].logprobs == pytest.approx(theirs[0].logprobs, abs=1e-4)
    else:
        assert ours == theirs


@pytest.mark.parametrize(("kind", "ranks"), [(FormationGrpo, 3), (InvocationGrpo, 5)])
def test_ranks_do_the_step_of_one(kind: type[GroupStage], ranks: int) -> None:
    """Whatever the deal, trajectories are the same, and gradients add up to those of one process."""
    memory = tied().attach(config())
    memory.delimiters = frozenset(range(300))
    settings = TrainConfig(grpo=GrpoConfig(rewards=("call:samples:unlike",), group=4, max_new_tokens=8))
    told: list[list[Any]] = []

    def gradients(rank: Rank) -> dict[str, torch.Tensor]:
        for tensor in memory.trained().values():
            tensor.grad = None
        stage = kind(memory, settings, rank)
        work = Work.dealt(SAMPLES, rank.count, stage.pieces)
        stage.accumulate(part_of(memory.backbone, work, rank.number), "key", 0.6)
        return {name: own.grad.clone() for name, own in memory.trained().items() if own.grad is not None}

    expected = gradients(Rank(0, 1, told))
    parts = [gradients(Rank(number, ranks, told)) for number in range(ranks)]
    assert expected and all(own.abs().sum() > 0 for own in expected.values())
    for name, whole in expected.items():
        added = torch.stack([own[name] for own in parts if name in own]).sum(0)
        torch.testing.assert_close(added, whole, atol=1e-5, rtol=1e-3, msg=name)


def test_whole_samples_are_dealt_in_turn() -> None:
    assert Work.dealt(SAMPLES, 3, None).owners == [[0], [1], [2], [0]]
