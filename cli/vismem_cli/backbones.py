"""``vismem backbones``: the families of models that memory can be attached to."""

from __future__ import annotations

from dataclasses import asdict

from vismem_core import plugins

from .console import print_json, print_table
from .options import Json

EXAMPLE = "Example: vismem backbones"


def backbones(as_json: Json = False) -> None:
    """List the families of models that memory can be attached to; --json names their model types too."""
    entries = plugins.registry("backbones").entries()
    embedded = plugins.registry("bases").names()
    if as_json:
        print_json({"backbones": [asdict(entry) | {"embedded": entry.name in embedded} for entry in entries]})
        return
    print_table(
        "Backbones",
        ("name", "what it is", "features", "mini", "from"),
        [
            (
                entry.name,
                str(entry.facts.get("description", "")),
                ", ".join(entry.facts.get("features", ())),
                "yes" if entry.name in embedded else "no",
                f"{entry.distribution} {entry.version}",
            )
            for entry in entries
        ],
    )
