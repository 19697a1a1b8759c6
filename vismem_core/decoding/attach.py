"""Attaching memory to a live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from vismem_core.base.backbone import Backbone
from vismem_core.base.families import find_backbone
from vismem_core.config import MemoryConfig
from vismem_core.errors import AttachError
from vismem_core.files import checkpoint
from vismem_core.memory.memory import Memory

from .injection import ATTRIBUTE, InjectionHook


def attach(
    model: Any,
    processor: Any,
    source: str | Path | None = None,
    *,
    config: MemoryConfig | None = None,
    backbone: str | None = None,
    seed: int = 0,
    any_base: bool = False,
    revision: str | None = None,
) -> Memory:
    """Give a model latent vision memory: its ordinary ``generate`` invokes it from now on.

    Args:
        model: a loaded vision-language model, also inside a ``PeftModel`` or of ``torch.compile``; its weights are
            not written. Adapters of its own act when memory is formed, as they do elsewhere.
        processor: its processor.
        source: folder or hub id (``user/name``, ``user/name@revision``) of a trained memory, or ``shipped:NAME`` for
            the one that comes with an embedded model; without it memory is untrained.
        config: its settings; by default those that a trained memory was saved with, or else :class:`MemoryConfig`'s.
        backbone: registered name; found from the model if not given.
        seed: of the initial values.
        any_base: load a memory that was trained on other weights of the same shape.
        revision: branch, tag or commit of a hub id.

    Raises:
        AttachError: if these are no model and processor, no backbone knows the model, memory is attached already, or
            weights are offloaded.
        CheckpointError: if ``source`` does not fit the model.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise AttachError(f"attach(model, processor): the model is one of transformers, no {type(model).__name__}")
    if not hasattr(getattr(processor, "tokenizer", None), "get_vocab"):
        raise AttachError(
            f"attach(model, processor): the processor has a tokenizer, {type(processor).__name__} has none; it is what "
            "AutoProcessor.from_pretrained gives"
        )
    model = _inside(model)
    if vars(model).get(ATTRIBUTE) is not None:
        raise AttachError("this model has memory attached already: memory.detach() first")
    away = next((name for name, own in model.named_parameters() if own.is_meta), None)
    if away is not None:
        raise AttachError(f"{away} is offloaded: memory needs all weights on devices; load fewer bits or use more GPUs")
    family = find_backbone(model, backbone)
    adapter = family(model, processor)
    stored = checkpoint.read(source, adapter, any_base=any_base, revision=revision) if source is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        memory = put_on(adapter, config or (stored.config if stored else MemoryConfig()))
    if stored:
        try:
            stored.fill(memory.trained())
        except BaseException:
            memory.detach()
            raise
    return memory


def put_on(backbone: Backbone, config: MemoryConfig) -> Memory:
    """Untrained memory on the model of a backbone; its initial values come from torch's generator.

    Raises:
        AttachError: what does not fit; the model is as it was.
    """
    memory = Memory(backbone, config)
    try:
        memory.hook = InjectionHook(memory)
    except BaseException:
        memory.detach()
        raise
    return memory


def _inside(model: Any) -> Any:
    """The model of transformers inside what peft and ``torch.compile`` put around it."""
    while True:
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        elif isinstance(inner := vars(model).get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model
