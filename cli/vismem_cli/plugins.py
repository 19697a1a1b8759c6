"""``vismem plugins``: what is installed, what it registers, and what did not load."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from vismem_core import plugins as core

from .console import print_json, print_table
from .options import OUTPUT, Json

EXAMPLE = "Example: vismem plugins --json"


def plugins(
    names: Annotated[bool, typer.Option("--names", help="List every registered name.", rich_help_panel=OUTPUT)] = False,
    as_json: Json = False,
) -> None:
    """List the plugins, and why any of them did not load."""
    status = core.status()
    entries = [entry for kind in core.KINDS for entry in core.registry(kind).entries()]
    if as_json:
        rows = [asdict(one) | {"ok": one.ok} for one in status]
        print_json({"plugins": rows, "registered": [asdict(entry) for entry in entries]})
        return
    print_table("Plugins", ("plugin", "from", "registers"), [_row(one) for one in status])
    if names:
        print_table(
            "\nNames",
            ("kind", "name", "from", "what it is"),
            [(core.noun(e.kind), e.name, e.distribution, str(e.facts.get("description", ""))) for e in entries],
        )


def _row(one: core.PluginStatus) -> tuple[str, str, str | Text]:
    registers = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names)}" for kind, names in one.registers.items())
    shown = registers if one.ok else Text(f"did not load: {one.error}", style="red")
    return one.name, f"{one.distribution} {one.version}", shown
