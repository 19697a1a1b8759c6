"""Decisions about invoking: what was tried in which state, and the output rows that follow from all of it.

What a choice was worth in a state stays true while memory is frozen, so every step of Stage II learns from all states
that were tried. Each has a better policy, that makes a choice the likelier the more it was worth, and the rows learn it
by cross-entropy: unlike a policy gradient it moves choices that the policy practically never makes, and rests once the
bad ones are unlikely. It does not ask what a mistake costs, though, and rows cannot tell all states apart; so the last
word has the mean worth of what the rows would choose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vismem_core.memory.memory import Memory

from .processes import Processes

REMEMBERED = 16384
"""States whose worth is kept, the latest ones."""
TETHER = 1e-5
"""How strongly the last fit holds the output rows where training had brought them."""
RIDGE = 10.0
"""As many states speak against any slope: to each direction's sum of squares so many times the mean variance is added.
Few states then make no wild worth, and many may tell apart what differs in a direction of little variance."""
FIELDS = ("hidden", "plain", "worth")
"""What is remembered of each state, as attributes of the same name."""
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
        plain: (n, 1), what the base's own tokens weigh there together: the logarithm of the sum of their exponentials.
        worth: (n, 3), of each choice; rows that are not finite say nothing.
    """

    def __init__(self, memory: Memory, processes: Processes, temperature: float, *, trials: bool) -> None:
        self.memory, self.processes, self.temperature, self.trials = memory, processes, temperature, trials
        device = memory.backbone.device
        self.hidden = torch.empty(0, memory.backbone.width, device=device)
        self.plain = torch.empty(0, 1, device=device)
        self.worth = torch.empty(0, CHOICES, device=device)

    def add(self, hidden: Tensor, worth: Tensor) -> None:
        """Remember what was tried, by all processes together.

        Args:
            hidden: (B, d)
            worth: (B, 3)
        """
        for name, value in (("hidden", hidden), ("plain", self._plain(hidden)), ("worth", worth)):
            before: Tensor = getattr(self, name)
            own = value.detach().to(before)
            setattr(self, name, torch.cat([before, own])[-REMEMBERED:])

    def better(self) -> tuple[Tensor, Tensor]:
        """The states that say something, (m, d), and the better policy in each, (m, 3)."""
        hidden, _, better, _ = self._known()
        return hidden, better

    def _known(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the states that say something: ``hidden``, ``plain``, the better policy (m, 3) and ``worth``."""
        known = self.worth.isfinite().all(1)
        hidden, plain, worth = self.hidden[known], self.plain[known], self.worth[known]
        read = _regressed(hidden, worth) if self.trials and len(worth) else worth
        return hidden, plain, (read / self.temperature).softmax(-1), worth

    def loss(self) -> Tensor:
        """This process's part of the mean cross-entropy of the better policies."""
        hidden, plain, better, _ = self._known()
        asks = self.memory.tokens.logits(hidden)
        return _cross_entropy(better, _logprobs(plain, asks)) / self.processes.count

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (n, 3) of the choices in states (n, d)."""
        plain = self._plain(hidden)
        return _logprobs(plain, self.memory.tokens.logits(hidden))

    @torch.no_grad()
    def _plain(self, hidden: Tensor) -> Tensor:
        backbone = self.memory.backbone
        weights: Tensor = backbone.logits(hidden.to(backbone.dtype)).float().logsumexp(-1, keepdim=True)
        return weights.to(hidden.device)

    def fit(self) -> None:
        """Fit the output rows to all that is remembered: by cross-entropy, then from there by mean worth.

        Steps of an optimiser turn the rows slowly: hidden states have a large common part. The states are few, so an
        optimum can be had exactly; in double precision, or where the solver stops would hang on the states' last bits.
        The mean worth of what the rows choose, and ``temperature`` times their entropy, are greatest for the same
        policy where rows can follow it. They need no regression, since noise of single trials is averaged as it is.
        """
        head = self.memory.tokens.head
        hidden, plain, better, worth = (own.double().to(head.device) for own in self._known())
        if not len(hidden):
            return
        began, plainly = head.detach().double(), torch.eye(hidden.shape[1]).to(hidden)
        variances, directions = torch.linalg.eigh(hidden.T @ hidden / len(hidden) + TETHER * plainly)
        evenly = directions / variances.clamp(min=TETHER).sqrt()  # along these the states vary alike

        def minimise(loss: Callable[[Tensor], Tensor], rows: Tensor, basis: Tensor) -> Tensor:
            steps = torch.zeros_like(rows, requires_grad=True)
            solver = torch.optim.LBFGS(
                [steps], max_iter=1000, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
            )

            def closure() -> Tensor:
                solver.zero_grad()
                own = rows + steps @ basis.T
                total: Tensor = loss(_logprobs(plain, hidden @ own.T)) + TETHER * (own - began).pow(2).sum()
                total.backward()
                return total

            solver.step(closure)
            return rows + steps.detach() @ basis.T

        # The first has one optimum, which even steps come to soonest. The second has several: plain ones end in better.
        rows = minimise(lambda own: _cross_entropy(better, own), began, evenly)
        rows = minimise(lambda own: -(own.exp() * (worth / self.temperature - own)).sum(1).mean(), rows, plainly)
        head.data.copy_(rows)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know."""
        return {name: getattr(self, name) for name in FIELDS}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        for name in FIELDS:
            setattr(self, name, tensors[name].to(self.hidden.device))


def _logprobs(plain: Tensor, asks: Tensor) -> Tensor:
    return torch.cat([plain, asks], dim=1).log_softmax(-1)


def _cross_entropy(better: Tensor, logprobs: Tensor) -> Tensor:
    return -(better * logprobs).sum() / max(len(better), 1)


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
