"""Row surgery on a KV cache: rows of one batch may grow at different times.

Every row is aligned to the right and padded on the left, as in a left-padded prompt. So a row that takes in N
latents while its neighbours take in none moves to the left by N, distances between real tokens stay what they are
(which sliding-window layers rely on), and a 2-D mask still describes the batch. Padding columns are added only
when a row has none left to grow into: neighbours that invoke later use up the padding that the first one made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache as remembered
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
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


def check(cache: object) -> DynamicCache:
    """Return ``cache`` if its layers can be forked and grown row by row.

    Raises:
        AttachError: for static, quantised, offloaded and linear-attention caches.
    """
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


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that can be appended to while ``cache`` stays as it is; no tensor is copied."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    return branch


def select(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """The given rows alone, copied; a plain fork where they are all rows in order."""
    branch = fork(cache)
    if list(rows) != list(range(_layers(branch)[0].keys.shape[0])):
        for layer in _layers(branch):
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
    for layer in _layers(branch):
        own, places = index.to(layer.keys.device)[:, None], columns.clamp(min=0).to(layer.keys.device)
        layer.keys, layer.values = (_columns(whole, own, places) for whole in (layer.keys, layer.values))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = width
    return branch, mask.gather(1, columns.clamp(min=0)) * (columns >= 0)


def whole(cache: DynamicCache) -> bool:
    """Whether every layer holds all tokens: none has a sliding window."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def compact(cache: DynamicCache, mask: Tensor, columns: int) -> Tensor:
    """Take so many masked-out columns out of every row, wherever they are, in place; what is left is right-aligned.

    Rows that have more of them keep the rest as left padding.

    Args:
        mask: (B, W) over ``cache``, whose layers hold all tokens (:func:`whole`).

    Returns:
        The mask (B, W - columns).
    """
    order = mask.bool().long().argsort(dim=-1, stable=True)[:, columns:]
    for layer in _layers(cache):
        places = order.to(layer.keys.device)
        rows = torch.arange(len(places), device=places.device)[:, None]
        layer.keys, layer.values = (_columns(own, rows, places) for own in (layer.keys, layer.values))
    return mask.gather(1, order)


def graft(cache: DynamicCache, grown: DynamicCache, rows: Sequence[int], padding: int) -> None:
    """Put rows that were continued apart back into ``cache``, in place.

    Args:
        grown: the cache of ``rows``, longer by the tokens they took in.
        padding: columns by which the whole batch grows; the rows' own left padding takes the rest.
    """
    for layer, source in zip(_layers(cache), _layers(grown), strict=True):
        index = torch.as_tensor(rows, device=layer.keys.device)
        width = min(layer.keys.shape[-2] + padding, source.keys.shape[-2])
        for name in ("keys", "values"):
            whole, part = getattr(layer, name), getattr(source, name)
            if padding:
                filler = whole.new_zeros(*whole.shape[:2], padding, whole.shape[-1])
                whole = torch.cat([filler, whole], dim=-2)[..., -width:, :]
            whole[index] = part[..., -width:, :]
            setattr(layer, name, whole)
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length += padding


def graft_mask(mask: Tensor, rows: Sequence[int], length: int, padding: int) -> Tensor:
    """The attention mask (B, W + padding) after ``rows`` took in ``length`` tokens each."""
    index = torch.as_tensor(rows, device=mask.device)
    grown = torch.cat([mask[index], mask.new_ones(len(rows), length)], dim=-1)
    mask = torch.cat([mask.new_zeros(mask.shape[0], padding), mask], dim=-1)
    mask[index] = grown[:, -mask.shape[-1] :]
    return mask


def _columns(states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Keys or values (B, heads, W, w) -> (R, heads, W', w) with other rows (R, 1) and columns (R, W')."""
    return states.transpose(1, 2)[rows, columns].transpose(1, 2)


def _layers(cache: DynamicCache) -> list[Any]:
    # What :func:`check` let through has keys and values in every layer; its type says less.
    return list(cache.layers)
