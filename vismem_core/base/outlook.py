"""What memory can do with a model, as far as its configuration tells: no weights are needed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from transformers import DynamicCache

from vismem_core.errors import AttachError
from vismem_core.plugins import registry

from . import cache as kv
from .loading import backbone_of

CHANGING = ("dynamic", "longrope")
"""Ropes whose frequencies a model changes while it is called, by the lengths that it meets."""


@dataclass(frozen=True)
class Outlook:
    """What is known of a model before it is loaded.

    Attributes:
        backbone: the adapter that would serve it.
        attaches: whether memory would attach; None where only the model itself can tell.
        why: in one line.
        layers: how many of each kind its language model has.
        features: what the adapter serves.
        without: settings that are refused with such layers, and why.
    """

    model_type: str
    backbone: str = ""
    attaches: bool | None = None
    why: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    without: dict[str, str] = field(default_factory=dict)


def outlook(source: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Outlook:
    """Look at the configuration of a hub id or a folder.

    Raises:
        AttachError: there is none, or it cannot be read.
    """
    config, name, unknown = backbone_of(source, trust_remote_code, revision)
    kind = str(config.model_type)
    if not name:
        return Outlook(kind, attaches=False, why=unknown)
    entry = registry("backbones").entry(name)
    attaches, why, without = registry("backbones").get(name).outlook(config)
    told = Outlook(kind, name, layers=layers(config), features=tuple(entry.facts.get("features", ())))
    if reason := keeps_images(config):
        without["memory.drop_image_after_invocation"] = reason
    if reason := refused(config):
        attaches, why = False, reason
    return Outlook(**{**vars(told), "attaches": attaches, "why": why, "without": without})


def layers(config: Any) -> dict[str, int]:
    """The kinds of layers in a model's cache: all tokens, those in a window, or a state."""
    kinds = (kv.KINDS.get(type(own), type(own).__name__) for own in DynamicCache(config=config).layers)
    return dict(Counter(kinds))


def refused(config: Any) -> str:
    """Why memory cannot work with a language model of this configuration; empty if it can."""
    told = str(getattr(config.get_text_config(decoder=True), "rope_parameters", None))
    if rope := next((kind for kind in CHANGING if f"'rope_type': '{kind}'" in told), None):
        return (
            f"positions of rope_type {rope!r} hang on the lengths that the model met before, in other rows and calls: "
            "use another in config.json, such as 'default' or 'yarn'"
        )
    try:
        kv.check(DynamicCache(config=config))
    except AttachError as error:
        return str(error)
    return ""


def counts_columns(config: Any) -> bool:
    """Whether a language model of this configuration looks at where the columns of its tokens stand."""
    return kv.counted(DynamicCache(config=config))


def keeps_images(config: Any) -> str:
    """Why images cannot leave the cache of a language model of this configuration; empty if they can."""
    if not kv.states(DynamicCache(config=config)):
        return ""
    return (
        f"images cannot leave the states of {config.model_type!r}, whose convolutions or linear attention hold all "
        "that was read"
    )
