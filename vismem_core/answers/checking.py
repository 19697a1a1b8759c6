"""What is wrong with samples for one model, found before they are used: all of a file at once, or a batch as it is met.

Rows are checked once: what was found is remembered by the digest of the data and of the processor, in the user's cache
folder (:mod:`vismem_core.files.cache`).
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import BatchFeature

from vismem_core.base.backbone import Backbone
from vismem_core.base.images import PLACEHOLDER, Picture
from vismem_core.base.videos import Frame
from vismem_core.errors import AttachError, DataError, VismemError, cut
from vismem_core.files import cache
from vismem_core.files.samples import HINT, Dataset, OnBad, Part, Sample, Skipped, asked
from vismem_core.memory.tokens import NAMES

CHUNK = 256
REMEMBERED = 2**16
"""Images whose sizes are remembered, since several questions may be about them."""
VERSION = 3
"""Of what is remembered; a change of what counts as a fault raises it."""
Sizes = tuple[tuple[int, int], ...]
Shapes = tuple[Sizes, tuple[tuple[int, int] | None, ...]]
"""Sizes of images, and which frames of videos they are, if they are any."""
Progress = Callable[[int, int], None]


@dataclass
class Findings:
    """What a check of a whole data set found.

    Attributes:
        faults: by index of the sample, what is wrong with it.
        long: indices of samples that are longer than the model's context.
        longest: of all samples, in tokens: prompt, images and answer.
        bare: how many samples have no image.
        context: the model's, in tokens; 0 if it does not say.
    """

    faults: dict[int, str] = field(default_factory=dict)
    long: list[int] = field(default_factory=list)
    longest: int = 0
    context: int = 0
    bare: int = 0


def checked(
    backbone: Backbone,
    data: Dataset,
    on_bad: OnBad,
    *,
    answers: bool = True,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Dataset:
    """The samples of a file that this model can use.

    Args:
        answers: whether answers are used too, as in training.
        progress: called with the number of samples that are done and of all.
        warn: told what is no fault but worth knowing: samples longer than the model's context.

    Raises:
        DataError: with ``on_bad="fail"`` the first fault, and how many there are; otherwise, if no sample is left.
    """
    found = find(backbone, data, answers=answers, progress=progress)
    if found.long and warn:
        first = data[found.long[0]]
        warn(
            f"{len(found.long)} of {len(data)} rows are longer than the model's context of {found.context} tokens "
            f"(the longest has {found.longest}), the first is {first.name}"
        )
    if found.bare and warn:
        warn(f"{found.bare} of {len(data)} rows of {data.source} have no image")
    if not found.faults:
        return data
    at, why = min(found.faults.items())
    if on_bad == "fail" or len(found.faults) == len(data):
        more = f" (and {len(found.faults) - 1} more bad rows)" if len(found.faults) > 1 else ""
        raise DataError(f"{data[at].name}: {why}{more}; {HINT}")
    kept = Part(data.samples, array("q", (at for at in range(len(data)) if at not in found.faults)))
    out = [left_out(data[at], why) for at, why in sorted(found.faults.items())]
    return Dataset(kept, [*data.skipped, *out], data.groups, data.told, data.source)


def find(backbone: Backbone, data: Dataset, *, answers: bool, progress: Progress | None = None) -> Findings:
    """Check all samples, in parallel where that helps, or remember what a check of them found."""
    place = _remembered(backbone, data, answers) if data.told else None
    try:
        stored = json.loads(place.read_text(encoding="utf-8")) if place else None
        if stored is not None:
            faults = {int(at): str(why) for at, why in stored.pop("faults").items()}
            return Findings(faults, **stored)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        pass  # nothing is remembered, or not in this form: check anew
    found = _look(_Checker(backbone, answers), data, progress)
    if place is not None:
        with suppress(OSError):  # a cache that cannot be written costs time and nothing else
            cache.keep(place, json.dumps(vars(found)).encode())
    return found


def prepare(
    backbone: Backbone, samples: Sequence[Sample], out: list[Skipped] | None = None, *, answers: bool = False
) -> tuple[list[Sample], BatchFeature | None]:
    """Model inputs of a batch as it is met.

    Args:
        out: bad samples are left out and added here; without it the first one raises.

    Returns:
        The samples that can be used, and their inputs; None if there are none.

    Raises:
        DataError: a bad sample, by its name.
    """
    checker, inputs = _Checker(backbone, answers), None
    faults = dict(checker.texts(samples))
    good = [at for at in range(len(samples)) if at not in faults]
    if good:
        try:
            inputs = _inputs(backbone, [samples[at] for at in good])
        except VismemError:
            alone = {at: why for at in good if (why := checker.alone(samples[at]))}
            if not alone:
                raise
            faults |= alone
            good = [at for at in good if at not in alone]
            inputs = _inputs(backbone, [samples[at] for at in good]) if good else None
    for at, why in sorted(faults.items()):
        if out is None:
            raise DataError(f"{samples[at].name}: {why}{f'; {HINT}' if samples[at].place else ''}")
        out.append(left_out(samples[at], why))
    return [samples[at] for at in good], inputs


def left_out(sample: Sample, why: str) -> Skipped:
    """A sample that was left out, by its place in a file or its id."""
    file, _, line = sample.place.rpartition(":")
    return Skipped(int(line), why, file) if line.isdigit() else Skipped(0, f"{sample.name}: {why}")


def _inputs(backbone: Backbone, samples: Sequence[Sample]) -> BatchFeature:
    return backbone.inputs(*asked(samples))


class _Checker:
    """Faults of single samples."""

    def __init__(self, backbone: Backbone, answers: bool) -> None:
        self.backbone, self.answers = backbone, answers
        self.tokenizer = backbone.processor.tokenizer
        self.media = {token: self.tokenizer.convert_ids_to_tokens(token) for token in backbone.placeholders.values()}
        self._by_shapes: dict[Shapes, tuple[str | None, int]] = {((), ()): (None, 0)}
        self._by_files: dict[tuple[Picture, ...], Sizes | str] = {}
        self._video: tuple[Sample, set[int]] | None = None  # the first one with videos, and their numbers of frames

    def texts(self, samples: Sequence[Sample], lengths: list[int] | None = None) -> Iterator[tuple[int, str]]:
        """Indices of samples whose texts cannot be used, and why.

        Args:
            lengths: gets the number of tokens of each sample's texts.
        """
        for at, sample in enumerate(samples):
            count = 0
            texts = [*(text for _, text in sample.turns), sample.prompt]
            parts = [("prompt", piece) for text in texts for piece in text.split(PLACEHOLDER)]
            if self.answers:
                parts.append(("answer", sample.answer or ""))
            for name, text in parts:
                why, tokens = self._text(name, text)
                count += tokens
                if why:
                    yield at, why
                    break
            if lengths is not None:
                lengths.append(count)

    def _text(self, name: str, text: str) -> tuple[str | None, int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"the {name} holds {text[error.start]!r}, half of a character (a lone surrogate)", 0
        for memory in NAMES if name == "answer" else ():
            if memory in text:
                return f"the {name} holds {memory}, which would be learnt as text and invokes nothing: take it out", 0
        if PLACEHOLDER in text:
            return f"the {name} holds {PLACEHOLDER}, which stands for an image", 0
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in self.media.keys() & set(ids):
            return (
                f"the {name} holds {self.media[token]}, this model's own mark of an image: write {PLACEHOLDER} where a "
                "prompt's images stand, and nothing elsewhere"
            ), 0
        return None, len(ids)

    def sizes(self, sample: Sample) -> Sizes | str:
        """The sizes of a sample's images, all of them decoded; or why one does not."""
        files = all(isinstance(image, Path | Frame) for image in sample.images)  # often several questions are about one
        if not files or sample.images not in self._by_files:
            try:
                sizes: Sizes | str = tuple(image.size for image in sample.load_images())
            except DataError as error:
                sizes = str(error).removeprefix(f"{sample.name}: ")
            if not files:
                return sizes
            if len(self._by_files) >= REMEMBERED:
                self._by_files.clear()
            self._by_files[sample.images] = sizes
            return sizes
        return self._by_files[sample.images]

    def alone(self, sample: Sample) -> str | None:
        """Why the model takes no inputs of this sample alone."""
        sizes = self.sizes(sample)
        why = sizes if isinstance(sizes, str) else self.taken(sample, sizes)[0]
        if why is not None:
            return why
        try:
            _inputs(self.backbone, [sample])
        except VismemError as error:
            return str(error).removeprefix(f"{sample.name}: ")
        return None

    def taken(self, sample: Sample, sizes: Sizes) -> tuple[str | None, int]:
        """Whether the processor takes images of these sizes, and how many tokens they come to."""
        frames = tuple((own.at, own.of) if isinstance(own, Frame) else None for own in sample.images)
        if (shapes := (sizes, frames)) not in self._by_shapes:
            plain, own = Sample("", (), "?"), Sample("", sample.images, "?")
            try:
                count, without = (int(_inputs(self.backbone, [one])["attention_mask"].sum()) for one in (own, plain))
                self._try_beside(own, {frame[1] for frame in frames if frame})
                self._by_shapes[shapes] = None, count - without
            except (AttachError, DataError) as error:
                shown = ", ".join(f"{width} x {height}" for width, height in sizes)
                self._by_shapes[shapes] = f"images of {cut(shown)} pixels: {error}", 0
        return self._by_shapes[shapes]

    def _try_beside(self, own: Sample, frames: set[int]) -> None:
        """Some models take videos of one length alone in a batch."""
        if self._video is None and frames:
            self._video = own, frames
        if self._video is not None and frames not in (set(), self._video[1]):
            _inputs(self.backbone, [self._video[0], own])


def _look(checker: _Checker, data: Dataset, progress: Progress | None) -> Findings:
    text = checker.backbone.model.config.get_text_config(decoder=True)
    found = Findings(context=int(getattr(text, "max_position_embeddings", None) or 0))
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1))) as pool:
        for first in range(0, len(data), CHUNK):
            samples = [data[at] for at in range(first, min(first + CHUNK, len(data)))]
            seen = pool.map(checker.sizes, samples)
            lengths: list[int] = []
            faults = dict(checker.texts(samples, lengths))
            found.bare += sum(not own.images for own in samples)
            for at, (sample, sizes) in enumerate(zip(samples, seen, strict=True)):
                why, count = (sizes, 0) if isinstance(sizes, str) else checker.taken(sample, sizes)
                if why := faults.get(at) or why:
                    found.faults[first + at] = why
                    continue
                length = count + lengths[at]
                found.longest = max(found.longest, length)
                if 0 < found.context < length:
                    found.long.append(first + at)
            if progress:
                progress(first + len(samples), len(data))
    return found


def _remembered(backbone: Backbone, data: Dataset, answers: bool) -> Path:
    processor, model = backbone.processor, backbone.model.config
    parts: list[Any] = [VERSION, data.told, len(data), answers, type(backbone).__qualname__, model.model_type]
    parts += [type(processor).__qualname__, len(processor.tokenizer), getattr(processor, "chat_template", None)]
    for medium in ("image", "video"):
        own: Any = getattr(processor, f"{medium}_processor", None)
        parts.append(own.to_json_string() if hasattr(own, "to_json_string") else repr(own))
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    return cache.folder("checks") / f"{key}.json"
