"""Images of requests: what a stranger sends is looked at before it is decoded, and never taken for a path."""

from __future__ import annotations

from io import BytesIO

from PIL import Image

from vismem_core.base.images import embedded
from vismem_core.errors import DataError, cut

from .refused import Limits, RefusedError

FIELD = "messages"
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Others have decoders that are rarely looked at, or call programs."""
SECONDS = 10.0
"""For an image that is fetched."""


def load(named: object, limits: Limits, urls: bool = False) -> bytes:
    """The file of an image: of a ``data:`` URL, or fetched from a public address.

    Args:
        urls: whether images may be fetched.

    Raises:
        RefusedError: it is neither, has too many pixels, or is no image.
    """
    scheme = named.partition(":")[0].lower() if isinstance(named, str) and ":" in named else ""
    if not isinstance(named, str) or scheme not in ("data", "http", "https"):
        raise RefusedError(
            f"an image is a data: URL with base64, got {cut(repr(named))}; paths are not read here", field=FIELD
        )
    if scheme != "data" and not urls:
        raise RefusedError(
            f"this server fetches no images: send {cut(named)!r} as a data: URL (it would with --allow-urls)",
            field=FIELD,
        )
    try:
        held = embedded(named) if scheme == "data" else _fetched(named, limits)
    except DataError as error:
        raise RefusedError(str(error), field=FIELD) from error
    assert held is not None  # as data: URLs always hold something
    _check(held, limits)
    return held


def _fetched(url: str, limits: Limits) -> bytes:
    from vismem_core.files.urls import fetch

    return fetch(url, seconds=min(SECONDS, limits.seconds), limit=limits.body)


def _check(held: bytes, limits: Limits) -> None:
    """Of which format and how large it is, by its head; the pixels are decoded later."""
    try:
        with Image.open(BytesIO(held), formats=FORMATS) as image:
            width, height = image.size
            if width * height <= limits.pixels:
                image.verify()
                return
    except Image.DecompressionBombError as error:
        raise RefusedError(
            f"an image has far more than {limits.pixels:,} pixels", field=FIELD, code="image_too_large"
        ) from error
    except Exception as error:  # damaged files make PIL raise nearly anything
        known = ", ".join(FORMATS)
        raise RefusedError(f"an image is damaged, or none of {known}", field=FIELD, code="invalid_image") from error
    raise RefusedError(
        f"an image has {width} x {height} pixels; at most {limits.pixels:,} are taken: make it smaller",
        field=FIELD,
        code="image_too_large",
    )
