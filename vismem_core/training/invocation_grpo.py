"""Stage II by GRPO: the policy learns when to ask for which memory (Eq. 8).

The reward of a trajectory is S(tau) - S(tau_base) - alpha (p_type + p_neg), less a cost for each invocation. tau_rev
of p_type meets the same chances with the other kind at every invocation. The four tokens' rows train, the end tokens'
at a lower rate, and the policy's LoRA where it has one. What counts are text and invocation tokens, whatever the policy
had a choice of.

One thing differs from the paper, whose own form is ``explore: 0``. Where the base is sure of its next token an
invocation is never sampled, so never learnt. So part of each group is dealt its choice at one place, evenly between
none, short and long. A dealt choice is not the policy's: a ratio to what the policy would have done is next to zero,
and without one the good choices of few prompts would drown in pushes against what is never chosen anyway. Instead the
mean rewards of the three choices say what the policy in that state should be, and the output rows learn it by
cross-entropy (:mod:`vismem_core.training.choices`). What follows a dealt kind is the policy's own; what
follows a dealt none has no memory, or else an early none would be blamed for what a policy does that asks later where
it should not, and a policy that always asks would stay so.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor, nn

from ..config import KINDS, TrainConfig
from ..memory import FORMATION, Memory
from . import grpo
from .batches import Batch
from .choices import CHOICES, Choices
from .group import Group, GroupStage
from .processes import Processes
from .rollout import Deal, Prompts, Trajectory, rollouts

DEALS: tuple[Deal, ...] = ("none", *KINDS)
FIRST = 0.5
"""Chance that a group decides at the first place, and else at any place of an answer as long as the given one: wherever
the policy may ask it has to learn when not to, in the middle of a list or after the last word of an answer."""


class InvocationGrpo(GroupStage):
    """Stage II."""

    forms = False

    def __init__(self, memory: Memory, config: TrainConfig, processes: Processes | None = None) -> None:
        super().__init__(memory, config, config.grpo.invocation, processes)
        self.choices = Choices(memory, self.processes, config.temperature, trials=True)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: own for name, own in self.memory.trained().items() if not name.startswith(FORMATION)}

    def parameters(self) -> list[tuple[str, nn.Parameter, float]]:
        rates = {"tokens.close": self.config.end_rate}
        return [(name, own, rates.get(name, 1.0)) for name, own in self.trained().items()]

    def learn(self, prompts: Prompts, group: Group) -> dict[str, float]:
        figures = super().learn(prompts, group)
        if group.tried is not None:
            self.choices.add(*group.tried)
            loss = self.choices.loss()
            loss.backward()
            figures["choices"] = loss.item() * self.processes.count
        return figures

    def sample(self, prompts: Prompts, batch: Batch, key: str, progress: float) -> Group:
        copies, seeds, deals = self.copies(batch), self.seeds(batch, key), self.deals(batch, key)
        with self.memory.triggered("policy"):
            told = rollouts(self.memory, prompts, copies, seeds, self.sampling, deals=deals)
            asked = [row for row, own in enumerate(told) if own.latents]
            other = [told[row] for row in asked]
            if asked and self.grpo.alpha:
                other = rollouts(
                    self.memory,
                    prompts,
                    [copies[row] for row in asked],
                    [seeds[row] for row in asked],
                    self.sampling,
                    deals=[deals[row] for row in asked],
                    swapped=True,
                )
        scores = self.scores(told, batch)
        turned = scores.clone().flatten()
        turned[asked] = torch.tensor(self.score(other, batch)) if asked else turned[asked]
        invoked = torch.tensor([bool(own.latents) for own in told]).view_as(scores)
        p_type, p_neg = grpo.penalties(scores, turned.view_as(scores), invoked)
        gains = scores - self.base(prompts, batch)[:, None]
        spent = self.grpo.cost * torch.tensor([float(len(own.latents)) for own in told]).view_as(scores)
        figures = {"reward": scores, "gain": gains, "p_type": p_type, "p_neg": p_neg}
        rewards = gains - self.grpo.alpha * (p_type + p_neg) - spent
        tried = self._tried(prompts, told, deals, rewards) if self.grpo.explore else None
        means = {name: own.mean().item() for name, own in figures.items()}
        return Group(told, rewards, means, tried)

    def counted(self, trajectory: Trajectory) -> list[bool]:
        return [free and at != trajectory.dealt for at, free in enumerate(trajectory.chosen)]

    def deals(self, batch: Batch, key: str) -> list[tuple[int, Deal] | None]:
        """Where and what each trajectory is dealt; a group decides at the same place."""
        group = self.grpo.group
        share = round(self.grpo.explore * group)
        dealt: list[tuple[int, Deal] | None] = []
        for sample, answer in zip(batch.samples, batch.answers, strict=True):
            rng = Random(f"{key}/{sample.id}")
            wait = 0 if rng.random() < FIRST else rng.randrange(len(answer))
            dealt += [(wait, DEALS[number % CHOICES]) if number < share else None for number in range(group)]
        return dealt

    def _tried(
        self, prompts: Prompts, told: list[Trajectory], deals: list[tuple[int, Deal] | None], rewards: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For each group a state (P, d) in which all choices were tried, and their mean rewards (P, 3)."""
        count, group = rewards.shape
        states = prompts.session.hidden[:, -1].clone()
        sums, trials = torch.zeros(2, count, CHOICES).unbind(0)
        for row, (own, deal) in enumerate(zip(told, deals, strict=True)):
            if deal is None or own.state is None:
                continue
            place = row // group, DEALS.index(deal[1])
            states[row // group] = own.state
            sums[place] += rewards.flatten()[row]
            trials[place] += 1
        return states, (sums / trials).to(states.device)

    def finish(self) -> None:
        self.choices.fit()

    def state(self) -> dict[str, Tensor]:
        return super().state() | self.choices.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        self.choices.restore(tensors)
