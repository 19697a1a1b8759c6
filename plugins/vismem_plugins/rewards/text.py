"""Rewards for short texts: the same text, a text that holds it, and shared words."""

from __future__ import annotations

from collections.abc import Sequence

from vismem_core.answers.metric import Scores
from vismem_core.answers.reward import Reward, Written, by_row, reference
from vismem_core.files.samples import Sample
from vismem_plugins.metrics import text as metrics

from . import no_argument


def exact(argument: str) -> Reward:
    """1 for a reference's text, whatever its case and spacing, else 0."""
    no_argument("exact", argument)
    return _measured(metrics.exact)


def substring(argument: str) -> Reward:
    """1 for an answer that holds the reference's text, whatever its case and spacing, else 0."""
    no_argument("substring", argument)
    return by_row(lambda text, sample: float(metrics.plain(reference(sample)) in metrics.plain(text)))


def f1(argument: str) -> Reward:
    """Harmonic mean of precision and recall over words, as the metric ``f1``."""
    no_argument("f1", argument)
    return _measured(metrics.f1)


def _measured(scores: Scores) -> Reward:
    """A metric as a reward: it wants something to compare with."""

    def reward(answers: Sequence[Written], samples: Sequence[Sample], /) -> list[float]:
        for sample in samples:
            reference(sample)
        return scores([answer.text for answer in answers], samples)

    return reward
