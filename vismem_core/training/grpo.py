"""Group-relative policy optimisation: the arithmetic of Eq. 8 and 12-15, on plain tensors.

Shapes: P prompts, G trajectories each, R = P * G rows, T ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-4
"""Keeps the advantages of groups with nearly equal scores small (Eq. 13)."""


def advantages(scores: Tensor, *, scaled: bool = True) -> Tensor:
    """A = (S - mean) / (std + eps) within each group (Eq. 12, 13), (P, G) -> (P, G).

    A group with equal scores gets zeros: it says nothing about which trajectory is better.

    Args:
        scaled: divide by the standard deviation (of the population), as the paper does.
    """
    centred = scores - scores.mean(1, keepdim=True)
    centred = torch.where(silent(scores)[:, None], 0.0, centred)
    return centred / (scores.std(1, keepdim=True, unbiased=False) + EPSILON) if scaled else centred


def silent(scores: Tensor) -> Tensor:
    """Which groups (P,) have equal scores, and so no signal."""
    return scores.amax(1) - scores.amin(1) < 1e-6


def penalties(scores: Tensor, reversed_scores: Tensor, invoked: Tensor) -> tuple[Tensor, Tensor]:
    """What Eq. 8 takes from the reward of a trajectory, each (P, G).

    Args:
        scores: S(tau).
        reversed_scores: S(tau_rev), read only where ``invoked``.
        invoked: whether the trajectory asked for memory at all.

    Returns:
        p_type = max(0, S(tau_rev) - S(tau)), zero without an invocation; p_neg = max(0, mean S - S(tau)).
    """
    p_type = torch.where(invoked, (reversed_scores - scores).clamp(min=0), 0.0)
    return p_type, (scores.mean(1, keepdim=True) - scores).clamp(min=0)


def clipped(logprobs: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The objective per id, min(r A, clip(r, 1 - c, 1 + c) A) with r the ratio to the rollout's policy (Eq. 14).

    Args:
        logprobs, old: (R, T)
        advantage: (R,)
    """
    ratio = (logprobs - old).exp()
    gain = advantage[:, None]
    return torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The estimate of the KL divergence to the reference per id: exp(d) - d - 1, d = reference - logprobs; >= 0.

    Unbiased and never negative (J. Schulman, "Approximating KL divergence", 2020, http://joschu.net/blog/kl-approx.html).
    """
    difference = reference - logprobs
    return difference.exp() - difference - 1


def weights(counted: Tensor, mode: str) -> Tensor:
    """What each id weighs in the loss, (R, T), so that all weights add up to 1 if any id counts.

    Args:
        counted: which ids count, (R, T).
        mode: ``sequence``, the mean over each trajectory and then over trajectories (Eq. 14); ``token``, the mean
            over all ids that count.
    """
    own = counted.float()
    if mode == "token":
        return own / own.sum().clamp(min=1)
    return own / own.sum(1, keepdim=True).clamp(min=1) / counted.any(1).sum().clamp(min=1)


@dataclass
class AdaptiveKL:
    """beta of the KL term, raised where the policy strays from its reference and lowered where it stays near.

    Attributes:
        target: KL per id that beta steers towards.
    """

    beta: float
    target: float

    def update(self, kl: float) -> None:
        """A step's mean KL per id: beyond 1.5 times the target beta grows, below 1/1.5 of it beta shrinks, by a tenth.

        The rule of PPO's adaptive penalty (Schulman et al. 2017, Sec. 4) with a factor for every step instead of
        one for every policy; beta stays within 1e-4 to 10, and 0 if it was 0.
        """
        if self.beta == 0:
            return
        if kl > 1.5 * self.target:
            self.beta *= 1.1
        elif kl < self.target / 1.5:
            self.beta /= 1.1
        self.beta = min(max(self.beta, 1e-4), 10.0)
