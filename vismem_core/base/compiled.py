"""Passes whose shapes do not change, compiled: the language model's, and memory's own through the vision encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.generation import CompileConfig

from vismem_core.errors import AttachError

from . import cache as kv
from .adapters import active, share
from .backbone import Backbone
from .tensor import mesh

FIXED = ("sdpa", "eager")
"""Kinds of attention that take a mask over room that is reserved, and not yet written."""


class Compiler:
    """Keeps what was compiled from one call to the next. Hooks on the language model stay outside of it.

    Attributes:
        room: the cache of the latest call. CUDA graphs know where they write: in other room each call would record
            them anew, which takes as long as several passes.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.room: list[Tensor] = []
        self._settings: CompileConfig | None = None
        self._compiled: Callable[..., Any] | None = None  # takes the place of the language model's forward
        self._carry: Callable[..., Any] | None = None  # and of the backbone's way through the encoder

    def wanted(self, config: GenerationConfig, model_kwargs: dict[str, Any], asked: bool) -> CompileConfig | None:
        """The settings by which this call's steps are to be compiled, if at all.

        It is so where ``generate`` would do it (a static cache on a GPU, say), or it was ``asked`` for.

        Raises:
            AttachError: it was asked for, and the model's attention or code does not allow it.
        """
        model, decoder = self.backbone.model, self.backbone.decoder
        if mesh(model) is not None:
            if asked:
                raise AttachError("a base that several processes hold is not compiled: set memory.compile=false")
            return None
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
        self._see(settings)
        if self._compiled is None:
            self._compiled = _compiled(decoder.forward, settings.to_dict())
        with _instead(decoder, "forward", self._compiled):
            yield

    @contextmanager
    def forming(self, settings: CompileConfig | None) -> Iterator[None]:
        """Inside the context extra tokens go through the vision encoder by a compiled pass, if there are settings.

        Images come in many sizes, so it is without CUDA graphs, of which each size would need one.
        """
        if settings is None:
            yield
            return
        self._see(settings)
        if self._carry is None:
            plain = {**settings.to_dict(), "fullgraph": False, "mode": None}
            self._carry = _compiled(self.backbone.carry, plain)
        with _instead(self.backbone, "carry", self._carry):
            yield

    def _see(self, settings: CompileConfig) -> None:
        if settings != self._settings:
            self._settings, self._compiled, self._carry = settings, None, None


@contextmanager
def _instead(owner: Any, name: str, own: Callable[..., Any]) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, own)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


def _compiled(forward: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """``forward``, compiled once for each set of adapters that are on; inside, nobody looks up which they are."""

    def under(adapters: str, *args: Any, **kwargs: Any) -> Any:
        if adapters != "":  # dynamo tells passes apart by arguments that are looked at alone
            return forward(*args, **kwargs)
        return forward(*args, **kwargs)

    # dynamo keeps a few passes for each piece of code, and this one is for those of one module alone
    under.__code__ = under.__code__.replace(co_name=forward.__qualname__.replace(".", "_"))
    compiled = torch.compile(under, **settings)

    @functools.wraps(forward)
    def called(*args: Any, **kwargs: Any) -> Any:
        share()
        return compiled(active(), *args, **kwargs)

    return called
