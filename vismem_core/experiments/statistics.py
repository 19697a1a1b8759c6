"""What scores say: means over seeds with their standard errors, and differences of rows with an interval.

Rows answer the same questions, so a difference is told question by question: scores are averaged over seeds first, and
questions are drawn again with replacement (a paired bootstrap, of fixed draws).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

import torch

DRAWS = 4000
LEVEL = 0.95
Scores = dict[str, list[float]]
"""By type of question."""


@dataclass(frozen=True)
class Mean:
    """Attributes:
    mean: over seeds.
    error: the standard error of that over seeds; None of one seed.
    seeds: the mean under each.
    """

    mean: float
    error: float | None
    seeds: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Attributes:
    mean: of the one's scores less the other's.
    low, high: the interval of 95%.
    effect: the mean over the standard deviation of the questions' differences (Cohen's d, paired).
    questions: how many were compared.
    """

    mean: float
    low: float
    high: float
    effect: float
    questions: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def mean(values: Sequence[float]) -> Mean:
    """Of one figure under each seed."""
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else None
    return Mean(fmean(values), error, tuple(values))


def accuracy(seeds: Sequence[Scores], types: Sequence[str]) -> Mean | None:
    """The mean over types of question, each its own mean, over seeds; None where none was asked."""
    asked = [[fmean(scores[name]) for name in types if scores.get(name)] for scores in seeds]
    return mean([fmean(own) for own in asked]) if asked and all(asked) else None


def paired(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> Difference:
    """The difference of two rows of scores (seeds, questions); the questions are the same.

    Raises:
        ValueError: they are not as many.
    """
    ours, theirs = (torch.tensor([list(own) for own in rows], dtype=torch.float64).mean(0) for rows in (one, other))
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} questions and {len(theirs)}")
    gaps = ours - theirs
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(gaps), (DRAWS, len(gaps)), generator=generator)
    low, high = gaps[drawn].mean(1).quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    spread = float(gaps.std()) if len(gaps) > 1 else 0.0
    effect = float(gaps.mean()) / spread if spread > 0 else 0.0
    return Difference(float(gaps.mean()), float(low), float(high), effect, len(gaps))
