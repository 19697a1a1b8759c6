"""Latent vision memory (VisMem, arXiv 2511.11007) for any vision-language model.

import vismem_core as vismem

memory = vismem.attach(model, processor)
model.generate(**inputs, max_new_tokens=256)
memory.trace
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

API_VERSION = 4
"""Of the interface to plugins; a module that says ``VISMEM_API = 4`` was written for this one. It grows when a plugin
that was right before may be wrong now; what is public is in ``docs/api.txt``."""

if TYPE_CHECKING:
    from .answers.reward import Reward, Written
    from .base.backbone import Backbone
    from .config import Config, MemoryConfig
    from .decoding.attach import attach
    from .decoding.injection import InjectionHook
    from .errors import VismemError
    from .memory.former import MemoryContext, MemoryFormer, RidingFormer
    from .memory.memory import Memory
    from .memory.query import QueryBuilder
    from .memory.tokens import MemoryTokens
    from .memory.trace import Invocation, Trace
    from .memory.trigger import Trigger
    from .training.run import train
    from .training.trainable import collate, trainable

_HOMES = {
    "answers.reward": ("Reward", "Written"),
    "base.backbone": ("Backbone",),
    "config": ("Config", "MemoryConfig"),
    "decoding.attach": ("attach",),
    "decoding.injection": ("InjectionHook",),
    "errors": ("VismemError",),
    "memory.former": ("MemoryContext", "MemoryFormer", "RidingFormer"),
    "memory.memory": ("Memory",),
    "memory.query": ("QueryBuilder",),
    "memory.tokens": ("MemoryTokens",),
    "memory.trace": ("Invocation", "Trace"),
    "memory.trigger": ("Trigger",),
    "training.run": ("train",),
    "training.trainable": ("collate", "trainable"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "API_VERSION",
    "Backbone",
    "Config",
    "InjectionHook",
    "Invocation",
    "Memory",
    "MemoryConfig",
    "MemoryContext",
    "MemoryFormer",
    "MemoryTokens",
    "QueryBuilder",
    "Reward",
    "RidingFormer",
    "Trace",
    "Trigger",
    "VismemError",
    "Written",
    "attach",
    "collate",
    "train",
    "trainable",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import on first use: ``vismem --version`` must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
