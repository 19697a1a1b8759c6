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
RIDGE = 10.0
"""As many states speak against any slope: to each direction's sum of squares so many times the mean variance is added.
Few states then make no wild worth, and many may tell apart what differs in a direction of little variance."""
CHOICES = 3
"""Going on, asking for short, asking for long."""


class Choices:
    """States in which invoking was tried, the latest ``REMEMBERED`` of all processes.

    Args:
        temperature: difference in worth that makes one choice e times as likely as another.
        trials: whether worth comes from a few trials. A policy that took the best of noisy means would mostly follow
            noise, so worth is regressed on the states first.

    Attributes:
        hidden: (n, d), the states that choose.
        worth: (n, 3), of each choice; rows that are not finite say nothing.
    """

    def __init__(self, memory: Memory, processes: Processes, temperature: float, *, trials: bool) -> None:
        self.memory, self.processes, self.temperature, self.trials = memory, processes, temperature, trials
        device = memory.backbone.device
        self.hidden = torch.empty(0, memory.backbone.width, device=device)
        self.worth = torch.empty(0, CHOICES, device=device)

    def add(self, hidden: Tensor, worth: Tensor) -> None:
        """Remember what this process tried; all processes add equally many states.

        Args:
            hidden: (B, d)
            worth: (B, 3)
        """
        for name, value in (("hidden", hidden), ("worth", worth)):
            before: Tensor = getattr(self, name)
            own = value.detach().to(before)
            setattr(self, name, torch.cat([before, self.processes.joined(own)])[-REMEMBERED:])

    def better(self) -> tuple[Tensor, Tensor]:
        """The states that say something, (m, d), and the better policy in each, (m, 3)."""
        known = self.worth.isfinite().all(1)
        hidden, worth = self.hidden[known], self.worth[known]
        if self.trials and len(worth):
            worth = _regressed(hidden, worth)
        return hidden, (worth / self.temperature).softmax(-1)

    def loss(self) -> Tensor:
        """This process's part of the mean cross-entropy of the better policies."""
        return self._loss(*self.better()) / self.processes.count

    def _loss(self, hidden: Tensor, better: Tensor) -> Tensor:
        return -(better * self.logprobs(hidden)).sum() / max(len(better), 1)

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
        hidden, better = self.better()
        head = self.memory.tokens.head
        began = head.detach().clone()
        solver = torch.optim.LBFGS([head], max_iter=300, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            loss = self._loss(hidden, better) + TETHER * (head - began).pow(2).sum()
            loss.backward()
            return loss

        solver.step(closure)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know."""
        return {"hidden": self.hidden, "worth": self.worth}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        self.hidden, self.worth = (tensors[name].to(self.hidden.device) for name in ("hidden", "worth"))


def _regressed(hidden: Tensor, worth: Tensor) -> Tensor:
    """The values (n, 3) of a ridge regression of worth on the states (n, d)."""
    states, values = hidden.double(), worth.double()
    centred = states - states.mean(0)
    covariance = centred.T @ centred
    variance = covariance.diagonal().mean() / len(states)
    covariance.diagonal().add_(RIDGE * variance + torch.finfo(covariance.dtype).eps)
    mean = values.mean(0)
    fitted: Tensor = centred @ torch.linalg.solve(covariance, centred.T @ (values - mean)) + mean
    return fitted.to(worth)
