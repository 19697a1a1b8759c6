"""Rewards for short texts: the same text, a text that holds it, and shared words."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from vismem_core.answers.reward import Reward, Written, by_row, reference
from vismem_core.files.samples import Sample
from vismem_plugins import metrics

from . import no_argument

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(argument: str) -> Reward:
    """1 for the reference's text, whatever its case and spacing, else 0."""
    no_argument("exact", argument)

    def reward(answers: Sequence[Written], samples: Sequence[Sample], /) -> list[float]:
        for sample in samples:
            reference(sample)
        return metrics.exact([answer.text for answer in answers], samples)

    return reward


def substring(argument: str) -> Reward:
    """1 for an answer that holds the reference's text, whatever its case and spacing, else 0."""
    no_argument("substring", argument)
    return by_row(lambda text, sample: float(metrics.plain(reference(sample)) in metrics.plain(text)))


def f1(argument: str) -> Reward:
    """Harmonic mean of precision and recall over words, in lower case, without articles and ASCII punctuation.

    As in SQuAD's evaluation: https://rajpurkar.github.io/SQuAD-explorer/
    """
    no_argument("f1", argument)
    return by_row(lambda text, sample: _f1(_words(text), _words(reference(sample))))


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found and not wanted:  # a reference of nothing but articles is met by nothing
        return 1.0
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", metrics.composed(text).lower().translate(NO_PUNCTUATION)).split()
