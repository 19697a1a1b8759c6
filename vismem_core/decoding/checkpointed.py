"""Layers computed again in the backward pass, in place of keeping their insides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from vismem_core.memory.memory import Memory

from .grouped import grouped


@contextmanager
def checkpointed(decoder: torch.nn.Module, memory: Memory) -> Iterator[None]:
    """Recompute the policy's layers in the backward pass. transformers' own switch takes the cache away from them."""
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]

    @contextmanager
    def again_alike() -> Iterator[None]:
        packs = memory.backbone.packs
        with memory.acting(), uncheckpointed(decoder), grouped(decoder) if packs else nullcontext():
            yield

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), again_alike()

    for layer in layers:
        plain = layer.forward

        def again(*args: Any, _plain: Any = plain, **kwargs: Any) -> Any:
            return checkpoint(_plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        vars(layer)["forward"] = again
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def checkpointed_layers(model: torch.nn.Module) -> list[Any]:
    """The modules in which transformers' own checkpointing is on."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]


@contextmanager
def uncheckpointed(model: torch.nn.Module) -> Iterator[None]:
    """Without transformers' own checkpointing, which takes the cache away from layers."""
    layers = checkpointed_layers(model)
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
