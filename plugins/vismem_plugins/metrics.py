"""Metrics: how good predictions are, from 0 to 1 each."""

import unicodedata
from collections.abc import Sequence

from vismem_core.files.samples import Sample


def exact(predictions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """1 where a prediction is the sample's answer, whatever its case and spacing, else 0."""
    pairs = zip(predictions, samples, strict=True)
    return [float(plain(text) == plain(sample.answer or "")) for text, sample in pairs]


def ending(predictions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """As ``exact``, of what stands behind the last colon: the end of an answer that reasons first."""
    pairs = zip(predictions, samples, strict=True)
    return [float(_end(text) == _end(sample.answer or "")) for text, sample in pairs]


def _end(text: str) -> str:
    return plain(text.rpartition(":")[2])


def plain(text: str) -> str:
    """``text`` in lower case, with one space wherever it had any, and accents written one way."""
    return " ".join(composed(unicodedata.normalize("NFD", text).casefold()).split())


def composed(text: str) -> str:
    """``text`` with each accented letter as one character (Unicode's NFC): systems write them in two ways."""
    return unicodedata.normalize("NFC", text)
