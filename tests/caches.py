"""Small caches with random contents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

WINDOW = 6


def filled(width: int, batch: int = 3, seed: int = 0, split: int = 1) -> DynamicCache:
    """A full layer and a sliding one, with ``width`` tokens that came in ``split`` pieces."""
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(WINDOW)]
    torch.manual_seed(seed)
    for layer in cache.layers:
        for piece in torch.randn(2, batch, 2, width, 4).tensor_split(split, dim=-2):
            layer.update(*piece)
    return cache


def content(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def same(left: Any, right: Any) -> bool:
    return all(a.equal(b) for one, two in zip(left, right, strict=True) for a, b in zip(one, two, strict=True))
