"""Samples: what a question is made of, and the JSONL files and registered data sets they come from."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image

from vismem_core import plugins
from vismem_core.base.images import PLACEHOLDER, Picture, decode, embedded, is_file, shown, verify
from vismem_core.errors import DataError, cut, nearest

KEYS = ("id", "image", "images", "prompt", "answer", "type")
SPREAD = 64
"""Samples that tell one data set from another where reading all of them would mean making them."""

HINT = "mend it, or leave bad rows out with --on-bad-sample skip"
OnBad = Literal["fail", "skip"]


@dataclass(frozen=True)
class Sample:
    """One question over zero or more images.

    Attributes:
        late: memory comes between the images and the question: what is formed there does not know what is asked.
        place: where it stands, ``file:line``, for messages; empty for one that stands in no file.
    """

    id: str
    images: tuple[Picture, ...]
    prompt: str
    answer: str | None = None
    type: str | None = None
    late: bool = False
    place: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """How messages name it: its place, or else its id."""
        return self.place or f"sample {cut(self.id)!r}"

    def load_images(self) -> list[Image.Image]:
        """The images as a person sees them (:mod:`vismem_core.base.images`), RGB.

        Raises:
            DataError: one that cannot be decoded; the message names the sample and the file.
        """
        images = []
        for image in self.images:
            try:
                images.append(decode(image))
            except DataError as error:
                file = f"the image {shown(image)}" if isinstance(image, Path) else "its image"
                raise DataError(f"{self.name}: {file} {error}") from error
        return images

    def digest(self) -> str:
        """A fingerprint of what is asked: the prompt and the images' bytes."""
        told = hashlib.sha256(("late " * self.late + self.prompt).encode())
        for image in self.images:
            told.update(_bytes(image))
        return told.hexdigest()[:16]


def _bytes(image: Picture) -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    if isinstance(image, str):
        return image.encode()
    return image if isinstance(image, bytes) else image.tobytes()


@dataclass(frozen=True)
class Skipped:
    """A bad row that was left out."""

    line: int
    reason: str
    file: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}" if self.file else f"line {self.line}: {self.reason}"


class Dataset(Sequence[Sample]):
    """Samples, what was left out of them, and groups of question types such as ``{"new": ("right",)}``.

    Attributes:
        told: digest of the file's rows, where they come from a file; see :func:`fingerprint`.
        source: path or registered name, for people.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        skipped: Sequence[Skipped] = (),
        groups: Mapping[str, Sequence[str]] | None = None,
        told: str = "",
        source: str = "",
    ) -> None:
        self.samples, self.skipped, self.groups = samples, tuple(skipped), groups
        self.told, self.source = told, source

    def only(self, samples: Sequence[Sample]) -> Dataset:
        """Some of its samples, as a data set of their own from which nothing was left out."""
        told = self.told and hashlib.sha256(repr((self.told, [own.id for own in samples])).encode()).hexdigest()[:16]
        return Dataset(samples, (), self.groups, told, self.source)

    def type_of(self, index: int) -> str | None:
        """The type of a sample, which need not be made for it."""
        known = getattr(self.samples, "type_of", None)
        return known(index) if known else self.samples[index].type

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self.samples[index]


def fingerprint(samples: Sequence[Sample]) -> str:
    """A digest that tells data sets apart: of a file's rows and the sizes of their images, or else of samples spread
    over all of them, and their number."""
    if isinstance(samples, Dataset) and samples.told:
        return samples.told
    count, told = len(samples), hashlib.sha256(str(len(samples)).encode())
    for at in dict.fromkeys(number * count // SPREAD for number in range(SPREAD)) if count else ():
        sample = samples[at]
        told.update(repr((sample.id, sample.digest(), sample.answer, sample.type)).encode())
    return told.hexdigest()[:16]


def question(prompt: str, images: Sequence[Path], sample_id: str = "question") -> Sample:
    """A sample from a prompt and image files, checked as a row of a file is.

    Raises:
        DataError: an empty prompt, a missing or damaged image, or a number of images that does not fit the prompt.
    """
    if not prompt.strip():
        raise DataError("the prompt is empty")
    _check_places(prompt, images)
    for image in images:
        verify(image)
    return Sample(sample_id, tuple(images), prompt, place="the question")


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
        return Dataset(samples, groups=getattr(samples, "groups", None), source=str(source))
    if not is_file(Path(source)):
        raise DataError(f"{shown(Path(source))}: neither a file nor a data set; {nearest(str(source), names)}")
    return read_jsonl(Path(source), need_answer=need_answer, on_bad=on_bad, allow_outside=allow_outside)


def read_jsonl(path: Path, *, need_answer: bool, on_bad: OnBad = "fail", allow_outside: bool = False) -> Dataset:
    """Rows ``{"id", "image" or "images", "prompt", "answer", "type"?}`` of a file, which may be compressed by gzip.

    Image paths are relative to the file; an image may also be a data URL or bare base64.

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
                raise DataError(f"{path}:{line}: {error}; {HINT}") from error
            skipped.append(Skipped(line, str(error), str(path)))
    if not samples:
        first = f", the first on line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{path}: no usable row; {len(skipped)} bad ones{first}")
    return Dataset(samples, skipped, told=reader.told.hexdigest()[:16], source=os.path.abspath(path))


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers and lines, without empty ones."""
    try:
        with path.open("rb") as file:
            start = file.read(2)
            file.seek(0)
            if start in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            lines = gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is compressed by gzip and damaged: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


class _Reader:
    """Turns the rows of one file into samples; raises DataError without the place."""

    def __init__(self, path: Path, need_answer: bool, allow_outside: bool) -> None:
        self.path = path
        self.folder = Path(os.path.abspath(path.parent))  # unlike resolve: links may lead out of the folder
        self.need_answer = need_answer
        self.allow_outside = allow_outside
        self.lines: dict[str, int] = {}
        self.sizes: dict[Path, int] = {}
        self.told = hashlib.sha256()

    def sample(self, line: int, text: bytes) -> Sample:
        row = self._row(text)
        sample_id, prompt = _text(row, "id"), _text(row, "prompt")
        answer = _text(row, "answer") if self.need_answer or row.get("answer") is not None else None
        kind = _text(row, "type") if row.get("type") is not None else None
        images = tuple(self._image(name) for name in _names(row))
        _check_places(prompt, images)
        if sample_id in self.lines:
            raise DataError(f"the id {cut(sample_id)!r} is taken by line {self.lines[sample_id]}; ids must differ")
        self.lines[sample_id] = line
        sizes = [self.sizes[image] for image in images if isinstance(image, Path)]
        self.told.update(text.strip() + repr(sizes).encode())
        return Sample(sample_id, images, prompt, answer, kind, place=f"{self.path}:{line}")

    def _row(self, text: bytes) -> dict[str, Any]:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {_told(error, text)}; each line must hold one object") from error
        if not isinstance(row, dict):
            raise DataError(f"expected a JSON object, got {text.decode(errors='replace').strip()[:40]!r}")
        for key in row:
            if key not in KEYS:
                raise DataError(f"unknown key {cut(key)!r}; {nearest(key, KEYS)}")
        return row

    def _image(self, name: str) -> Picture:
        if name.startswith(("http://", "https://")):
            raise DataError(f"the image {cut(name)!r} is a URL; download it into the folder of the file")
        if (held := embedded(name)) is not None:
            verify(held)
            return held
        path = Path(os.path.abspath(self.folder / name))
        if not self.allow_outside and not path.is_relative_to(self.folder):
            raise DataError(
                f"the image {cut(name)!r} lies outside the folder of the file; move it there, or pass --allow-outside"
            )
        if path not in self.sizes:
            verify(path)
            self.sizes[path] = path.stat().st_size
        return path


def _told(error: Exception, text: bytes) -> str:
    if text.strip() in (b"[", b"{"):
        return "the file is one JSON value over several lines"
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    cut_off = ", perhaps cut off" if error.pos >= len(error.doc.rstrip()) - 1 or "Unterminated" in error.msg else ""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}{cut_off}"


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and key == "id":
        return str(value)
    if value is None:
        raise DataError(f"{key!r} is missing; add it to the row")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key!r} must be a text that is not empty, got {cut(repr(value))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise DataError(f"{key!r} holds {half!r}, half of a character (a lone surrogate); mend the text") from error
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
        raise DataError(f"the prompt has {places} {PLACEHOLDER}, and images: {len(images)}")
