"""KV caches as transformers keep them: what memory can work on, rows of them, and what they once held.

Rows are aligned to the right and padded on the left, as in a left-padded prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache as remembered
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.generation.utils import ALL_CACHE_NAMES

from vismem_core.errors import AttachError

NAME: str = ALL_CACHE_NAMES[0]
"""What ``generate`` and the outputs of models call their cache: ``past_key_values`` before transformers 5.24."""


def given(module: nn.Module, cache: DynamicCache | None) -> dict[str, DynamicCache | None]:
    """The keyword argument by which a model takes its cache; code that came with a checkpoint keeps the older name."""
    return {_name(type(module).forward): cache}


@remembered
def _name(forward: Callable[..., Any]) -> str:
    older = "past_key_values"
    return older if older in signature(forward).parameters else NAME


def check(cache: object, config: Any = None) -> DynamicCache:
    """Return ``cache`` if its layers can be forked and grown row by row; of a static one what it was filled with.

    Args:
        config: of the language model, which knows its layers' windows.

    Raises:
        AttachError: for quantised, offloaded and linear-attention caches.
    """
    if type(cache) is StaticCache and not cache.offloading:
        return _filled(cache, config)
    if not isinstance(cache, DynamicCache):
        raise AttachError(
            f"memory needs a dynamic KV cache, not {type(cache).__name__}: "
            "call generate(use_cache=True) without cache_implementation"
        )
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):  # subclasses hold more than keys and values
            raise AttachError(f"memory cannot grow cache layers of type {type(layer).__name__} row by row")
    if getattr(cache, "offloading", False):
        raise AttachError("memory cannot grow an offloaded cache: call generate without cache_implementation")
    return cache


def _filled(static: StaticCache, config: Any) -> DynamicCache:
    """What a static cache holds after a prompt; nothing is copied."""
    cache = DynamicCache(config=config)
    for layer, own in zip(layers(cache), layers(static), strict=True):
        if type(own) not in (StaticLayer, StaticSlidingWindowLayer):
            raise AttachError(f"memory cannot grow cache layers of type {type(own).__name__} row by row")
        length = int(own.get_seq_length())
        layer.update(*(states[:, :, :length] for states in (own.keys, own.values)))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    return cache


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that can be appended to while ``cache`` stays as it is; no tensor is copied."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


def select(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """The given rows alone, copied; a plain fork where they are all rows in order."""
    branch = fork(cache)
    if list(rows) != list(range(layers(branch)[0].keys.shape[0])):
        for layer in layers(branch):
            index = torch.as_tensor(rows, device=layer.keys.device)
            layer.keys, layer.values = layer.keys[index], layer.values[index]
    return branch


def upto(cache: DynamicCache, mask: Tensor, rows: Sequence[int], stops: Sequence[int]) -> tuple[DynamicCache, Tensor]:
    """The first ``stops`` columns of some rows, right-aligned again, and their mask: the cache as it once was.

    Args:
        mask: (R, W) over ``cache``, one row for each of ``rows``.
        rows: of the batch; one may be named several times.
        stops: columns that each of them keeps.
    """
    width, index = max(stops), torch.as_tensor(rows, device=mask.device)
    shift = torch.as_tensor([width - stop for stop in stops], device=mask.device)[:, None]
    columns = torch.arange(width, device=mask.device) - shift  # (R, width), negative left of a shorter row
    branch = fork(cache)
    for layer in layers(branch):
        own, places = index.to(layer.keys.device)[:, None], columns.clamp(min=0).to(layer.keys.device)
        layer.keys, layer.values = (_columns(whole, own, places) for whole in (layer.keys, layer.values))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = width
    return branch, mask.gather(1, columns.clamp(min=0)) * (columns >= 0)


def whole(cache: DynamicCache) -> bool:
    """Whether every layer holds all tokens: none has a sliding window."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _columns(states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Keys or values (B, heads, W, w) -> (R, heads, W', w) with other rows (R, 1) and columns (R, W')."""
    return states.transpose(1, 2)[rows, columns].transpose(1, 2)


def layers(cache: Cache) -> list[Any]:
    """The layers of a cache, each with keys and values."""
    # What :func:`check` let through has keys and values in every layer; its type says less.
    return list(cache.layers)
