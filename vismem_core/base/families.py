"""Which registered backbone knows a model."""

from __future__ import annotations

from typing import Any

from vismem_core.errors import AttachError
from vismem_core.plugins import registry

from .backbone import Backbone


def find_backbone(model: Any, name: str | None = None) -> type[Backbone]:
    """The registered backbone of that name, or the first that knows ``model``, fallbacks last."""
    backbones = registry("backbones")
    order = sorted(backbones.entries(), key=lambda entry: bool(entry.facts.get("fallback")))
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    for candidate in [name] if name else [entry.name for entry in order]:
        family: type[Backbone] = backbones.get(candidate)
        if family.matches(model):
            return family
    raise AttachError(
        f"backbone {name!r} does not know model type {model_type!r}"
        if name
        else f"no backbone knows model type {model_type!r}; known: {', '.join(backbones.names())}"
    )
