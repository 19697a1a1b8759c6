"""What one row says: its texts and its images, checked, or what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vismem_core.base.images import PLACEHOLDER, Picture, embedded, verify
from vismem_core.base.videos import Frame
from vismem_core.errors import DataError, cut

from . import formats, sources
from .texts import Row
from .urls import stored

Value = TypeVar("Value")
MARKS = re.compile(f"{PLACEHOLDER}|{formats.CLIP}")
DECODE = json.JSONDecoder().decode
FRAMES, MOST_FRAMES = 8, 1024
"""Of a video, where nobody says how many; and as many as there may be."""
REMEMBERED = 2**16
"""Images that are not looked at again where several rows show them."""


class Read(NamedTuple):
    """What a row says, in the order of a sample's attributes; see :class:`vismem_core.files.samples.Sample`."""

    id: str
    images: tuple[Picture, ...]
    prompt: str
    answer: str | None
    type: str | None
    turns: tuple[tuple[str, str], ...]
    references: tuple[str, ...]


class Reader:
    """Reads the rows of one source; raises DataError without the place."""

    def __init__(
        self,
        source: str | Path,
        need_answer: bool,
        allow_outside: bool,
        columns: Mapping[str, str] | None = None,
        urls: bool = False,
        frames: int = FRAMES,
    ) -> None:
        self.source, self.columns, self.urls, self.frames = source, columns, urls, frames
        self.remote = str(source).startswith(sources.HUB)
        path = Path(source)
        self.folder = os.path.abspath(path if path.is_dir() else path.parent)  # unlike resolve: links may lead out
        self.inside = os.path.join(self.folder, "")
        self.need_answer, self.allow_outside = need_answer, allow_outside
        self.told = hashlib.sha256()
        self._paths: dict[str, Path] = {}
        self._sizes: dict[str, int] = {}

    def first(self, line: int, told: Row) -> Read:
        """A row that is met for the first time: its images are looked at, and the digest takes it in."""
        row = self.again(line, told)
        sizes: list[Any] = []
        for image in row.images:
            if isinstance(image, bytes):
                verify(image)
            elif isinstance(image, Path):
                sizes.append(self._size(image, image))
            elif isinstance(image, Frame) and not image.at:
                sizes.append((self._size(image, image.path), image.of))
        if isinstance(told, bytes):
            self.told.update(told.strip() + repr(sizes).encode())
        else:
            held = [hashlib.sha256(own).hexdigest() for own in row.images if isinstance(own, bytes)]
            texts = (row.id, row.turns, row.prompt, row.answer, row.type)
            self.told.update(repr((*texts, sizes, held, *row.references)).encode())
        return row

    def again(self, line: int, told: Row) -> Read:
        """What a row says; its images are not looked at."""
        row = self._row(told, line)
        own = _text(row, "id"), _text(row, "prompt")
        answer = _text(row, "answer") if self.need_answer or row.get("answer") is not None else None
        kind = _text(row, "type") if row.get("type") is not None else None
        images: tuple[Picture, ...] = tuple(map(self._image, _names(row)))
        turns = tuple((role, text) for role, text in row["turns"]) if row.get("turns") else ()
        prompt = own[1]
        if clips := _names(row, "video"):
            count = _count(row.get("frames"), self.frames)
            images = _placed(images, [self._frames(name, count) for name in clips], turns, prompt)
            turns = tuple((role, text.replace(formats.CLIP, PLACEHOLDER * count)) for role, text in turns)
            prompt = prompt.replace(formats.CLIP, PLACEHOLDER * count)
        check_places("".join(text for _, text in turns) + prompt, images)
        return Read(own[0], images, prompt, answer, kind, turns, tuple(row.get("references") or ()))

    def _row(self, told: Row, line: int) -> dict[str, Any]:
        if not isinstance(told, bytes):
            return formats.ours(told, line, self.columns)
        try:
            row = DECODE(told.decode().rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {_told(error, told)}; each line must hold one object") from error
        if not isinstance(row, dict):
            raise DataError(f"expected a JSON object, got {told.decode(errors='replace').strip()[:40]!r}")
        return formats.ours(row, line, self.columns, whole=True)

    def _image(self, named: Any) -> Picture:
        if isinstance(named, Mapping):  # as the package datasets stores one
            named = named.get("bytes") or named.get("path")
        if isinstance(named, bytes):
            return named
        if not isinstance(named, str) or not named:
            raise DataError(f"an image is a path or bytes, got {cut(repr(named))}")
        if (known := self._paths.get(named)) is not None:
            return known
        if named.startswith(("http://", "https://")):
            if self.urls:
                return _kept(self._paths, named, stored(named))
            raise DataError(
                f"the image {cut(named)!r} is a URL; download it into the folder of the file, or pass --allow-urls"
            )
        if (held := embedded(named)) is not None:
            return held
        return _kept(self._paths, named, self._path(named, "image"))

    def _frames(self, named: Any, count: int) -> list[Picture]:
        if isinstance(named, Mapping):
            named = named.get("path")
        if not isinstance(named, str) or not named:
            raise DataError(f"a video is a path, got {cut(repr(named))}")
        if named.startswith(("http://", "https://")):
            raise DataError(f"the video {cut(named)!r} is a URL; download it into the folder of the file")
        path = self._path(named, "video")
        return [Frame(path, at, count) for at in range(count)]

    def _path(self, named: str, kind: str) -> Path:
        path = os.path.abspath(os.path.join(self.folder, named))
        if not self.allow_outside and (self.remote or not path.startswith(self.inside)):
            raise DataError(
                f"the {kind} {cut(named)!r} lies outside the folder of the file; move it there, or pass --allow-outside"
            )
        return Path(path)

    def _size(self, image: Path | Frame, file: Path) -> int:
        """The size of an image's or a video's file, which is looked at unless it was."""
        if (size := self._sizes.get(str(file))) is None:
            verify(image)
            size = _kept(self._sizes, str(file), file.stat().st_size)
        return size


def _kept(known: dict[str, Value], key: str, value: Value) -> Value:
    """Remember a value, and not too many."""
    if len(known) >= REMEMBERED:
        known.clear()
    known[key] = value
    return value


def _told(error: Exception, text: bytes) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start + 1}"
    if text.strip() in (b"[", b"{"):
        return "the file is one JSON value over several lines"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    cut_off = ", perhaps cut off" if error.pos >= len(error.doc.rstrip()) - 1 or "Unterminated" in error.msg else ""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}{cut_off}"


def _text(row: Mapping[str, Any], key: str) -> str:
    value = formats.written(row.get(key)) if key in ("id", "answer") else row.get(key)
    if value is None:
        raise DataError(f"{key!r} is missing")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key!r} must be a text that is not empty, got {cut(repr(value))}")
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise DataError(f"{key!r} holds {half!r}, half of a character (a lone surrogate); mend the text") from error
    return value


def _names(row: Mapping[str, Any], kind: str = "image") -> list[Any]:
    """The row's images, or videos; it may have none."""
    several = f"{kind}s"
    if kind in row and several in row:
        raise DataError(f"both {kind!r} and {several!r}; keep one")
    if isinstance(name := row.get(kind), str) and name:
        return [name]
    names = [name] if name is not None else row.get(several) or []
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes, Mapping)) and name for name in names):
        raise DataError(f"{kind!r} must be a path and {several!r} a list of paths")
    return names


def _count(told: Any, default: int) -> int:
    count = default if told is None else int(told) if isinstance(told, str) and told.isdecimal() else told
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_FRAMES:
        raise DataError(f"'frames' must be a number from 1 to {MOST_FRAMES}, got {cut(repr(count))}")
    return count


def _placed(
    images: Sequence[Picture], clips: Sequence[list[Picture]], turns: Sequence[tuple[str, str]], prompt: str
) -> tuple[Picture, ...]:
    """Images and frames of videos in the order of their marks; videos come behind images where there is no mark."""
    marks = MARKS.findall("".join(text for _, text in turns) + prompt)
    if not marks:
        return (*images, *chain(*clips))
    found = (marks.count(PLACEHOLDER), marks.count(formats.CLIP))
    if found != (len(images), len(clips)):
        told = f"images: {len(images)}, and videos: {len(clips)}"
        raise DataError(f"the prompt has {found[0]} {PLACEHOLDER} and {found[1]} {formats.CLIP}, {told}")
    image, clip = iter(images), iter(clips)
    return tuple(own for mark in marks for own in ([next(image)] if mark == PLACEHOLDER else next(clip)))


def check_places(prompt: str, images: Sequence[object]) -> None:
    if (places := prompt.count(PLACEHOLDER)) and places != len(images):
        raise DataError(f"the prompt has {places} {PLACEHOLDER}, and images: {len(images)}")
