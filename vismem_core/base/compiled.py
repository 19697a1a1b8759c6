"""The language model's forward, compiled for passes whose shapes do not change."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig
from transformers.generation import CompileConfig

from vismem_core.errors import AttachError

from . import cache as kv
from .adapters import active
from .backbone import Backbone

FIXED = ("sdpa", "eager")
"""Kinds of attention that take a mask over room that is reserved, and not yet written."""


class Compiler:
    """Keeps what was compiled from one call to the next. Hooks on the language model stay outside of it."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._settings: CompileConfig | None = None
        self._compiled: Callable[..., Any] | None = None  # takes the place of the language model's forward

    def wanted(self, config: GenerationConfig, model_kwargs: dict[str, Any], asked: bool) -> CompileConfig | None:
        """The settings by which this call's steps are to be compiled, if at all.

        It is so where ``generate`` would do it (a static cache on a GPU, say), or it was ``asked`` for.

        Raises:
            AttachError: it was asked for, and the model's attention or code does not allow it.
        """
        model, decoder = self.backbone.model, self.backbone.decoder
        if not asked and not model._valid_auto_compile_criteria(model_kwargs, config):
            return None
        settings: CompileConfig = config.compile_config or model._default_compile_config()
        attention = decoder.config._attn_implementation  # type: ignore[union-attr]
        plain = kv.plain(DynamicCache(config=model.config))
        if getattr(decoder, "_can_compile_fullgraph", False) and attention in FIXED and plain:
            return settings
        if not asked:
            return None
        why = f"with {attention} attention" if attention not in FIXED else f"of a {type(decoder).__name__}"
        raise AttachError(f"the decode step {why} cannot be compiled: set memory.compile=false")

    @contextmanager
    def on(self, settings: CompileConfig) -> Iterator[None]:
        """Passes of the language model inside the context are compiled ones."""
        decoder: nn.Module = self.backbone.decoder
        if self._compiled is None or settings != self._settings:
            self._settings = settings
            self._compiled = _compiled(decoder.forward, settings)
        before = vars(decoder).get("forward")
        decoder.forward = self._compiled
        try:
            yield
        finally:
            del decoder.forward
            if before is not None:
                decoder.forward = before


def _compiled(forward: Callable[..., Any], settings: CompileConfig) -> Callable[..., Any]:
    """``forward``, compiled once for each set of adapters that are on; inside, nobody looks up which they are."""

    def under(adapters: str, *args: Any, **kwargs: Any) -> Any:
        if adapters != "":  # dynamo tells passes apart by arguments that are looked at alone
            return forward(*args, **kwargs)
        return forward(*args, **kwargs)

    compiled = torch.compile(under, **settings.to_dict())

    @functools.wraps(forward)
    def called(*args: Any, **kwargs: Any) -> Any:
        return compiled(active(), *args, **kwargs)

    return called
