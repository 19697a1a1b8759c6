"""Stage II by GRPO: the policy learns when to ask for which memory (Eq. 8).

The reward of a trajectory is S(tau) - S(tau_base) - alpha (p_type + p_neg), less a cost for each invocation. tau_rev
of p_type meets the same chances with the other kind at every invocation. The four tokens' rows train, the end tokens'
at a lower rate, and the policy's LoRA where it has one. What counts are text and invocation tokens, whatever the policy
had a choice of.

Two things differ from the paper, each with its own form as a setting. Where the base is sure of its next token an
invocation is never sampled, so never learnt: part of each group is dealt its first choice evenly (``explore``). Hidden
states have a large common part, along which raw rows learn to ask for the same memory everywhere: rows train in
coordinates in which the states have unit covariance (``whiten``).
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor, nn

from ..config import KINDS, TrainConfig
from ..memory import FORMATION, Memory
from . import grpo
from .batches import Batch
from .group import Group, GroupStage
from .processes import Processes
from .replay import Replay
from .rollout import Deal, Prompts, Trajectory, rollouts

SHRINKAGE = 0.01
"""Share of the mean variance that is added to every direction's, so that few states make no wild coordinates."""


class InvocationGrpo(GroupStage):
    """Stage II."""

    forms = False

    def __init__(self, memory: Memory, config: TrainConfig, processes: Processes | None = None) -> None:
        super().__init__(memory, config, config.grpo.invocation, processes)
        head = memory.tokens.head
        self.whitened = nn.Parameter(head.detach().clone())
        width = head.shape[1]
        self.moments, self.seen = head.new_zeros(width, width, dtype=torch.float64), 0.0
        self.back = torch.eye(width, device=head.device)  # whitened rows to rows
        self._asked: list[Tensor] = []
        self._steps = 0

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: own for name, own in self.memory.trained().items() if not name.startswith(FORMATION)}

    def parameters(self) -> list[tuple[str, nn.Parameter, float]]:
        own = self.trained()
        head = self.whitened if self.grpo.whiten else own["tokens.head"]
        rows = {"tokens.invoke": (own["tokens.invoke"], 1.0), "tokens.head": (head, 1.0)}
        rows["tokens.close"] = (own["tokens.close"], self.config.end_rate)
        adapter = [(name, tensor, 1.0) for name, tensor in own.items() if name not in rows]
        return [(name, *row) for name, row in rows.items()] + adapter

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
        return Group(told, rewards, {name: own.mean().item() for name, own in figures.items()})

    def counted(self, trajectory: Trajectory) -> list[bool]:
        return trajectory.chosen

    def deals(self, batch: Batch, key: str) -> list[tuple[int, Deal] | None]:
        """Where and what each trajectory is dealt."""
        return [deal for sample in batch.samples for deal in self._deals(Random(f"{key}/{sample.id}"))]

    def _deals(self, rng: Random) -> list[tuple[int, Deal] | None]:
        group = self.grpo.group
        choices: tuple[Deal, ...] = ("none", *KINDS)
        share = round(self.grpo.explore * group)
        deals: list[tuple[int, Deal] | None] = []
        for number in range(group):
            wait = 0  # mostly the first place, now and then a later one
            while rng.random() < 0.25:
                wait += 1
            deals.append((wait, choices[number % 3]) if number < share else None)
        return deals

    # Whitened rows

    def replayed(self, replay: Replay) -> None:
        self._asked.append(replay.asked)

    def accumulate(self, batch: Batch, key: str, progress: float) -> dict[str, float]:
        figures = super().accumulate(batch, key, progress)
        if self.grpo.whiten:
            self._whiten()
            head = self.memory.tokens.head
            self.whitened.grad = None if head.grad is None else head.grad @ self.back
            head.grad = None
        return figures

    def stepped(self) -> None:
        if self.grpo.whiten:
            self.memory.tokens.head.data = self.whitened.detach() @ self.back

    def _whiten(self) -> None:
        """Add the states that were just asked; renew the coordinates whenever twice as many steps have been seen."""
        states = torch.cat(self._asked) if self._asked else self.memory.tokens.head.new_zeros(0, len(self.back))
        self._asked = []
        self.moments += self.processes.total(states.double().T @ states.double())
        self.seen += self.processes.total(torch.tensor(float(len(states)))).item()
        self._steps += 1
        if self._steps & (self._steps - 1) == 0 and self.seen:
            covariance = self.moments / self.seen
            size, axes = torch.linalg.eigh(covariance)
            scale = (size.clamp(min=0) + SHRINKAGE * size.mean()).rsqrt()
            self.back = (axes * scale @ axes.T).to(self.back)
            toward = (axes / scale @ axes.T).to(self.back)
            self.whitened.data = self.memory.tokens.head.detach() @ toward

    def state(self) -> dict[str, Tensor]:
        about = torch.tensor([self.seen, float(self._steps)])
        own = {"moments": self.moments, "back": self.back, "whitened": self.whitened, "seen": about}
        return super().state() | own

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        self.moments, self.back = tensors["moments"].to(self.moments), tensors["back"].to(self.back)
        self.whitened.data = tensors["whitened"].to(self.whitened.data)
        self.seen, steps = tensors["seen"].tolist()
        self._steps = int(steps)
