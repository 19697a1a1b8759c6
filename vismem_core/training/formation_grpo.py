"""Stage I by GRPO: what memory holds is learnt from the scores of answers written with it (Eq. 7).

We invoke, at random and short or long with equal chance: first only where a thought ended, later between such places
too. Query builder and formers train; the policy is frozen. What counts are the tokens that the policy chose after the
first invocation. The reward is S(tau) - S(tau_base); since S(tau_base) is the same for a whole group it cancels in the
advantages. It says how much there is to gain, though: where the base is right already, memory can only do harm, and
since Stage II decides whether it is asked there at all, such groups weigh less (``settled``; the paper's form is 1).
Else they are the most, and teach memory to say nothing.
"""

from __future__ import annotations

from random import Random

from torch import nn

from ..config import KINDS, TrainConfig
from ..memory import FORMATION, Memory
from ..trigger import Decision, Row, Trigger
from .batches import Batch
from .group import Group, GroupStage, together
from .processes import Processes
from .rollout import Prompts, Trajectory, rollouts


class FormationGrpo(GroupStage):
    """Stage I."""

    forms = True

    def __init__(self, memory: Memory, config: TrainConfig, processes: Processes | None = None) -> None:
        super().__init__(memory, config, config.grpo.formation, processes)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: own for name, own in self.memory.trained().items() if name.startswith(FORMATION)}

    def sample(self, prompts: Prompts, batch: Batch, key: str, progress: float) -> Group:
        between = self.grpo.between if progress >= self.grpo.between_from else 0.0
        with self.memory.triggered(curriculum(self.grpo.density, between)):
            told = rollouts(self.memory, prompts, self.copies(batch), self.seeds(batch, key), self.sampling)
        scores = self.scores(told, batch)
        base = self.base(prompts, batch)
        gains = scores - base[:, None]
        figures = {"reward": scores.mean().item(), "gain": gains.mean().item()}
        return Group(told, gains, figures, 1 - (1 - self.grpo.settled) * base)

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
