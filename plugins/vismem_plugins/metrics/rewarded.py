"""Rewards as metrics: whatever training may optimise can be measured, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    """The best value of a reward over a sample's references."""
    reward = parse([f"{name}:{argument}" if argument else name])

    def scores(predictions: Sequence[str], samples: Sequence[Sample], /) -> list[float]:
        asked = [
            (at, Written(text), replace(sample, answer=own))
            for at, (text, sample) in enumerate(zip(predictions, samples, strict=True))
            for own in dict.fromkeys(sample.references) or (sample.answer,)
        ]
        told = score(reward, [own for _, own, _ in asked], [own for _, _, own in asked])
        best = [0.0] * len(samples)
        for (at, _, _), value in zip(asked, told, strict=True):
            best[at] = max(best[at], value)
        return best

    return scores
