"""Caches as transformers keep them: what memory can work on, rows of them, and what they once held.

Rows are aligned to the right and padded on the left, as in a left-padded prompt. Layers hold keys and values of all
tokens or of a window, some of them besides what an indexer reads to choose among the tokens (:data:`COLUMNS`). Where
attention is linear or a convolution stands for it, they hold one state per row (:class:`StateLayer`), and some hold
both. Some hold nothing, since they read another layer's.
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
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation.utils import ALL_CACHE_NAMES

from vismem_core.errors import AttachError

KINDS = {
    DynamicLayer: "full",
    DynamicSlidingWindowLayer: "window",
    LinearAttentionLayer: "state",
    DynamicIndexedLayer: "indexed",
    LinearAttentionAndFullAttentionLayer: "state and full",
    LinearAttentionAndSlidingWindowAttentionLayer: "state and window",
    DummyLayer: "shared or none",
}
"""The layers that memory can work on, and what they are called."""
COUNTED = (
    DynamicIndexedLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
"""Layers whose models tell by the columns of tokens how far these are apart, or which stand together."""
STATIC = (
    StaticLayer,
    StaticSlidingWindowLayer,
    StaticIndexedLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
)
"""The same in static caches, where they hold tokens."""
STATES = tuple(name for name, own in vars(LinearAttentionLayer()).items() if isinstance(own, dict))
"""What layers say of their states, each by the state's number."""
Form = Callable[[Tensor], Tensor]
COLUMNS: dict[str, tuple[Form, Form]] = {
    **dict.fromkeys(("keys", "values"), (lambda own: own, lambda own: own)),
    "indexer_keys": (lambda own: own[:, None], lambda own: own[:, 0]),  # (B, W, w)
    "indexer_position_ids": (
        lambda own: own.movedim(0, -1)[:, None],
        lambda own: own[:, 0].movedim(-1, 0),
    ),  # (w, B, W)
}
"""What layers hold of each token, by the names of their attributes: ways to and from the form (B, heads, W, w)."""
NAME: str = ALL_CACHE_NAMES[0]
"""What ``generate`` and the outputs of models call their cache: ``past_key_values`` before transformers 5.24."""


def given(module: nn.Module, cache: DynamicCache | None) -> dict[str, DynamicCache | None]:
    """The keyword argument by which a model takes its cache; code that came with a checkpoint keeps the older name."""
    return {_name(type(module).forward): cache}


def fresh(model: Any) -> dict[str, DynamicCache | None]:
    """The keyword argument by which a model gets an empty cache, as ``generate`` gives it; some make none."""
    return given(model, DynamicCache(config=model.config.get_text_config(decoder=True)))


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
    kinds = {type(own): layer for layer, own in zip(cache.layers, static.layers, strict=False)}
    for own in static.layers[len(cache.layers) :]:  # of layers that are passed several times
        cache.layers.append(copy.copy(kinds[type(own)]))
    for layer, own in zip(layers(cache), layers(static), strict=True):
        if type(own) not in STATIC:
            raise AttachError(f"memory cannot grow cache layers of type {type(own).__name__} row by row")
        length = int(own.get_seq_length())
        tokens = {name: filled[:, :, :length] for name, filled in held(own).items()}
        if "keys" in tokens:
            layer.update(tokens.pop("keys"), tokens.pop("values"))
        if isinstance(layer, DynamicIndexedLayer):
            hold(layer, tokens)
            layer.is_indexer_initialized = "indexer_keys" in tokens
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    for layer, own in zip(states(cache), states(static), strict=True):
        vars(layer).update({name: getattr(own, name) for name in STATES})
    return cache


def held(layer: Any) -> dict[str, Tensor]:
    """What a layer holds of each token, (B, heads, W, w), by name."""
    found = {name: (getattr(layer, name, None), to) for name, (to, _) in COLUMNS.items()}
    return {name: to(own) for name, (own, to) in found.items() if own is not None}


def hold(layer: Any, tokens: Mapping[str, Tensor]) -> None:
    """Let a layer hold other tokens, as :func:`held` gives them."""
    for name, own in tokens.items():
        setattr(layer, name, COLUMNS[name][1](own))


def taken(name: str, own: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(B, heads, W, w) -> (R, heads, W', w) with other rows (R, 1) and columns (R, W'), in front of 0 of none.

    Attention has a mask over those. An indexer may have none, and finds zeros.
    """
    rows, columns = rows.to(own.device), columns.to(own.device)
    found = own.transpose(1, 2)[rows, columns.clamp(min=0)].transpose(1, 2)
    return found if name in ("keys", "values") else found.masked_fill((columns < 0)[:, None, :, None], 0)


class StateLayer(LinearAttentionLayer):
    """States of convolutions and linear attention, one per row whatever its length.

    A pass makes new ones instead of changing those it found, which gradients and branches may still need.
    """

    @classmethod
    def of(cls, layer: Any, rows: Sequence[int] | None = None) -> StateLayer:
        """Copies of the states of some rows, in that order; all of them by default.

        A layer that holds tokens too does so still, those of all rows.
        """
        kind: Any = next(own for kind, own in _STATES.items() if isinstance(layer, kind))
        other: StateLayer = kind.__new__(kind)
        vars(other).update(vars(layer))
        other.follow(layer, rows)
        return other

    def follow(self, layer: Any, rows: Sequence[int] | None = None) -> None:
        """Have copies of a layer's states of some rows, in that order."""
        for name in STATES:
            setattr(self, name, {at: _copied(state, rows) for at, state in getattr(layer, name).items()})

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

    def take_over(self, other: StateLayer, rows: Sequence[int]) -> None:
        """Take over the states of ``rows`` from a layer that has these alone."""
        for name in ("conv_states", "recurrent_states"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for at, state in mine.items():
                if state is not None:
                    mine[at] = state.index_copy(0, torch.as_tensor(rows, device=state.device), theirs[at].to(state))


class _StateAndFullLayer(StateLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    pass


class _StateAndWindowLayer(StateLayer, LinearAttentionAndSlidingWindowAttentionLayer):  # type: ignore[misc, override]
    pass


_STATES = {
    LinearAttentionAndFullAttentionLayer: _StateAndFullLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: _StateAndWindowLayer,
    LinearAttentionLayer: StateLayer,
}


def _copied(state: Any, rows: Sequence[int] | None) -> Any:
    if not isinstance(state, Tensor):
        return state
    return state.clone() if rows is None else state[torch.as_tensor(rows, device=state.device)]


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that can be appended to while ``cache`` stays as it is; of tensors only states are copied."""
    branch = copy.copy(cache)
    branch.layers = [forked(own) for own in cache.layers]
    return branch


def forked(layer: Any, rows: Sequence[int] | None = None) -> Any:
    """The same for one layer, with the states of some rows."""
    return StateLayer.of(layer, rows) if stateful(layer) else copy.copy(layer)


def select(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """The given rows alone, copied; a plain fork where they are all rows in order."""
    if list(rows) == list(range(layers(cache)[0].keys.shape[0])):
        return fork(cache)
    branch = copy.copy(cache)
    branch.layers = [forked(own, rows) for own in cache.layers]
    for layer in layers(branch):
        hold(layer, {name: own[torch.as_tensor(rows, device=own.device)] for name, own in held(layer).items()})
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
    own_layers: list[Any] = branch.layers
    for number, layer in enumerate(own_layers):
        once: list[Any] = []
        if then is not None and forgets(layer):
            once = [then[stop][at] for stop in stops]
            at += 1
        if once and stateful(layer):
            layer = own_layers[number] = _once(layer, once, rows)
        if once and isinstance(layer, DynamicSlidingWindowLayer):
            told = [held(own) for own in once]
            parts = {name: [own[name][row] for own, row in zip(told, rows, strict=True)] for name in told[0]}
            hold(layer, {name: _aligned(own) for name, own in parts.items()})
        else:
            hold(layer, {name: taken(name, own, index[:, None], columns) for name, own in held(layer).items()})
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = width
    return branch, mask.gather(1, columns.clamp(min=0)) * (columns >= 0)


def _aligned(rows: Sequence[Tensor]) -> Tensor:
    """Keys or values (heads, W, w) of rows -> (R, heads, W', w), aligned to the right."""
    width = max(own.shape[1] for own in rows)
    return torch.stack([F.pad(own, (0, 0, width - own.shape[1], 0)) for own in rows])


def _once(layer: StateLayer, layers: Sequence[StateLayer], rows: Sequence[int]) -> StateLayer:
    """``layer`` with the states that each row had in its own one of the layers."""
    result = StateLayer.of(layer, rows)
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
    """The layers that forget, as they are now and stay, with what they will have forgotten."""
    found = [forked(layer) for layer in cache.layers if forgets(layer)]
    for layer in found:
        if type(layer) is _StateAndFullLayer:
            layer.keys = layer.values = None
    return found


def whole(cache: DynamicCache) -> bool:
    """Whether every layer holds all tokens: none has a sliding window, or a state."""
    return all(type(layer) in (DynamicLayer, DynamicIndexedLayer, DummyLayer) for layer in cache.layers)


def counted(cache: Cache) -> bool:
    """Whether a model looks at where the columns of its tokens stand (:data:`COUNTED`)."""
    return any(isinstance(layer, COUNTED) for layer in cache.layers)


def plain(cache: Cache) -> bool:
    """Whether layers hold keys and values alone, of all tokens or of a window."""
    return not states(cache) and not counted(cache)


def stateful(layer: Any) -> bool:
    """Whether a layer holds states."""
    return isinstance(layer, LinearAttentionLayer)


def states(cache: Cache) -> list[Any]:
    """The layers that hold states."""
    return [layer for layer in cache.layers if stateful(layer)]


def layers(cache: Cache) -> list[Any]:
    """The layers that hold tokens."""
    return [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
