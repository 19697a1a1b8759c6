"""``vismem backbones``: the families of models that memory can be attached to."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from vismem_core import plugins

from . import options
from .console import print_json, print_table

EXAMPLE = "Example: vismem backbones --check Qwen/Qwen3-VL-4B-Instruct"


def backbones(
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="ID|DIR",
            help="Say what memory would do with a model, by its config alone.",
            rich_help_panel=options.MODEL,
        ),
    ] = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """List the families of models that memory can be attached to; --json names their model types too.

    --check exits with 1 if memory would not attach.
    """
    if check is not None:
        from vismem_core.base.outlook import outlook  # torch comes with it

        told = outlook(check, trust_remote_code=trust_remote_code, revision=revision)
        _check(told, as_json)
        if told.attaches is False:
            raise typer.Exit(1)
        return
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


def _check(told: Any, as_json: bool) -> None:
    if as_json:
        print_json(asdict(told))
        return
    answer = {True: "yes", False: "no", None: "only the model itself can tell"}[told.attaches]
    rows = [("model type", told.model_type), ("memory attaches", f"{answer}: {told.why}" if told.why else answer)]
    if told.attaches is False:
        print_table("Check", ("", ""), rows)
        return
    rows.append(("backbone", told.backbone))
    rows.append(("layers", ", ".join(f"{count} {kind}" for kind, count in told.layers.items())))
    rows.append(("features", ", ".join(told.features)))
    rows += [(f"not {setting}", why) for setting, why in told.without.items()]
    print_table("Check", ("", ""), rows)
