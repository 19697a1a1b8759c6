"""Controls: the same invocations with other vectors in the latents' places.

What memory gains although its latents are replaced, it owes to the markers around them or to the mere insertion, not to
what the latents hold (the replacement test of arXiv 2605.21642).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Replacement = Callable[[Tensor], Tensor]
"""Latents (R, N, d) -> what enters instead of them, of the same shape."""


def noise(latents: Tensor) -> Tensor:
    """Normal noise of each latent's own size; the same noise for every row and call."""
    drawn = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)
    size = latents.float().pow(2).mean(-1, keepdim=True).sqrt().to(latents)
    return drawn / drawn.float().pow(2).mean(-1, keepdim=True).sqrt().to(latents) * size


def zero(latents: Tensor) -> Tensor:
    """Nothing."""
    return torch.zeros_like(latents)


def repeated(latents: Tensor) -> Tensor:
    """The first latent, N times."""
    return latents[:, :1].expand_as(latents)


REPLACEMENTS: Mapping[str, Replacement] = MappingProxyType({"noise": noise, "zero": zero, "repeated": repeated})
