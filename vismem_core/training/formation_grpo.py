"""Stage I by GRPO: what memory holds is learnt from the scores of answers written with it (Eq. 7).

We invoke, at random and short or long with equal chance: first only where a thought ended, later between such places
too. Query builder and formers train; the policy is frozen. What counts are the tokens that the policy chose after the
first invocation. The reward is S(tau) - S(tau_base); since S(tau_base) is the same for a whole group it cancels in the
advantages. It says how much there is to gain, though: where the base is right already, memory can only do harm, and
Stage II decides whether it is asked there at all. Such prompts are the most where the base is any good, and teach
memory to say nothing, so all but a share of them (``settled``) give way to further ones. The paper's form is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from torch import nn

from vismem_core.config import KINDS, TrainConfig
from vismem_core.decoding.replay import Prompts, read_prompts
from vismem_core.memory.memory import FORMATION, Memory
from vismem_core.memory.trigger import Decision, Row, Trigger

from .balance import Work
from .batches import Batch, part_of
from .group import GroupStage, together
from .processes import Processes
from .rollout import Group, Trajectory

DRAWS = 4
"""How often a step draws, its first batch included, before it makes do with fewer prompts."""


class FormationGrpo(GroupStage):
    """Stage I."""

    forms = True

    def __init__(self, memory: Memory, config: TrainConfig, processes: Processes | None = None) -> None:
        super().__init__(memory, config, config.grpo.formation, processes)

    @property
    def ways(self) -> Sequence[str]:
        """The kinds that it trains, each forced: the policy does not ask for them yet."""
        return KINDS

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: own for name, own in self.memory.trained().items() if name.startswith(FORMATION)}

    def accumulate(self, batch: Batch, key: str, progress: float) -> dict[str, float]:
        self.memory.eval()
        return super().accumulate(self._open(batch, key), key, progress)

    def _open(self, batch: Batch, key: str) -> Batch:
        """The batch with further prompts in place of settled ones; as many as all processes lack together are drawn."""
        if self.grpo.settled == 1 or self.draw is None:
            return batch
        kept, further, size = Work([], []), batch, len(self.work(batch).samples)
        for number in range(DRAWS):
            kept += self._kept(further, f"{key}/{number}")
            lacking = size - len(kept.samples)
            if not lacking or number == DRAWS - 1:
                break
            further = self.draw(lacking)
        return part_of(self.memory.backbone, kept, self.processes.number) if kept.samples else batch

    def _kept(self, batch: Batch, key: str) -> Work:
        work = self.work(batch)
        with self.memory.triggered("never"):
            scores = self.base(read_prompts(self.memory, batch.inputs) if len(batch) else None, batch)
        chances = 1 - (1 - self.grpo.settled) * scores
        drawn = [Random(f"{key}/{sample.id}/kept").random() for sample in work.samples]
        return work.only(
            [at for at, (own, chance) in enumerate(zip(drawn, chances.tolist(), strict=True)) if own < chance]
        )

    def sample(self, prompts: Prompts | None, batch: Batch, key: str, progress: float) -> Group:
        between = self.grpo.between if progress >= self.grpo.between_from else 0.0
        copies, seeds, own = self.copies(batch), self.seeds(batch, key), self.own(batch)
        with self.memory.triggered(curriculum(self.grpo.density, between)):
            told = self.rollouts(prompts, [copies[row] for row in own], [seeds[row] for row in own])
        base = self.base(prompts, batch)  # before processes wait for each other's trajectories
        told, (scores,) = self.everyones(batch, told, self.score(told, batch))
        gains = scores - base[:, None]
        return Group(told, gains, {"reward": scores.mean().item(), "gain": gains.mean().item()})

    def counted(self, trajectory: Trajectory) -> list[bool]:
        first = min(trajectory.latents, default=len(trajectory.ids))
        return [free and at > first for at, free in enumerate(trajectory.chosen)]


def curriculum(density: float, between: float) -> Trigger:
    """Forced invocations of either kind: with chance ``density`` where a thought ended, ``between`` elsewhere.

    The n-th memory of all trajectories of a group is of the same kind, so that they differ in what they made of it.
    """

    def decide(row: Row) -> Decision:
        if Random(f"{row.seed}/{row.step}").random() >= (density if row.boundary else between):
            return "none"
        return Random(f"{together(row.seed)}/{row.invocations}").choice(KINDS)

    return Trigger(decide)
