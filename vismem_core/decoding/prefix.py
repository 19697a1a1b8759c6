"""The cache of prompts, read by passes that do not grow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

from vismem_core.base import cache as kv


class ReadOnly(DynamicCache):
    """A prefix that passes see and do not grow, so that a layer can be computed twice on it.

    Models read from an indexed layer how long it is, so such a one is grown: always anew, from the prefix.
    """

    def __init__(self, cache: DynamicCache) -> None:
        super().__init__()
        self.layers = kv.fork(cache).layers
        self._prefix = list(self.layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layers[layer_idx]
        if isinstance(layer, DynamicIndexedLayer):
            layer = self.layers[layer_idx] = kv.forked(self._prefix[layer_idx])
            return layer.update(key_states, value_states)
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        prefix: Any = self._prefix[layer_idx]
        return torch.cat([prefix.indexer_keys, indexer_key_states], dim=1)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        layer: Any = self.layers[layer_idx]
        return layer.read(conv_states, state_idx)  # type: ignore[no-any-return]

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return recurrent_states
