"""Metrics for short texts, and what they hold for the same: case, spacing, accents."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

from vismem_core.answers.metric import Scores
from vismem_core.files.samples import Sample

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
THRESHOLD = 0.5
"""A likeness below which an answer is another one, and not the reference misspelt."""
TOLERANCE = 0.05
"""How far off a number may be, as a share of the reference."""


def best(rule: Callable[[str, str], float]) -> Scores:
    """The metric that is the best value of ``rule(prediction, reference)`` over a sample's references."""

    def scores(predictions: Sequence[str], samples: Sequence[Sample], /) -> list[float]:
        pairs = zip(predictions, samples, strict=True)
        return [max(rule(text, own) for own in sample.references or ("",)) for text, sample in pairs]

    return scores


def plain(text: str) -> str:
    """``text`` in lower case, with one space wherever it had any, and accents written one way."""
    return " ".join(composed(unicodedata.normalize("NFD", text).casefold()).split())


def composed(text: str) -> str:
    """``text`` with each accented letter as one character (Unicode's NFC): systems write them in two ways."""
    return unicodedata.normalize("NFC", text)


def shared_words(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, in lower case, without articles and ASCII punctuation."""
    found, wanted = _words(text), _words(reference)
    if not found and not wanted:  # a reference of nothing but articles is met by nothing
        return 1.0
    shared = (Counter(found) & Counter(wanted)).total()
    return 2 * shared / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", composed(text).lower().translate(NO_PUNCTUATION)).split()


def _same(text: str, reference: str) -> float:
    return float(plain(text) == plain(reference))


def _same_end(text: str, reference: str) -> float:
    return _same(text.rpartition(":")[2], reference.rpartition(":")[2])


def _alike(text: str, reference: str) -> float:
    found, wanted = plain(text), plain(reference)
    likeness = 1 - edits(found, wanted) / max(len(found), len(wanted), 1)
    return likeness if likeness >= THRESHOLD else 0.0


def edits(first: str, second: str) -> int:
    """Levenshtein's distance: the fewest characters to insert, remove or replace."""
    row = list(range(len(second) + 1))
    for above, letter in enumerate(first):
        corner, row[0] = row[0], above + 1
        for at, other in enumerate(second, 1):
            corner, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, corner + (letter != other))
    return row[-1]


def _close(text: str, reference: str) -> float:
    found, wanted = _number(text), _number(reference)
    if found is None or wanted is None:
        return _same(text, reference)
    return float(abs(found - wanted) <= TOLERANCE * abs(wanted))


def _number(text: str) -> float | None:
    """The number that a text is, percents as shares; one that merely holds a number is none."""
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


exact = best(_same)
"""1 for one of the references, whatever its case and spacing, else 0."""
ending = best(_same_end)
"""As ``exact``, of what stands behind the last colon: the end of an answer that reasons first."""
anls = best(_alike)
"""Normalised Levenshtein similarity, 0 where it is below .5 (ANLS; Biten et al., arXiv 1905.13648)."""
relaxed = best(_close)
"""1 for a number within 5% of the reference, and else for its text (ChartQA; Masry et al., arXiv 2203.10244)."""
f1 = best(shared_words)
"""Words shared with a reference, as in SQuAD's evaluation: https://rajpurkar.github.io/SQuAD-explorer/"""
