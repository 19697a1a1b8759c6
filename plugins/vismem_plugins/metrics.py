"""Metrics: how good predictions are, from 0 to 1 each."""

from collections.abc import Sequence

from vismem_core.data import Sample


def exact(predictions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """1 where a prediction is the sample's answer, whatever its case and spacing, else 0."""
    pairs = zip(predictions, samples, strict=True)
    return [float(plain(text) == plain(sample.answer or "")) for text, sample in pairs]


def plain(text: str) -> str:
    """``text`` in lower case, with one space wherever it had any."""
    return " ".join(text.casefold().split())
