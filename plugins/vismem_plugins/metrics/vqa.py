"""VQA accuracy: how far people agree with an answer (Antol et al., arXiv 1505.00468).

Of every reference, the answer is compared with all others: min(how many of them it is / 3, 1). The accuracy is the mean
over references, so that people are measured as the model is. What is compared is written alike first, by the rules of
https://visualqa.org/evaluation.html.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vismem_core.files.samples import Sample

ENOUGH = 3
"""People whose word makes an answer right."""
MARKS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(value) for value, word in enumerate(DIGITS.split())} | {"none": "0"}
APOSTROPHES = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he's how'd how's i'm i've isn't "
    "it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock shan't she's should've shouldn't "
    "somebody's someone's something's that'd that's there'd there's they'd they'll they're they've wasn't we've "
    "weren't what's what've when's where's who'd who's who've why's won't would've wouldn't y'all you'd you'll you're "
    "you've"
)
CONTRACTIONS = {own.replace("'", ""): own for own in APOSTROPHES.split()}
"""By what they are without their apostrophe."""


def vqa(predictions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
    """VQA accuracy over all references; with fewer than four of them, all others must agree, and one is that one."""
    pairs = zip(predictions, samples, strict=True)
    return [accuracy(text, sample.references or ("",)) for text, sample in pairs]


def accuracy(text: str, references: Sequence[str]) -> float:
    """The accuracy of one answer."""
    told = normal(text)
    same = [normal(own) == told for own in references]
    if len(same) == 1:
        return float(same[0])
    enough = min(ENOUGH, len(same) - 1)
    return sum(min((sum(same) - own) / enough, 1.0) for own in same) / len(same)


def normal(text: str) -> str:
    """``text`` as it is compared.

    In lower case, numbers up to ten as digits, without articles, with the apostrophes of contractions. Marks become
    spaces between two words, and vanish beside a space or where digits are set off by commas; periods stay in numbers.
    """
    text = " ".join(text.split())
    grouped, written = re.search(r"\d,\d", text), text
    for mark in MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        written = written.replace(mark, "" if beside or grouped else " ")
    words = re.sub(r"\.(?!\d)", "", written).lower().split()
    named = (NUMBERS.get(own, own) for own in words)
    return " ".join(CONTRACTIONS.get(own, own) for own in named if own not in ARTICLES)
