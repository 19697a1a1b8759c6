"""A picture of an answer and where it invoked which memory (needs the extra ``plots``)."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from vismem_core.errors import VismemError
from vismem_core.files.samples import Sample

from .inference import Answer

COLOURS = {"short": "#d95f02", "long": "#1b6ca8"}
COLUMNS = 46  # characters in a line of text
LINE = 0.085  # height of a line, as a share of the picture's


def check(path: Path) -> None:
    """Whether a picture can be written there, before there is an answer to lose.

    Raises:
        VismemError: matplotlib is not installed, there is no such folder, or the ending names no format.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise VismemError("pictures need matplotlib: pip install 'vismem[plots]'") from error
    if not path.parent.is_dir():
        raise VismemError(f"{path}: there is no folder {path.parent}")
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise VismemError(
            f"{path}: a picture's name ends in one of {', '.join(f'.{ending}' for ending in sorted(known))}"
        )


def draw(answer: Answer, sample: Sample, path: Path) -> None:
    """Write a picture: the images on the left, the question and the marked answer on the right.

    Args:
        path: its ending says the format (``.png``, ``.svg``, ``.pdf``).
    """
    from matplotlib.figure import Figure

    images = sample.load_images()
    figure = Figure(figsize=(8, 3), dpi=150)
    grid = figure.add_gridspec(max(1, len(images)), 2, width_ratios=(1, 2))
    for row, image in enumerate(images):
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow(image)
        axes.axis("off")
    text = figure.add_subplot(grid[:, 1])
    text.axis("off")
    height = _write(text, 0.95, sample.prompt, {"color": "#555555"})
    height = _write(text, height - LINE, answer.marked, {"fontsize": 13})
    for kind, colour in COLOURS.items():
        places = [str(place.position) for place in answer.invocations if place.kind == kind]
        if places:
            told = f"{kind}-term memory formed at token {', '.join(places)}"
            text.text(0, height - LINE, told, color=colour, fontsize=9, va="top")
            height -= LINE
    figure.savefig(path, bbox_inches="tight")


def _write(axes: Any, height: float, marked: str, style: dict[str, Any]) -> float:
    """Wrapped text from ``height`` down, invocation marks as coloured chips; gives the height below it."""
    for line in textwrap.wrap(marked, COLUMNS) or [""]:
        column = 0
        for piece in re.split(r"(‹\w+›)", line):
            kind = piece.strip("‹›") if piece.startswith("‹") else None
            chip = {"boxstyle": "round,pad=0.2", "fc": COLOURS[kind], "ec": "none"} if kind in COLOURS else None
            colours = {"color": "white", "fontsize": 9} if chip else {}
            if piece.strip():
                place = (column / COLUMNS, height)
                told = kind if chip else piece
                axes.text(*place, told, va="top", family="monospace", bbox=chip, parse_math=False, **style | colours)
            column += len(piece)
        height -= LINE * 1.4
    return height
