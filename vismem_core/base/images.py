"""The one decoder of images: whatever way a picture comes in, the model sees what a person sees.

Upright (EXIF), on white where it is transparent, and with its own range of brightness: 16 bits, 12 bits and floats are
scaled to 8 bits instead of cut off.
"""

from __future__ import annotations

import base64
import hashlib
import re
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from vismem_core.errors import DataError, cut

from .videos import Frame, decode_frame, verify_video

Picture = Image.Image | Path | bytes | str | Frame
"""An image, the path of an image file, or what such a file holds; as text, a path, a data URL or base64; or a video's
frame."""

PLACEHOLDER = "<image>"
"""Where an image stands in a prompt; a prompt without any has its images in front."""
DATA_URL = re.compile(r"data:[^,]{0,200}?;base64,", re.IGNORECASE)
BASE64 = re.compile(r"[A-Za-z0-9+/_\r\n-]{80,}={0,2}\s*")
DEPTHS = (8, 10, 12, 14, 16)
"""Bits that cameras and scanners put into integers of 16 or 32."""
LONGEST = 400
"""Characters of a path that a message shows whole."""
BITS_PER_SAMPLE = 258
"""The tag in which a TIFF says how many of them count."""


def decode(picture: Picture) -> Image.Image:
    """The picture as people see it, in RGB.

    Raises:
        DataError: it does not decode; the message says why, and not which picture.
    """
    if isinstance(picture, str):
        held = embedded(picture)
        picture = Path(picture) if held is None else held
    if not isinstance(picture, Picture):
        raise DataError(f"is a {type(picture).__name__}; give an image of PIL, a path or bytes")
    if isinstance(picture, Path) and not is_file(picture):
        raise DataError(f"is no file: {shown(picture)}")
    try:
        if isinstance(picture, Frame):
            return _rgb(decode_frame(picture))
        if isinstance(picture, Image.Image):
            return _rgb(picture)
        with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture) as opened:
            _no_program(opened)
            return _rgb(opened)
    except Exception as error:  # damaged files make PIL raise nearly anything
        raise DataError(_why(error)) from error


def verify(picture: Path | bytes | Frame) -> None:
    """Check that a file is an image, or the video that a frame is of, without decoding its pixels.

    Raises:
        DataError: there is no such file, or it is damaged or of no known format.
    """
    if isinstance(picture, Frame):
        return _verify_video(picture.path)
    name = "the embedded image" if isinstance(picture, bytes) else f"the image {shown(picture)}"
    if not isinstance(picture, bytes) and not is_file(picture):
        raise DataError(f"no such image: {shown(picture)}")
    try:
        with Image.open(BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
            _no_program(image)
            image.verify()
    except (Image.DecompressionBombError, DataError) as error:
        raise DataError(f"{name} {_why(error)}") from error
    except Exception as error:  # damaged files make PIL raise nearly anything
        raise DataError(f"{name} is damaged or of no known format") from error


def _verify_video(path: Path) -> None:
    if not is_file(path):
        raise DataError(f"no such video: {shown(path)}")
    try:
        verify_video(path)
    except DataError as error:
        raise DataError(f"the video {shown(path)} {error}") from error


def embedded(text: str) -> bytes | None:
    """The file that a data URL or bare base64 holds; None for anything else, such as a path.

    Raises:
        DataError: a data URL that holds none.
    """
    if text[:5].lower() == "data:":
        head = DATA_URL.match(text)
        if head is None:
            raise DataError(f"the image is a data URL without base64: {cut(text)!r}")
        try:
            return _unpacked(text[head.end() :])
        except ValueError as error:
            raise DataError(f"the image is base64 that does not decode: {cut(text)!r}") from error
    if not BASE64.fullmatch(text) or is_file(Path(text)):
        return None
    try:
        held = _unpacked(text)
        verify(held)
    except (ValueError, DataError):  # then it is a long path
        return None
    return held


def _unpacked(text: str) -> bytes:
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/"))
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def content(image: Image.Image) -> str:
    """A digest of what a decoded image shows: the same picture has the same, whatever file it comes from."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def shown(path: Path | Frame) -> str:
    """A path for a message; whole, unless it is longer than paths are."""
    return cut(path, 80 if len(str(path)) > LONGEST else LONGEST)


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name that no file system takes is no file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _no_program(image: Image.Image) -> None:
    """PIL has Ghostscript run what a PostScript file holds."""
    if image.format == "EPS":
        raise DataError("is PostScript, which is a program and no picture")


def _rgb(image: Image.Image) -> Image.Image:
    upright: Image.Image = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        return _eight_bits(upright, _told_depth(image)).convert("RGB")
    if upright.has_transparency_data:
        seen = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return upright.convert("RGB")


def _told_depth(image: Image.Image) -> int | None:
    bits = (getattr(image, "tag_v2", None) or {}).get(BITS_PER_SAMPLE, (0,))[0]
    return bits if bits in DEPTHS[1:-1] else None


def _eight_bits(image: Image.Image, depth: int | None) -> Image.Image:
    """Grey values by their depth: the file's, or else the least that holds the brightest.

    Floats up to 1 are shares of white, as numpy's and scikit-image's are; what has values below 0, or beyond 16 bits,
    is stretched from its darkest to its brightest.
    """
    import numpy as np  # most images need none

    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (values.min(), values.max()) if values.size else (0.0, 0.0)
    white = next((2**bits - 1 for bits in ((depth,) if depth else DEPTHS) if high < 2**bits), None)
    if image.mode == "F" and low >= 0 and high <= 1:
        white = 1
    if white is None or low < 0:
        values, white = values - low, max(high - low, 1e-12)
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _why(error: Exception) -> str:
    if isinstance(error, DataError):
        return str(error)
    if isinstance(error, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS or 0
        return f"has more than {2 * limit:,} pixels: resize it, or raise PIL.Image.MAX_IMAGE_PIXELS"
    return f"does not decode: {type(error).__name__}: {' '.join(str(error).split())}"
