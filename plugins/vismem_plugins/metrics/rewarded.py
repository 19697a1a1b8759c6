"""Rewards as metrics: whatever training may optimise can be measured, too."""

from __future__ import annotations

from collections.abc import Sequence

from vismem_core.answers.metric import Scores
from vismem_core.answers.reward import Written, parse, score
from vismem_core.files.samples import Sample


def choice(argument: str) -> Scores:
    """The right option of a multiple choice, by its letter or its text; see the reward of this name."""
    return _of("choice", argument)


def judge(argument: str) -> Scores:
    """``judge:URL[#MODEL]``, the grade that a language model gives; see the reward of this name."""
    return _of("judge", argument)


def _of(name: str, argument: str) -> Scores:
    """A reward's value, which is the best over a sample's references."""
    reward = parse([f"{name}:{argument}" if argument else name])

    def scores(predictions: Sequence[str], samples: Sequence[Sample], /) -> list[float]:
        return score(reward, [Written(text) for text in predictions], samples)

    return scores
