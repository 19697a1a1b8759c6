"""Embedded models: what ``vismem`` uses when no model is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vismem_core import plugins
from vismem_core.errors import PluginError


@dataclass(frozen=True)
class Base:
    """A model that ships with a package, and what can be shown with it."""

    model: Path
    """A directory in the published layout of its family."""
    memory: Path | None = None
    """A memory trained on it."""
    samples: Path | None = None
    """A data file with questions about images to show it with; the first is asked where none is given."""
    dataset: str | None = None
    """Registered name of the data it was made for."""
    settings: Path | None = None
    """A configuration file with training settings that suit it; ``--config`` and ``--set`` go over it."""
    backbone: str = ""
    """The backbone that knows it, where it is not registered under that name."""


def embedded(backbone: str | None = None) -> tuple[str, Base]:
    """The name and the embedded model of a backbone, by default of the first one that has any.

    Raises:
        PluginError: there is none.
    """
    registry = plugins.registry("bases")
    names = registry.names()
    if backbone is None and not names:
        raise PluginError("no embedded model is registered; name a model with --model")
    if backbone is not None and backbone not in names:
        plugins.registry("backbones").entry(backbone)
        raise PluginError(f"the backbone {backbone!r} has no embedded model; name a model with --model")
    name = backbone or names[0]
    base = registry.get(name)()
    if not isinstance(base, Base):
        raise PluginError(f"the embedded model of {name!r} is no Base but {type(base).__name__}")
    return name, base
