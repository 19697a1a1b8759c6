"""A page that shows the first rows of some data as they were understood."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from vismem_core.errors import DataError
from vismem_core.files.checkpoint import atomically
from vismem_core.files.samples import Sample

from .page import STYLE

THUMBNAIL = (160, 160)


def write(path: Path, source: str, told: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """One HTML page that needs nothing beside itself.

    Args:
        told: counts, by name.
        samples: those that are shown.
    """
    text = "\n".join(_page(source, told, samples))
    atomically(path, lambda place: place.write_text(text, encoding="utf-8"))


def _page(source: str, told: Mapping[str, Any], samples: Sequence[Sample]) -> Iterator[str]:
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(source)}</title><style>{STYLE}'
    yield "td { vertical-align: top } td img { margin: 0 .3rem .3rem 0; image-rendering: pixelated }</style>"
    yield f"<h1>{escape(source)}</h1>"
    yield f"<p>{told['questions']} questions; the first {len(samples)} as they are understood.</p>"
    yield "<table><thead><tr><th>id</th><th>images</th><th>type</th><th>prompt</th><th>answer</th></tr></thead><tbody>"
    for own in samples:
        turns = "".join(f"<p class='note'>{escape(role)}: {escape(text)}</p>" for role, text in own.turns)
        yield f"<tr><td>{escape(own.id)}</td><td>{_pictures(own)}</td><td>{escape(own.type or '')}</td>"
        yield f"<td>{turns}{escape(own.prompt)}</td><td>{escape(own.answer or '')}</td></tr>"
    yield "</tbody></table>"


def _pictures(own: Sample) -> str:
    try:
        return "".join(map(_thumbnail, own.load_images()))
    except DataError as error:
        return escape(str(error))


def _thumbnail(image: Image.Image) -> str:
    buffer = BytesIO()
    small = image.copy()
    small.thumbnail(THUMBNAIL)
    small.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}" width="{small.width}" height="{small.height}">'
