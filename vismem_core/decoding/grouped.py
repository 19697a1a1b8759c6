"""Attention of several tokens over a cache, in which heads that share a key are not given copies of it.

transformers' own repeats keys and values for every query head under a mask, and a pass with gradients keeps the copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "vismem_grouped"


@contextmanager
def grouped(decoder: nn.Module) -> Iterator[None]:
    """The language model's ``sdpa`` attention is grouped inside the context; other kinds stay as they are."""
    config: Any = decoder.config
    if (before := config._attn_implementation) != "sdpa":
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    shared = query.shape[1] // key.shape[1]
    if shared == 1 or attention_mask is None:
        plain: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **rest)
        return plain
    # To torch, queries that share a key are tokens of one sequence.
    packed = rearrange(query, "r (h g) t w -> r h (g t) w", g=shared)
    mask = _repeated(attention_mask, shared, query.dtype)
    mixed = F.scaled_dot_product_attention(
        packed, key, value, attn_mask=mask, dropout_p=rest.get("dropout", 0.0), scale=rest.get("scaling")
    )
    return rearrange(mixed, "r h (g t) w -> r t (h g) w", g=shared), None


def _repeated(mask: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """A mask (R, 1, T, K) for all queries that share a key, made once for all layers: it is kept with the mask."""
    made: Tensor | None = getattr(mask, "vismem_repeated", None)
    if made is None:
        added = (
            torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask
        )
        made = added.repeat(1, 1, shared, 1)
        mask.vismem_repeated = made  # type: ignore[attr-defined]
    return made


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
