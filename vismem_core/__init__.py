"""Latent vision memory (VisMem, arXiv 2511.11007) for any vision-language model.

import vismem_core as vismem

memory = vismem.attach(model, processor)
model.generate(**inputs, max_new_tokens=256)
memory.trace
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

API_VERSION = 1
"""Of the interface to plugins; a module that says ``VISMEM_API = 1`` was written for this one. It grows when a plugin
that was right before may be wrong now; what is public is in ``docs/api.txt``."""

if TYPE_CHECKING:
    from .backbone import Backbone
    from .config import Config, MemoryConfig
    from .errors import VismemError
    from .former import MemoryContext, MemoryFormer, RidingFormer
    from .injection import InjectionHook
    from .memory import Memory, attach
    from .query import QueryBuilder
    from .reward import Reward, Written
    from .tokens import MemoryTokens
    from .trace import Invocation, Trace
    from .trigger import Trigger

_HOMES = {
    "backbone": ("Backbone",),
    "config": ("Config", "MemoryConfig"),
    "errors": ("VismemError",),
    "former": ("MemoryContext", "MemoryFormer", "RidingFormer"),
    "injection": ("InjectionHook",),
    "memory": ("Memory", "attach"),
    "query": ("QueryBuilder",),
    "reward": ("Reward", "Written"),
    "tokens": ("MemoryTokens",),
    "trace": ("Invocation", "Trace"),
    "trigger": ("Trigger",),
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
]


def __getattr__(name: str) -> Any:
    """Import on first use: ``vismem --version`` must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)
