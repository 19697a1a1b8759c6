"""Stage II by GRPO: the policy learns when to ask for which memory (Eq. 8).

The reward of a trajectory is S(tau) - S(tau_base) - alpha (p_type + p_neg), less a cost for each invocation. tau_rev
of p_type meets the same chances with the other kind at every invocation. The four tokens' rows train, the end tokens'
at a lower rate, and the policy's LoRA where it has one. What counts are text and invocation tokens, whatever the policy
had a choice of.

One thing differs from the paper, whose own form is ``explore: 0``. Where the base is sure of its next token an
invocation is never sampled, so never learnt. So part of each group is dealt its choice, in threes that meet the same
chances and write the same until then: without memory up to one place, and there none, short and long. A dealt choice
is not the policy's: a ratio to what the policy would have done is next to zero, and without one the good choices of few
prompts would drown in pushes against what is never chosen anyway. Instead the rewards of the three say what the policy
in that state should be, and the output rows learn it (:mod:`vismem_core.training.choices`). What follows a dealt kind
is the policy's own; what follows a dealt none has no memory, or else an early none would be blamed for what a policy
does that asks later where it should not, and a policy that always asks would stay so.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn

from vismem_core.config import KINDS, TrainConfig
from vismem_core.decoding.replay import Prompts
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import FORMATION, Memory

from . import grpo
from .batches import Batch
from .choices import CHOICES, Choices
from .group import GroupStage
from .processes import Processes
from .rollout import Deal, Group, Trajectory

DEALS: tuple[Deal, ...] = ("none", *KINDS)
FIRST = 0.5
"""Chance that a choice is dealt at the first place, and else at any place of an answer as long as the given one:
wherever the policy may ask it has to learn when not to, in the middle of a list or after the last word of an answer."""


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

    def learn(self, prompts: Prompts | None, group: Group) -> dict[str, float]:
        figures = super().learn(prompts, group)
        if group.tried is not None:
            self.choices.add(*group.tried)
            loss = self.choices.loss()
            loss.backward()
            figures["choices"] = loss.item() * self.processes.count
        return figures

    def sample(self, prompts: Prompts | None, batch: Batch, key: str, progress: float) -> Group:
        copies, seeds, deals = self.copies(batch), self.seeds(batch, key), self.deals(batch, key)

        def rolled(rows: Sequence[int], *, swapped: bool) -> list[Trajectory]:
            own = [copies[row] for row in rows], [seeds[row] for row in rows]
            return self.rollouts(prompts, *own, deals=[deals[row] for row in rows], swapped=swapped)

        rows = self.own(batch)
        with self.memory.triggered("policy"):
            told = rolled(rows, swapped=False)
            asked = [at for at, own in enumerate(told) if own.latents]
            other = [told[at] for at in asked]
            if self.grpo.alpha:
                other = rolled([rows[at] for at in asked], swapped=True)
        base = self.base(prompts, batch)  # before processes wait for each other's trajectories
        plain = self.score(told, batch)
        reversed_ = {**dict(enumerate(plain)), **dict(zip(asked, self.score(other, batch), strict=True))}
        told, (scores, turned) = self.everyones(batch, told, plain, list(reversed_.values()))
        invoked = torch.tensor([bool(own.latents) for own in told]).view_as(scores)
        p_type, p_neg = grpo.penalties(scores, turned, invoked)
        gains = scores - base[:, None]
        spent = self.grpo.cost * torch.tensor([float(len(own.latents)) for own in told]).view_as(scores)
        figures = {"reward": scores, "gain": gains, "p_type": p_type, "p_neg": p_neg}
        own = slice(CHOICES * self.threes, None)  # what was dealt nothing shows what the policy has learnt
        if self.grpo.group > CHOICES * self.threes:
            figures |= {"own_gain": gains[:, own], "own_asks": invoked[:, own].float()}
        rewards = gains - self.grpo.alpha * (p_type + p_neg) - spent
        tried = self._tried(told, rewards) if self.threes else None
        means = {name: own.mean().item() for name, own in figures.items()}
        return Group(told, rewards, means, tried)

    def counted(self, trajectory: Trajectory) -> list[bool]:
        return [free and at != trajectory.dealt for at, free in enumerate(trajectory.chosen)]

    def pieces(self, sample: Sample) -> Sequence[float]:
        """Twice what it takes to write the answer, since tau_rev writes it again, but once where none is dealt."""
        none = [at < CHOICES * self.threes and at % CHOICES == 0 for at in range(self.grpo.group)]
        return [cost * (1 if own else 2) for cost, own in zip(super().pieces(sample), none, strict=True)]

    @property
    def threes(self) -> int:
        """How often each group tries all choices."""
        return min(round(self.grpo.explore * self.grpo.group / CHOICES), self.grpo.group // CHOICES)

    def seeds(self, batch: Batch, key: str) -> list[int]:
        """As of any group, but trajectories that try the choices of one state meet the same chances."""
        dealt = CHOICES * self.threes
        own = super().seeds(batch, key)
        numbers = [at % self.grpo.group for at in range(len(own))]
        return [seed - number % CHOICES if number < dealt else seed for seed, number in zip(own, numbers, strict=True)]

    def deals(self, batch: Batch, key: str) -> list[tuple[int, Deal] | None]:
        """Where and what each trajectory is dealt: all choices at one place, and so for each three of a group."""
        dealt: list[tuple[int, Deal] | None] = []
        for sample, answer in zip(batch.samples, batch.answers, strict=True):
            rng = Random(f"{key}/{sample.id}")
            for _ in range(self.threes):
                wait = 0 if rng.random() < FIRST else rng.randrange(len(answer))
                dealt += [(wait, deal) for deal in DEALS]
            dealt += [None] * (self.grpo.group - CHOICES * self.threes)
        return dealt

    def _tried(self, told: list[Trajectory], rewards: Tensor) -> tuple[Tensor, Tensor]:
        """States (P * threes, d) in which all choices were tried, and their rewards (P * threes, 3)."""
        dealt, group, backbone = CHOICES * self.threes, self.grpo.group, self.memory.backbone
        states = torch.zeros(len(rewards) * self.threes, backbone.width, device=backbone.device)
        worth = rewards[:, :dealt].reshape(-1, CHOICES).clone()
        firsts = [first + own for first in range(0, len(told), group) for own in range(0, dealt, CHOICES)]
        for at, first in enumerate(firsts):
            found = [own.state for own in told[first : first + CHOICES] if own.state is not None]
            if len(found) == CHOICES:
                states[at] = found[0]
            else:
                worth[at] = float("nan")  # the answer ended before
        return states, worth.to(states.device)

    def finish(self) -> None:
        self.choices.fit()

    def state(self) -> dict[str, Tensor]:
        return super().state() | self.choices.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        self.choices.restore(tensors)
