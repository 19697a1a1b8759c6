"""Samples and rewards that the training tests share."""

from __future__ import annotations

from collections.abc import Sequence

import tiny

from vismem_core.data import Sample
from vismem_core.reward import Written

SAMPLES = [
    Sample("one", (tiny.picture(32, 32, 0),), "what is on the left ?", "a bag , a coat ."),
    Sample("two", (tiny.picture(48, 32, 1), tiny.picture(16, 40, 2)), "and ?", "boot"),
    Sample("none", (), "what is it ?", "a boot , what ?"),
    Sample("more", (tiny.picture(24, 56, 3),), "is it a boot ?", "the coat , the bag , the boot ."),
]


def even(answers: Sequence[Written], samples: Sequence[Sample]) -> list[float]:
    """A reward with signal in any group: the share of even ids."""
    return [sum(token % 2 == 0 for token in own.ids) / len(own.ids) for own in answers]


def right_arm(answers: Sequence[Written], samples: Sequence[Sample]) -> list[float]:
    """1 for an answer that invokes first, and as a kind, what its sample's answer names; 300 + are memory tokens."""
    return [float(any(arm(token) == sample.answer for token in own.ids)) for own, sample in zip(answers, samples)]  # noqa: B905


def arm(token: int) -> str:
    """The kind that an id of the tiny model invokes."""
    return {FIRST: "short", FIRST + 1: "long"}.get(token, "")


FIRST = 0  # set by the test, which knows the model
