"""Frames of videos, evenly spread: each decoded as an image that knows where in its video it stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vismem_core.errors import DataError

EXTRA = "pip install 'vismem[video]'"
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,ogg,gif"
"""Of files that hold videos, and not lists of other files and addresses, which FFmpeg would open too."""
MOST = 10_000
"""Frames that are decoded to come to one."""
STILL = "still"
"""Under which name a decoded frame's ``info`` holds its :class:`Still`."""


@dataclass(frozen=True)
class Frame:
    """One of ``of`` frames of a video, of equally long parts the middle ones; ``at`` counts from 0."""

    path: Path
    at: int
    of: int

    def __str__(self) -> str:
        return f"{self.path} (frame {self.at + 1} of {self.of})"


@dataclass(frozen=True)
class Still:
    """Where a decoded frame stands: which of its file's ``total`` frames it is, from 0, and their ``rate`` a second."""

    frame: Frame
    index: int
    rate: float
    total: int

    @classmethod
    def of(cls, picture: Image.Image) -> Still | None:
        """Of a decoded picture; None where it is no video's."""
        own = picture.info.get(STILL)
        return own if isinstance(own, cls) else None


def decode_frame(frame: Frame) -> Image.Image:
    """What the video shows at the frame's time, upright, with its :class:`Still`.

    Raises:
        DataError: it does not decode, or PyAV is not installed; the message does not say which video.
    """
    with _Opened(frame.path) as (container, stream, length):
        start = float((stream.start_time or 0) * stream.time_base)
        wanted = (frame.at + 0.5) / frame.of * length + start
        container.seek(int(wanted / stream.time_base), stream=stream)
        found = None
        for number, later in enumerate(container.decode(stream)):
            if found is not None and (later.time is None or later.time > wanted + 1e-6 or number > MOST):
                break
            found = later
        if found is None:
            raise DataError("holds no frame there")
        image: Image.Image = found.to_image()
        turn = getattr(found, "rotation", 0)
        image = image.rotate(turn, expand=True) if turn else image
        rate = float(stream.average_rate or stream.frames / length or 1 / length)
        total = max(1, stream.frames or round(length * rate))
        index = min(total - 1, max(0, round(((found.time or start) - start) * rate)))
        image.info[STILL] = Still(frame, index, rate, total)
        return image


def verify_video(path: Path) -> None:
    """Check that a file is a video, without decoding it.

    Raises:
        DataError: see :func:`decode_frame`.
    """
    with _Opened(path):
        pass


class _Opened:
    """A video's container, its first stream of pictures, and its seconds; whatever goes wrong with it as DataError."""

    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError as error:
            raise DataError(f"reading it takes PyAV: {EXTRA}") from error
        self.path, self.av = path, av

    def __enter__(self) -> tuple[Any, Any, float]:
        try:
            self.file = self.path.open("rb")
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from error
        try:
            self.container: Any = self.av.open(
                self.file, options={"format_whitelist": FORMATS, "protocol_whitelist": "data"}
            )
            return self._stream()
        except Exception as error:  # damaged files make FFmpeg raise nearly anything
            self.file.close()
            raise _told(error) from error

    def _stream(self) -> tuple[Any, Any, float]:
        stream: Any = next(iter(self.container.streams.video), None)
        if stream is None:
            raise DataError("holds no video")
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        if limit and stream.codec_context.width * stream.codec_context.height > limit:
            raise DataError(f"has frames of more than {limit:,} pixels")
        length = float(stream.duration * stream.time_base) if stream.duration else (self.container.duration or 0) / 1e6
        if not length > 0:
            raise DataError("does not say how long it is")
        return self.container, stream, length

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.container.close()
        self.file.close()
        if isinstance(error, Exception):
            raise _told(error) from error


def _told(error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    return DataError(f"does not decode as a video: {' '.join(str(error).split())[:200]}")
