"""What the terminal shows: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

FIRST = os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
"""Whether this process is the one of several, started by ``torchrun``, that speaks and writes."""
out = Console(highlight=False, quiet=not FIRST)
err = Console(stderr=True, highlight=False, quiet=not FIRST)


def print_json(data: Mapping[str, Any]) -> None:
    """One object on stdout, on one line; in ASCII where stdout is not Unicode."""
    if not FIRST:
        return
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    typer.echo(json.dumps(data, ensure_ascii=not unicode, default=str))


def say(message: str) -> None:
    """One line of status on stderr."""
    err.print(Text(message), soft_wrap=True)


def warn(message: str) -> None:
    """One line of warning on stderr."""
    err.print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str | Text]], numbers: bool = False
) -> None:
    """A table on stdout, the first column's names in one piece.

    Args:
        numbers: the other columns are figures: flush right, in one piece, and names wrap instead.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        figures = numbers and index > 0
        whole = figures if numbers else not index
        table.add_column(column, justify="right" if figures else "left", overflow="fold", no_wrap=whole)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    out.print(table)
