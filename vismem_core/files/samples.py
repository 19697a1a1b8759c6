"""Samples: what a question is made of, and the files and registered data sets they come from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

from PIL import Image

from vismem_core import plugins
from vismem_core.base.images import Picture, decode, shown, verify
from vismem_core.base.videos import Frame
from vismem_core.errors import DataError, cut, nearest

from . import sources
from .reading import FRAMES, Reader, check_places
from .standing import Standing

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
                kind = "video" if isinstance(image, Frame) else "image"
                file = f"the {kind} {shown(image)}" if isinstance(image, Path | Frame) else "its image"
                raise DataError(f"{self.name}: {file} {error}") from error
        return images

    def digest(self) -> str:
        """A fingerprint of what is asked: the prompt and the images' bytes."""
        told = hashlib.sha256(("late " * self.late + self.prompt + (repr(self.turns) if self.turns else "")).encode())
        for image in self.images:
            told.update(_bytes(image))
        return told.hexdigest()[:16]


def _bytes(image: Picture) -> bytes:
    if isinstance(image, Frame):
        return repr((image.at, image.of)).encode() + (b"" if image.at else image.path.read_bytes())
    if isinstance(image, Path):
        return image.read_bytes()
    if isinstance(image, str):
        return image.encode()
    return image if isinstance(image, bytes) else image.tobytes()


def asked(samples: Sequence[Sample]) -> tuple[Any, ...]:
    """What :meth:`vismem_core.base.backbone.Backbone.inputs` takes of samples: prompts, images and earlier turns."""
    told = [own.prompt for own in samples], [own.load_images() for own in samples]
    return (*told, [own.turns for own in samples]) if any(own.turns for own in samples) else told


def seen(sample: Sample) -> Sample:
    """The same sample with its images decoded; as it is where one does not, which whoever uses it will tell."""
    try:
        return replace(sample, images=tuple(sample.load_images()))
    except DataError:
        return sample


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
        told = hashlib.sha256(self.told.encode())
        for own in samples if self.told else ():
            told.update(repr(own.id).encode())
        return Dataset(samples, (), self.groups, self.told and told.hexdigest()[:16], self.source, self.columns)

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
    check_places(prompt, images)
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
    frames: int = FRAMES,
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
    options: dict[str, Any] = {
        "on_bad": on_bad,
        "allow_outside": allow_outside,
        "columns": columns,
        "urls": urls,
        "frames": frames,
    }
    return read(source, split, need_answer=need_answer, **options)


def read(
    source: str | Path,
    split: Literal["train", "heldout"] = "train",
    *,
    need_answer: bool = True,
    on_bad: OnBad = "fail",
    allow_outside: bool = False,
    columns: Mapping[str, str] | None = None,
    urls: bool = False,
    frames: int = FRAMES,
) -> Dataset:
    """The rows of a source (:mod:`vismem_core.files.sources`), in whatever format (:mod:`vismem_core.files.formats`).

    All rows are looked at now, and none is kept: a sample is read where it stands whenever it is asked for. Image paths
    are relative to the file, or in the folder; an image may also be bytes, a data URL or bare base64.

    Args:
        split: of a source that has several.
        need_answer: whether a row without an answer is bad.
        on_bad: stop at the first bad row, or leave bad rows out and list them in ``skipped``.
        allow_outside: whether images may lie outside the folder.
        columns: what a source calls some of our keys, ``{"prompt": "question"}``.
        urls: whether images may be http and https URLs: they are fetched now, into the user's cache.
        frames: shown of each video, where its row does not say ``frames``.

    Raises:
        DataError: a bad row, as ``file:line: what is wrong``, or no usable row at all.
    """
    rows, reader = sources.rows(source, split), Reader(source, need_answer, allow_outside, columns, urls, frames)
    found = Standing(rows, reader)
    bad = found.look(on_bad == "fail")
    if bad and on_bad == "fail":
        raise DataError(f"{source}:{bad[0].line}: {bad[0].why}; {HINT}")
    skipped = [Skipped(own.line, own.why, str(source)) for own in bad]
    if not len(found):
        first = f"{len(skipped)} bad ones, the first on line {skipped[0].line}: {skipped[0].reason}" if skipped else ""
        raise DataError(f"{source}: no usable row; {first or 'it is empty'}")
    where = str(source) if reader.remote else os.path.abspath(source)
    return Dataset(
        _Standing(found, str(source)), skipped, told=reader.told.hexdigest()[:16], source=where, columns=columns
    )


class _Standing(Sequence[Sample]):
    """The good rows of a source, each of which is read when it is asked for."""

    def __init__(self, rows: Standing, source: str) -> None:
        self.rows, self.source = rows, source

    def type_of(self, index: int) -> str | None:
        """The type of a row, which need not be read for it."""
        return self.rows.type_of(index)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return Part(self, range(*index.indices(len(self))))
        place = f"{self.source}:{self.rows.lines[index]}"
        try:
            row = self.rows.read(index)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        return Sample(*row[:5], turns=row.turns, place=place, references=row.references)


class Part(Sequence[Sample]):
    """Some of a sequence's samples, by their indices."""

    def __init__(self, whole: Sequence[Sample], chosen: Sequence[int]) -> None:
        self.whole, self.chosen = whole, chosen

    def type_of(self, index: int) -> str | None:
        """The type of a sample, which need not be made for it."""
        known = getattr(self.whole, "type_of", None)
        return known(self.chosen[index]) if known else self[index].type

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return Part(self.whole, self.chosen[index])
        return self.whole[self.chosen[index]]
