"""Further prompts in place of those whose trajectories all scored alike, in the same step.

A group with equal scores has no advantages: it teaches nothing (DAPO, arXiv 2503.14476, Sec. 3.2). Silent groups leave
the loss if any group of the step has something to say, and as many prompts are drawn anew as are lacking to a full
batch, up to ``train.grpo.resample`` times. What is drawn depends on all processes' groups together, so that two
processes draw what one with twice the batch draws. Figures of reward and gain stay those of the first draw: prompts
that were kept because their scores differ would say little about the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch

from vismem_core.config import GrpoConfig
from vismem_core.decoding.replay import Prompts
from vismem_core.memory.memory import Memory

from . import grpo
from .balance import Work
from .batches import Batch, part_of
from .processes import Processes
from .rollout import Group


class Sampler(Protocol):
    """What is asked of a stage of GRPO."""

    memory: Memory
    grpo: GrpoConfig
    processes: Processes
    draw: Callable[[int], Batch] | None

    def read(self, batch: Batch) -> Prompts | None:
        """This process's prompts."""

    def work(self, batch: Batch) -> Work:
        """Who has read which prompts."""

    def sample(self, prompts: Prompts | None, batch: Batch, key: str, progress: float) -> Group:
        """Roll out and score one group per prompt."""


def resampled(
    stage: Sampler, prompts: Prompts | None, batch: Batch, group: Group, key: str, progress: float
) -> tuple[Prompts | None, Group]:
    """The prompts and groups of a step with further ones added, and its silent ones marked as not to be heard."""
    rounds = stage.grpo.resample
    if not rounds or stage.draw is None:
        return prompts, group
    work, groups, extra = stage.work(batch), [group], 0
    size = len(work.samples)
    for number in range(rounds):
        lacking = size - sum(int((~grpo.silent(own.rewards)).sum()) for own in groups)
        if lacking <= 0:
            break
        further, extra = stage.draw(lacking), extra + lacking
        groups.append(stage.sample(stage.read(further), further, f"{key}/again/{number}", progress))
        work += stage.work(further)
    if len(groups) > 1:
        prompts = stage.read(part_of(stage.memory.backbone, work, stage.processes.number))
    whole = _joined(groups)
    heard = ~grpo.silent(whole.rewards)
    return prompts, replace(whole, heard=heard if heard.any() else None, resampled=extra, work=work)


def _joined(groups: Sequence[Group]) -> Group:
    """One after the other, prompts numbered through; figures and what was tried are the first one's."""
    start, trajectories = 0, []
    for own in groups:
        trajectories += [replace(told, prompt=told.prompt + start) for told in own.trajectories]
        start += len(own.rewards)
    return replace(groups[0], trajectories=trajectories, rewards=torch.cat([own.rewards for own in groups]))
