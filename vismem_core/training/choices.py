"""Decisions about invoking: what was tried in which state, and the output rows that follow from all of it.

What a choice was worth in a state stays true while memory is frozen, so every step of Stage II learns from all states
that were tried. Each has a better policy, that makes a choice the likelier the more it was worth, and the rows learn it
by cross-entropy: unlike a policy gradient it moves choices that the policy practically never makes, and rests once the
bad ones are unlikely.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import Memory
from .processes import Processes

REMEMBERED = 8192
"""States whose worth is kept, the latest ones."""
TETHER = 1e-5
"""How strongly the last fit holds the output rows where training had brought them."""
CHOICES = 3
"""Going on, asking for short, asking for long."""


class Choices:
    """States in which invoking was tried, the latest ``REMEMBERED`` of all processes.

    Args:
        temperature: difference in worth that makes one choice e times as likely as another.

    Attributes:
        hidden: (n, d), the states that choose.
        better: (n, 3), the better policy in each; a row of zeros says nothing.
    """

    def __init__(self, memory: Memory, processes: Processes, temperature: float) -> None:
        self.memory, self.processes, self.temperature = memory, processes, temperature
        device = memory.backbone.device
        self.hidden = torch.empty(0, memory.backbone.width, device=device)
        self.better = torch.empty(0, CHOICES, device=device)

    def add(self, hidden: Tensor, worth: Tensor) -> None:
        """Remember what this process tried; all processes add equally many states.

        Args:
            hidden: (B, d)
            worth: (B, 3), of each choice; rows that are not finite were not tried to the end and say nothing.
        """
        better = torch.where(worth.isfinite().all(1, keepdim=True), (worth / self.temperature).softmax(-1), 0.0)
        own = (("hidden", hidden.detach().float()), ("better", better.float()))
        for name, value in own:
            before: Tensor = getattr(self, name)
            setattr(self, name, torch.cat([before, self.processes.joined(value.to(before.device))])[-REMEMBERED:])

    def loss(self) -> Tensor:
        """This process's part of the mean cross-entropy of the better policies."""
        weight = self.better.sum().clamp(min=1) * self.processes.count
        return -(self.better * self.logprobs(self.hidden)).sum() / weight

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (n, 3) of the choices in states (n, d)."""
        backbone = self.memory.backbone
        with torch.no_grad():
            plain = backbone.head(hidden.to(backbone.dtype)).float().logsumexp(-1, keepdim=True)
        asks = self.memory.tokens.logits(hidden).to(plain.device)
        return torch.cat([plain, asks], dim=1).log_softmax(-1)

    def fit(self) -> None:
        """Fit the output rows to all that is remembered.

        Steps of an optimiser turn the rows slowly: hidden states have a large common part. The states are few and the
        problem convex, so its end can be had exactly.
        """
        if not self.better.any():
            return
        head = self.memory.tokens.head
        began = head.detach().clone()
        solver = torch.optim.LBFGS([head], max_iter=300, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = self.loss() * self.processes.count + TETHER * (head - began).pow(2).sum()
            loss.backward()
            return loss

        solver.step(closure)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know."""
        return {"hidden": self.hidden, "better": self.better}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        self.hidden, self.better = (tensors[name].to(self.hidden.device) for name in ("hidden", "better"))
