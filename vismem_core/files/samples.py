"""Samples: what a question is made of, and the files and registered data sets they come from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image

from vismem_core import plugins
from vismem_core.base.images import PLACEHOLDER, Picture, decode, embedded, shown, verify
from vismem_core.errors import DataError, cut, nearest

from . import formats, sources
from .urls import stored

KEYS = ("id", "image", "images", "prompt", "answer", "answers", "type")
SPREAD = 64
"""Samples that tell one data set from another where reading all of them would mean making them."""

HINT = "mend it, or leave bad rows out with --on-bad-sample skip"
OnBad = Literal["fail", "skip"]


Turn = tuple[str, str]


@dataclass(frozen=True)
class Sample:
    """One question over zero or more images.

    Attributes:
        late: memory comes between the images and the question: what is formed there does not know what is asked.
        turns: what was said before, role (``system``, ``user``, ``assistant``) and text of each turn.
        place: where it stands, ``file:line``, for messages; empty for one that stands in no file.
        references: all right answers that are known, each as often as it was given; the answer alone, where no others
            are named. What is written is scored against each of them, and ``answer`` is learnt.
    """

    id: str
    images: tuple[Picture, ...]
    prompt: str
    answer: str | None = None
    type: str | None = None
    late: bool = False
    turns: tuple[Turn, ...] = ()
    place: str = field(default="", compare=False)
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.references and self.answer is not None:
            object.__setattr__(self, "references", (self.answer,))

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
        told = hashlib.sha256(("late " * self.late + self.prompt + (repr(self.turns) if self.turns else "")).encode())
        for image in self.images:
            told.update(_bytes(image))
        return told.hexdigest()[:16]


def _bytes(image: Picture) -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    if isinstance(image, str):
        return image.encode()
    return image if isinstance(image, bytes) else image.tobytes()


def asked(samples: Sequence[Sample]) -> tuple[Any, ...]:
    """What :meth:`vismem_core.base.backbone.Backbone.inputs` takes of samples: prompts, images and earlier turns."""
    told = [own.prompt for own in samples], [own.load_images() for own in samples]
    return (*told, [own.turns for own in samples]) if any(own.turns for own in samples) else told


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
        columns: what the source calls some of our keys, where that was said.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        skipped: Sequence[Skipped] = (),
        groups: Mapping[str, Sequence[str]] | None = None,
        told: str = "",
        source: str = "",
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.samples, self.skipped, self.groups = samples, tuple(skipped), groups
        self.told, self.source, self.columns = told, source, columns

    def only(self, samples: Sequence[Sample]) -> Dataset:
        """Some of its samples, as a data set of their own from which nothing was left out."""
        told = self.told and hashlib.sha256(repr((self.told, [own.id for own in samples])).encode()).hexdigest()[:16]
        return Dataset(samples, (), self.groups, told, self.source, self.columns)

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
    columns: Mapping[str, str] | None = None,
    urls: bool = False,
) -> Dataset:
    """A registered data set's split, or what :func:`read` reads; a file is the same for both splits.

    Raises:
        PluginError: a registered data set that does not load.
        DataError: neither a registered name nor a source, or a bad row (see :func:`read`).
    """
    names = plugins.registry("datasets").names()
    if str(source) in names:
        samples = plugins.registry("datasets").get(str(source))(split)
        return Dataset(samples, groups=getattr(samples, "groups", None), source=str(source))
    if not sources.known(source):
        raise DataError(f"{shown(Path(source))}: neither a file nor a data set; {nearest(str(source), names)}")
    options: dict[str, Any] = {"on_bad": on_bad, "allow_outside": allow_outside, "columns": columns, "urls": urls}
    return read(source, split, need_answer=need_answer, **options)


def read(
    source: str | Path,
    split: Literal["train", "heldout"] = "train",
    *,
    need_answer: bool,
    on_bad: OnBad = "fail",
    allow_outside: bool = False,
    columns: Mapping[str, str] | None = None,
    urls: bool = False,
) -> Dataset:
    """The rows of a source (:mod:`vismem_core.files.sources`), in whatever format (:mod:`vismem_core.files.formats`).

    Image paths are relative to the file, or in the folder; an image may also be bytes, a data URL or bare base64.

    Args:
        split: of a source that has several.
        need_answer: whether a row without an answer is bad.
        on_bad: stop at the first bad row, or leave bad rows out and list them in ``skipped``.
        allow_outside: whether images may lie outside the folder.
        columns: what a source calls some of our keys, ``{"prompt": "question"}``.
        urls: whether images may be http and https URLs: they are fetched now, into the user's cache.

    Raises:
        DataError: a bad row, as ``file:line: what is wrong``, or no usable row at all.
    """
    reader = _Reader(source, need_answer, allow_outside, columns, urls)
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for line, row in sources.rows(source, split):
        try:
            samples.append(reader.sample(line, row))
        except DataError as error:
            if on_bad == "fail":
                raise DataError(f"{source}:{line}: {error}; {HINT}") from error
            skipped.append(Skipped(line, str(error), str(source)))
    if not samples:
        first = f"{len(skipped)} bad ones, the first on line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{source}: no usable row; {first or 'it is empty'}")
    where = str(source) if reader.remote else os.path.abspath(source)
    return Dataset(samples, skipped, told=reader.told.hexdigest()[:16], source=where, columns=columns)


class _Reader:
    """Turns the rows of one file into samples; raises DataError without the place."""

    def __init__(
        self,
        source: str | Path,
        need_answer: bool,
        allow_outside: bool,
        columns: Mapping[str, str] | None = None,
        urls: bool = False,
    ) -> None:
        self.source, self.columns, self.urls = source, columns, urls
        self.remote = str(source).startswith(sources.HUB)
        path = Path(source)
        folder = path if path.is_dir() else path.parent
        self.folder = Path(os.path.abspath(folder))  # unlike resolve: links may lead out of the folder
        self.need_answer = need_answer
        self.allow_outside = allow_outside
        self.lines: dict[str, int] = {}
        self.sizes: dict[Path, int] = {}
        self.told = hashlib.sha256()

    def sample(self, line: int, told: sources.Row) -> Sample:
        row = self._row(told, line)
        sample_id, prompt = _text(row, "id"), _text(row, "prompt")
        answer = _text(row, "answer") if self.need_answer or row.get("answer") is not None else None
        references = tuple(row.get("references") or ())
        kind = _text(row, "type") if row.get("type") is not None else None
        images = tuple(self._image(name) for name in _names(row))
        turns = tuple((role, text) for role, text in row.get("turns") or ())
        _check_places("".join(text for _, text in turns) + prompt, images)
        if sample_id in self.lines:
            raise DataError(f"the id {cut(sample_id)!r} is taken by line {self.lines[sample_id]}; ids must differ")
        self.lines[sample_id] = line
        sizes = [self.sizes[image] for image in images if isinstance(image, Path)]
        if isinstance(told, bytes):
            self.told.update(told.strip() + repr(sizes).encode())
        else:
            held = [hashlib.sha256(own).hexdigest() for own in images if isinstance(own, bytes)]
            self.told.update(repr((sample_id, turns, prompt, answer, kind, sizes, held, *references)).encode())
        place = f"{self.source}:{line}"
        return Sample(sample_id, images, prompt, answer, kind, turns=turns, place=place, references=references)

    def _row(self, told: sources.Row, line: int) -> dict[str, Any]:
        if not isinstance(told, bytes):
            return formats.ours(told, line, self.columns)
        try:
            row = json.loads(told.rstrip(b"\r\n"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {_told(error, told)}; each line must hold one object") from error
        if not isinstance(row, dict):
            raise DataError(f"expected a JSON object, got {told.decode(errors='replace').strip()[:40]!r}")
        if not self.columns and formats.kind_of(row) == "ours":
            for key in row:
                if key not in KEYS:
                    raise DataError(f"unknown key {cut(key)!r}; {nearest(key, KEYS)}")
        return formats.ours(row, line, self.columns, whole=True)

    def _image(self, named: Any) -> Picture:
        if isinstance(named, Mapping):  # as the package datasets stores one
            named = named.get("bytes") or named.get("path")
        if isinstance(named, bytes):
            verify(named)
            return named
        if not isinstance(named, str) or not named:
            raise DataError(f"an image is a path or bytes, got {cut(repr(named))}")
        if named.startswith(("http://", "https://")):
            if self.urls:
                return self._measured(stored(named))
            raise DataError(
                f"the image {cut(named)!r} is a URL; download it into the folder of the file, or pass --allow-urls"
            )
        if (held := embedded(named)) is not None:
            verify(held)
            return held
        path = Path(os.path.abspath(self.folder / named))
        if not self.allow_outside and (self.remote or not path.is_relative_to(self.folder)):
            raise DataError(
                f"the image {cut(named)!r} lies outside the folder of the file; move it there, or pass --allow-outside"
            )
        return self._measured(path)

    def _measured(self, path: Path) -> Path:
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
        raise DataError(f"{key!r} is missing")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{key!r} must be a text that is not empty, got {cut(repr(value))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise DataError(f"{key!r} holds {half!r}, half of a character (a lone surrogate); mend the text") from error
    return value


def _names(row: Mapping[str, Any]) -> Iterable[Any]:
    """The row's images; a row may have none."""
    if "image" in row and "images" in row:
        raise DataError("both 'image' and 'images'; keep one")
    names = [row["image"]] if row.get("image") is not None else row.get("images") or []
    if not isinstance(names, list) or not all(isinstance(name, (str, bytes, Mapping)) and name for name in names):
        raise DataError("'image' must be a path and 'images' a list of paths")
    return names


def _check_places(prompt: str, images: Sequence[object]) -> None:
    if (places := prompt.count(PLACEHOLDER)) and places != len(images):
        raise DataError(f"the prompt has {places} {PLACEHOLDER}, and images: {len(images)}")
