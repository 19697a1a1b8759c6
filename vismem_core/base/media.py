"""What prompts show, in order: images, and videos, which are all frames of one side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from PIL.Image import Image

from .images import PLACEHOLDER
from .videos import Still


@dataclass(frozen=True)
class Media:
    """What one prompt shows.

    Attributes:
        texts: of its turns, with one mark for each medium, or none at all.
        shown: in the order of the marks, an image, or a video as the list of its frames.
    """

    texts: list[str]
    shown: list[Image | list[Image]]

    @classmethod
    def of(cls, texts: Sequence[str], pictures: Sequence[Image]) -> Media:
        """Pictures with all frames of a video next to each other, and nothing between their marks, as that video."""
        gaps, marks = _gaps(texts), sum(text.count(PLACEHOLDER) for text in texts)
        if marks not in (0, len(pictures)):  # who places them says what is wrong
            return cls(list(texts), list(pictures))
        shown: list[Image | list[Image]] = []
        first: list[int] = []
        at = 0
        while at < len(pictures):
            count = _frames(pictures[at:])
            count = count if not marks or not any(gaps[at : at + count - 1]) else 0
            first.append(at)
            shown.append(list(pictures[at : at + count]) if count else pictures[at])
            at += count or 1
        return cls(_kept(texts, set(first)), shown)

    @property
    def kinds(self) -> list[str]:
        """``image`` or ``video``, for each that is shown."""
        return ["video" if isinstance(own, list) else "image" for own in self.shown]

    @property
    def images(self) -> list[Image]:
        return [own for own in self.shown if not isinstance(own, list)]

    @property
    def videos(self) -> list[list[Image]]:
        return [own for own in self.shown if isinstance(own, list)]


def arguments(rows: Sequence[Media]) -> dict[str, Any]:
    """What a processor takes beside the prompts of rows."""
    told: dict[str, Any] = {}
    if any(row.images for row in rows):
        told["images"] = [row.images for row in rows]
    if videos := [video for row in rows for video in row.videos]:
        told["videos"] = videos
        told["videos_kwargs"] = {"video_metadata": list(map(about, videos)), "do_sample_frames": False}
    return told


def named(rows: Sequence[Media]) -> str:
    """What was asked of a processor, for a message; and what to do where it may be too many kinds of videos."""
    counts = sorted({len(video) for row in rows for video in row.videos})
    if len(counts) < 2:
        return "prompts and images"
    return f"videos of {' and '.join(map(str, counts))} frames in one batch; give all rows the same 'frames'"


def about(video: Sequence[Image]) -> dict[str, Any]:
    """What a video processor is told of frames that were chosen already (``VideoMetadata`` of transformers)."""
    stills = [own for picture in video if (own := Still.of(picture)) is not None]
    rate, total = stills[0].rate, stills[0].total
    size = {"width": video[0].width, "height": video[0].height}
    indices = [own.index for own in stills]
    return {"total_num_frames": total, "fps": rate, "duration": total / rate, "frames_indices": indices, **size}


def _frames(pictures: Sequence[Image]) -> int:
    """How many of the first pictures are all the frames of one video, in order; 0 if the first begins none."""
    if (first := Still.of(pictures[0])) is None or first.frame.at:
        return 0
    own = [still and still.frame for still in map(Still.of, pictures[: first.frame.of])]
    whole = all(frame and (frame.path, frame.at) == (first.frame.path, at) for at, frame in enumerate(own))
    return first.frame.of if whole and len(own) == first.frame.of else 0


def _gaps(texts: Sequence[str]) -> list[bool]:
    """For each mark, whether something stands between it and the next one."""
    return [
        at == last or bool(piece)
        for text in texts
        for last in [text.count(PLACEHOLDER) - 1]
        for at, piece in enumerate(text.split(PLACEHOLDER)[1:])
    ]


def _kept(texts: Sequence[str], marks: set[int]) -> list[str]:
    """The texts with some of their marks, counted through all of them."""
    starts = accumulate((text.count(PLACEHOLDER) for text in texts), initial=0)
    told = []
    for start, text in zip(starts, texts, strict=False):
        first, *pieces = text.split(PLACEHOLDER)
        told.append(first + "".join(PLACEHOLDER * (start + at in marks) + own for at, own in enumerate(pieces)))
    return told
