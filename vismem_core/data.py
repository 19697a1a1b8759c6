"""Samples: what a question is made of, and the JSONL files and registered data sets they come from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image, ImageOps

from vismem_core import plugins
from vismem_core.errors import DataError, nearest

KEYS = ("id", "image", "images", "prompt", "answer", "type")
PLACEHOLDER = "<image>"
"""Where an image stands in a prompt; a prompt without any has its images in front."""

OnBad = Literal["fail", "skip"]


@dataclass(frozen=True)
class Sample:
    """One question over zero or more images."""

    id: str
    images: tuple[Image.Image | Path, ...]
    prompt: str
    answer: str | None = None
    type: str | None = None

    def load_images(self) -> list[Image.Image]:
        """The images, decoded, upright, RGB.

        Raises:
            DataError: one that cannot be decoded; the message names the sample and the file.
        """
        return [_decode(image, self.id) for image in self.images]

    def digest(self) -> str:
        """A fingerprint of what is asked: the prompt and the images' bytes."""
        told = hashlib.sha256(self.prompt.encode())
        for image in self.images:
            told.update(image.read_bytes() if isinstance(image, Path) else image.tobytes())
        return told.hexdigest()[:16]


def _decode(image: Image.Image | Path, sample_id: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            upright: Image.Image = ImageOps.exif_transpose(opened)
            return upright.convert("RGB")
    except Exception as error:  # damaged files make PIL raise nearly anything
        why = plugins.reason(error)
        raise DataError(f"{image}: the image of sample {sample_id!r} does not decode: {why}") from error


@dataclass(frozen=True)
class Skipped:
    """A bad row that was left out."""

    line: int
    reason: str


class Dataset(Sequence[Sample]):
    """Samples, what was left out of them, and groups of question types such as ``{"new": ("right",)}``."""

    def __init__(
        self,
        samples: Sequence[Sample],
        skipped: Sequence[Skipped] = (),
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.samples, self.skipped, self.groups = samples, tuple(skipped), groups

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self.samples[index]


def question(prompt: str, images: Sequence[Path], sample_id: str = "question") -> Sample:
    """A sample from a prompt and image files, checked as a row of a file is.

    Raises:
        DataError: an empty prompt, a missing or damaged image, or a number of images that does not fit the prompt.
    """
    if not prompt.strip():
        raise DataError("the prompt is empty")
    _check_places(prompt, images)
    for image in images:
        _verify(image)
    return Sample(sample_id, tuple(images), prompt)


def open_dataset(
    source: str | Path,
    split: Literal["train", "heldout"],
    *,
    need_answer: bool = True,
    on_bad: OnBad = "fail",
    allow_outside: bool = False,
) -> Dataset:
    """A registered data set's split, or a JSONL file, which is the same for both splits.

    Raises:
        PluginError: a registered data set that does not load.
        DataError: neither a registered name nor a file, or a bad row (see ``read_jsonl``).
    """
    names = plugins.registry("datasets").names()
    if str(source) in names:
        samples = plugins.registry("datasets").get(str(source))(split)
        return Dataset(samples, groups=getattr(samples, "groups", None))
    if not Path(source).is_file():
        raise DataError(f"{source}: neither a file nor a data set; {nearest(str(source), names)}")
    return read_jsonl(Path(source), need_answer=need_answer, on_bad=on_bad, allow_outside=allow_outside)


def read_jsonl(path: Path, *, need_answer: bool, on_bad: OnBad = "fail", allow_outside: bool = False) -> Dataset:
    """Rows ``{"id", "image" or "images", "prompt", "answer", "type"?}``; image paths are relative to the file.

    Args:
        need_answer: whether a row without an answer is bad.
        on_bad: stop at the first bad row, or leave bad rows out and list them in ``skipped``.
        allow_outside: whether images may lie outside the file's folder.

    Raises:
        DataError: a bad row, as ``file:line: what is wrong``, or no usable row at all.
    """
    reader = _Reader(path, need_answer, allow_outside)
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for line, text in _rows(path):
        try:
            samples.append(reader.sample(line, text))
        except DataError as error:
            if on_bad == "fail":
                raise DataError(f"{path}:{line}: {error}") from error
            skipped.append(Skipped(line, str(error)))
    if not samples:
        first = f", the first on line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{path}: no usable row; {len(skipped)} bad ones{first}")
    return Dataset(samples, skipped)


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers and lines, without empty ones."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


class _Reader:
    """Turns the rows of one file into samples; raises DataError without the place."""

    def __init__(self, path: Path, need_answer: bool, allow_outside: bool) -> None:
        self.folder = Path(os.path.abspath(path.parent))  # unlike resolve: links may lead out of the folder
        self.need_answer = need_answer
        self.allow_outside = allow_outside
        self.lines: dict[str, int] = {}
        self.verified: set[Path] = set()

    def sample(self, line: int, text: bytes) -> Sample:
        row = self._row(text)
        sample_id, prompt = _text(row, "id"), _text(row, "prompt")
        answer = _text(row, "answer") if self.need_answer or row.get("answer") is not None else None
        kind = _text(row, "type") if row.get("type") is not None else None
        images = tuple(self._image(name) for name in _names(row))
        _check_places(prompt, images)
        if sample_id in self.lines:
            raise DataError(f"the id {sample_id!r} is taken by line {self.lines[sample_id]}; ids must differ")
        self.lines[sample_id] = line
        return Sample(sample_id, images, prompt, answer, kind)

    def _row(self, text: bytes) -> dict[str, Any]:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {getattr(error, 'msg', error)}; each line must hold one object") from error
        if not isinstance(row, dict):
            raise DataError(f"expected a JSON object, got {text.decode(errors='replace').strip()[:40]!r}")
        for key in row:
            if key not in KEYS:
                raise DataError(f"unknown key {key!r}; {nearest(key, KEYS)}")
        return row

    def _image(self, name: str) -> Path:
        path = Path(os.path.abspath(self.folder / name))
        if not self.allow_outside and not path.is_relative_to(self.folder):
            raise DataError(
                f"the image {name!r} lies outside the folder of the file; move it there, or pass --allow-outside"
            )
        if path not in self.verified:
            _verify(path)
            self.verified.add(path)
        return path


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and key == "id":
        return str(value)
    if value is None:
        raise DataError(f"{key!r} is missing; add it to the row")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key!r} must be a text that is not empty, got {value!r}")
    return value


def _names(row: Mapping[str, Any]) -> Iterable[str]:
    """The row's image paths; a row may have none."""
    if "image" in row and "images" in row:
        raise DataError("both 'image' and 'images'; keep one")
    names = [row["image"]] if row.get("image") is not None else row.get("images") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError("'image' must be a path and 'images' a list of paths")
    return names


def _check_places(prompt: str, images: Sequence[object]) -> None:
    if (places := prompt.count(PLACEHOLDER)) and places != len(images):
        raise DataError(f"the prompt has {places} {PLACEHOLDER}, but there are {len(images)} images")


def _verify(path: Path) -> None:
    """Checks that a file is an image, without decoding its pixels."""
    if not path.is_file():
        raise DataError(f"no such image: {path}")
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # damaged files make PIL raise nearly anything
        raise DataError(f"the image {path} is damaged or of no known format") from error
