"""Caches as transformers keep them: what memory can work on, rows of them, and what they once held.

Rows are aligned to the right and padded on the left, as in a left-padded prompt. Layers hold keys and values of all
tokens or of a window, or else, where attention is linear or a convolution stands for it, one state per row
(:class:`StateLayer`). Some hold nothing, since they read another layer's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache as remembered
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation.utils import ALL_CACHE_NAMES

from vismem_core.errors import AttachError

KINDS = (DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer, DummyLayer)
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
        AttachError: for quantised and offloaded caches, and layers that hold more than keys and values, or states.
    """
    if type(cache) is StaticCache and not cache.offloading:
        return _filled(cache, config)
    if not isinstance(cache, DynamicCache):
        raise AttachError(
            f"memory needs a dynamic KV cache, not {type(cache).__name__}: "
            "call generate(use_cache=True) without cache_implementation"
        )
    for layer in cache.layers:
        if type(layer) not in KINDS:  # subclasses hold more than keys, values and states
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
    queue = iter(states(static))
    cache.layers = [next(queue) if stateful(own) else own for own in cache.layers]
    return cache


class StateLayer(LinearAttentionLayer):
    """States of convolutions and linear attention, one per row whatever its length.

    A pass makes new ones instead of changing those it found, which gradients and branches may still need.
    """

    @classmethod
    def of(cls, layer: Any, rows: Sequence[int] | None = None) -> StateLayer:
        """Copies of the states of some rows, in that order; all of them by default."""
        other = cls.__new__(cls)
        vars(other).update(vars(layer))
        for name, own in vars(layer).items():
            if isinstance(own, dict):
                setattr(other, name, {at: _copied(state, rows) for at, state in own.items()})
        return other

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        whole, kept = self.read(conv_states, state_idx), self.conv_states[state_idx]
        assert kept is not None
        self.conv_states[state_idx] = whole[..., -kept.shape[-1] :]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        kept = self.recurrent_states[state_idx]
        assert kept is not None
        self.recurrent_states[state_idx] = recurrent_states.to(kept.dtype)
        return recurrent_states

    def read(self, conv_states: Tensor, state_idx: int = 0) -> Tensor:
        """What a convolution over new inputs sees, (.., kept + T)."""
        kept = self.conv_states[state_idx]
        assert kept is not None
        return torch.cat([kept, conv_states], dim=-1)

    def put(self, other: StateLayer, rows: Sequence[int]) -> None:
        """Take over the states of ``rows`` from a layer that has these alone."""
        for name in ("conv_states", "recurrent_states"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for at, state in mine.items():
                if state is not None:
                    mine[at] = state.index_copy(0, torch.as_tensor(rows, device=state.device), theirs[at].to(state))


def _copied(state: Any, rows: Sequence[int] | None) -> Any:
    if not isinstance(state, Tensor):
        return state
    return state.clone() if rows is None else state[torch.as_tensor(rows, device=state.device)]


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that can be appended to while ``cache`` stays as it is; of tensors only states are copied."""
    branch = copy.copy(cache)
    branch.layers = [StateLayer.of(own) if stateful(own) else copy.copy(own) for own in cache.layers]
    return branch


def select(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """The given rows alone, copied; a plain fork where they are all rows in order."""
    branch = fork(cache)
    if list(rows) != list(range(layers(branch)[0].keys.shape[0])):
        for layer in layers(branch):
            index = torch.as_tensor(rows, device=layer.keys.device)
            layer.keys, layer.values = layer.keys[index], layer.values[index]
        branch.layers = [StateLayer.of(own, rows) if stateful(own) else own for own in branch.layers]
    return branch


def upto(
    cache: DynamicCache,
    mask: Tensor,
    rows: Sequence[int],
    stops: Sequence[int],
    then: Mapping[int, Sequence[Any]] | None = None,
) -> tuple[DynamicCache, Tensor]:
    """The first ``stops`` columns of some rows, right-aligned again, and their mask: the cache as it once was.

    Args:
        mask: (R, W) over ``cache``, one row for each of ``rows``.
        rows: of the batch; one may be named several times.
        stops: columns that each of them keeps.
        then: the layers that forget (:func:`forgetful`) as they were at each of the stops, where they did since.
    """
    width, index = max(stops), torch.as_tensor(rows, device=mask.device)
    shift = torch.as_tensor([width - stop for stop in stops], device=mask.device)[:, None]
    columns = torch.arange(width, device=mask.device) - shift  # (R, width), negative left of a shorter row
    branch, at = fork(cache), 0
    held: list[Any] = branch.layers
    for number, layer in enumerate(held):
        if then is not None and forgets(layer):
            once = [then[stop][at] for stop in stops]
            at += 1
            if stateful(layer):
                held[number] = _once(once, rows)
                continue
            layer.keys, layer.values = (
                _aligned([getattr(own, name)[row] for own, row in zip(once, rows, strict=True)])
                for name in ("keys", "values")
            )
        elif not isinstance(layer, DummyLayer):
            own, places = index.to(layer.keys.device)[:, None], columns.clamp(min=0).to(layer.keys.device)
            layer.keys, layer.values = (_columns(whole, own, places) for whole in (layer.keys, layer.values))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = width
    return branch, mask.gather(1, columns.clamp(min=0)) * (columns >= 0)


def _aligned(rows: Sequence[Tensor]) -> Tensor:
    """Keys or values (heads, W, w) of rows -> (R, heads, W', w), aligned to the right."""
    width = max(own.shape[1] for own in rows)
    return torch.stack([F.pad(own, (0, 0, width - own.shape[1], 0)) for own in rows])


def _once(layers: Sequence[StateLayer], rows: Sequence[int]) -> StateLayer:
    """The states that each row had in its own one of the layers."""
    result = StateLayer.of(layers[0], rows)
    for name in ("conv_states", "recurrent_states"):
        for at, state in getattr(result, name).items():
            if state is not None:
                told = [getattr(layer, name)[at][row] for layer, row in zip(layers, rows, strict=True)]
                getattr(result, name)[at] = torch.stack(told)
    return result


def forgets(layer: Any) -> bool:
    """Whether what a layer holds does not tell what it held earlier: it has a window or states."""
    return stateful(layer) or isinstance(layer, DynamicSlidingWindowLayer)


def forgetful(cache: DynamicCache) -> list[Any]:
    """The layers that forget, as they are now and stay."""
    return [layer for layer in fork(cache).layers if forgets(layer)]


def whole(cache: DynamicCache) -> bool:
    """Whether every layer holds all tokens: none has a sliding window, or a state instead."""
    return all(type(layer) in (DynamicLayer, DummyLayer) for layer in cache.layers)


def stateful(layer: Any) -> bool:
    """Whether a layer holds states."""
    return isinstance(layer, LinearAttentionLayer)


def states(cache: Cache) -> list[Any]:
    """The layers that hold states."""
    return [layer for layer in cache.layers if stateful(layer)]


def _columns(states: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Keys or values (B, heads, W, w) -> (R, heads, W', w) with other rows (R, 1) and columns (R, W')."""
    return states.transpose(1, 2)[rows, columns].transpose(1, 2)


def layers(cache: Cache) -> list[Any]:
    """The layers that hold keys and values."""
    return [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
