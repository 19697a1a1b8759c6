"""Stage I by GRPO: which prompts it learns from, and what a group has in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from bases import config, tied

from vismem_core.config import GrpoConfig, TrainConfig
from vismem_core.files.samples import Sample
from vismem_core.memory.trigger import Row
from vismem_core.training.batches import Batch, make_batch
from vismem_core.training.formation_grpo import FormationGrpo, curriculum
from vismem_core.training.group import together

SAMPLES = [Sample(str(number), (tiny.picture(32, 32, number),), "what is it ?", "boot") for number in range(16)]


def stage(settled: float, scores: list[float]) -> FormationGrpo:
    """With a base whose scores are given, and data that go on after the first four samples."""
    memory = tied().attach(config())
    grpo = GrpoConfig(group=4, max_new_tokens=4, settled=settled)
    own = FormationGrpo(memory, replace(TrainConfig(), grpo=grpo))
    own.base_scores = {sample.id: score for sample, score in zip(SAMPLES, scores, strict=False)}
    left = iter(SAMPLES[4:])

    def draw(count: int) -> Batch:
        return make_batch(memory.backbone, [next(left) for _ in range(count)])

    own.draw = draw
    return own


def chosen(own: FormationGrpo) -> list[str]:
    first = make_batch(own.memory.backbone, SAMPLES[:4])
    return [sample.id for sample in own._open(first, "key").samples]


def test_prompts_that_the_base_answers_give_way_to_further_ones() -> None:
    scores = [1.0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    assert chosen(stage(0.0, scores)) == ["1", "3", "5", "7"]  # three drawn, then one
    assert chosen(stage(1.0, scores)) == ["0", "1", "2", "3"]  # the paper's form


def test_a_step_makes_do_with_what_it_found() -> None:
    assert chosen(stage(0.0, [1.0] * 4 + [0, 1, 1, 1] + [1.0] * 8)) == ["4"]
    assert chosen(stage(0.0, [1.0] * 16)) == ["0", "1", "2", "3"]  # never an empty batch


def test_a_share_of_them_is_kept() -> None:
    kept = [len(chosen(stage(settled, [0.0] * 2 + [1.0] * 14))) for settled in (0.0, 0.5)]
    assert kept[0] == 2 and kept[1] > 2


def test_a_step_counts_the_prompts_it_kept() -> None:
    own = stage(0.0, [1.0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0])
    figures = own.accumulate(make_batch(own.memory.backbone, SAMPLES[:4]), "key", 0.0)
    assert figures["gain"] == pytest.approx(figures["reward"], abs=1e-6)  # the base scores nothing on any of them


def test_a_group_forms_the_same_kind_and_others_may_not() -> None:
    own, trigger = stage(1.0, [0.0] * 12), curriculum(1.0, 0.0)
    batch = make_batch(own.memory.backbone, SAMPLES[:12])
    seeds = own.seeds(batch, "key")
    assert len(set(seeds)) == 48 and len({together(seed) for seed in seeds}) == 12
    kinds = [trigger(Row(seed=seed)) for seed in seeds]
    groups = [set(kinds[at : at + 4]) for at in range(0, 48, 4)]
    assert all(len(group) == 1 for group in groups) and {"short", "long"} == set(kinds)
