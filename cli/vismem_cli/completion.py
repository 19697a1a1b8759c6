"""What the shell completes beside options: names that are data. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from vismem_core.plugins import registry


def backbones(incomplete: str) -> list[str]:
    """Families of models, and names of embedded models."""
    return _beginning(incomplete, registry("backbones").names(), registry("bases").names())


def datasets(incomplete: str) -> list[str]:
    """Registered data sets; the shell itself adds files."""
    return _beginning(incomplete, registry("datasets").names())


def experiments(incomplete: str) -> list[str]:
    return _beginning(incomplete, registry("experiments").names(), ("all", "list", "show"))


def metrics(incomplete: str) -> list[str]:
    return _beginning(incomplete, registry("metrics").names())


def triggers(incomplete: str) -> list[str]:
    return _beginning(incomplete, registry("triggers").names())


def settings(incomplete: str) -> list[str]:
    """Keys of ``--set``."""
    from vismem_core.config import Config

    return _beginning(incomplete, tuple(_keys(Config())))


def _keys(section: Any, above: str = "") -> Iterator[str]:
    for own in fields(section):
        value = getattr(section, own.name)
        if is_dataclass(value):
            yield from _keys(value, f"{above}{own.name}.")
        else:
            yield f"{above}{own.name}="


def _beginning(incomplete: str, *names: tuple[str, ...]) -> list[str]:
    return [name for name in dict.fromkeys(sum(names, ())) if name.startswith(incomplete)]
