"""The interface of rewards: what reinforcement optimises, from 0 to 1 for each answer.

A reward is a plain callable over lists. One that cannot tell raises, and training stops: a failure that counted as 0
would teach the policy to avoid what the reward cannot read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from operator import mul
from typing import Protocol

from vismem_core.errors import ConfigError, RewardError, ServiceError
from vismem_core.files.samples import Sample
from vismem_core.plugins import reason, registry


@dataclass(frozen=True)
class Written:
    """What the model wrote for one sample.

    Attributes:
        text: the answer without memory tokens.
        ids: its token ids, with memory tokens.
    """

    text: str
    ids: tuple[int, ...] = ()


PATIENCE = 600.0
"""Seconds that a reward waits for a service that is away, unless settings say otherwise."""


class Reward(Protocol):
    """Scores a batch of answers.

    One that asks a service may have an attribute ``patience``: ``train.grpo.patience`` is assigned to it, the seconds
    that it should wait while the service is away.
    """

    def __call__(self, answers: Sequence[Written], samples: Sequence[Sample], /) -> list[float]:
        """One number from 0 to 1 per answer, higher is better; ``samples`` holds each answer's question.

        Whatever it raises stops training.
        """


@dataclass(frozen=True)
class Part:
    """One reward of a sum; ``spec`` names it in messages."""

    spec: str
    weight: float
    reward: Reward


@dataclass(frozen=True)
class Weighted:
    """The weighted mean of rewards, sum(w * r) / sum(w); each is checked as ``score`` does."""

    parts: tuple[Part, ...]

    def __call__(self, answers: Sequence[Written], samples: Sequence[Sample], /) -> list[float]:
        columns = [score(part.reward, answers, samples, part.spec) for part in self.parts]
        weights = [part.weight for part in self.parts]
        total = math.fsum(weights)  # fsum rounds once, so the mean of ones is 1 and not a little more
        return [math.fsum(map(mul, weights, row)) / total for row in zip(*columns, strict=True)]


def parse(specs: Sequence[str], patience: float = PATIENCE) -> Reward:
    """A reward from specs ``[WEIGHT*]NAME[:ARGUMENT]``: ``exact``, ``0.3*f1``, ``number:0.01``.

    Args:
        patience: seconds that rewards wait for a service which is away.

    Returns:
        Their weighted sum divided by the sum of the weights; a weight that is not given is 1.

    Raises:
        PluginError: for an unknown name.
        ConfigError: for no spec, a weight that is not above 0, or an argument the reward does not take.
    """
    if not specs:
        raise ConfigError(f"no reward is given; known: {', '.join(registry('rewards').names())}")
    parts = tuple(_part(spec) for spec in specs)
    for part in parts:
        if hasattr(part.reward, "patience"):
            part.reward.patience = patience
    return Weighted(parts)


def score(
    reward: Reward, answers: Sequence[Written], samples: Sequence[Sample], name: str | None = None
) -> list[float]:
    """The reward of each answer, checked.

    Args:
        name: of the reward in messages; without it, the callable's own.

    Raises:
        RewardError: the reward raised, or gave another number of values or one that is not from 0 to 1; the message
            names the reward and the sample.
    """
    if len(answers) != len(samples):
        raise RewardError(f"{len(answers)} answers to {len(samples)} samples")
    if not samples:
        return []
    if isinstance(reward, Weighted):  # checks its own parts, by their names
        return reward(answers, samples)
    name = name or getattr(reward, "__name__", type(reward).__name__)
    try:
        values = reward(answers, samples)
    except ServiceError:
        raise
    except Exception as error:  # whatever a reward does wrong
        raise RewardError(f"reward {name} failed on {_culprit(reward, answers, samples, error)}") from error
    if not isinstance(values, Sequence) or len(values) != len(samples):
        raise RewardError(
            f"reward {name} must give a list of {len(samples)} numbers for {_span(samples)}, {_got(values)}"
        )
    for value, sample in zip(values, samples, strict=True):
        if not isinstance(value, Real) or not 0 <= value <= 1:  # nan is in no range
            raise RewardError(f"reward {name} gave {value!r} for sample {sample.id!r}; rewards are from 0 to 1")
    return [float(value) for value in values]


def by_row(rule: Callable[[str, Sample], float]) -> Reward:
    """A reward that takes one answer's text and its sample at a time: the best over the sample's references.

    A reference that the rule cannot read, and raises for, counts only where it can read none of them.
    """

    def reward(answers: Sequence[Written], samples: Sequence[Sample], /) -> list[float]:
        return [_best(rule, answer.text, sample) for answer, sample in zip(answers, samples, strict=True)]

    return reward


def _best(rule: Callable[[str, Sample], float], text: str, sample: Sample) -> float:
    values: list[float] = []
    failed: RewardError | None = None
    for own in dict.fromkeys(sample.references) or (sample.answer,):
        try:
            values.append(rule(text, replace(sample, answer=own, references=())))
        except RewardError as error:
            failed = failed or error
    if failed and not values:
        raise failed
    return max(values)


def reference(sample: Sample) -> str:
    """The sample's answer.

    Raises:
        RewardError: it has none, so that nothing can be compared with it.
    """
    if sample.answer is None or not sample.answer.strip():
        raise RewardError("the sample has no answer to compare with")
    return sample.answer


def _part(spec: str) -> Part:
    head, _, argument = spec.partition(":")  # the argument may hold stars and colons
    weight, star, name = head.rpartition("*")
    reward = registry("rewards").get(name.strip())(argument.strip())
    if not callable(reward):
        raise ConfigError(f"reward {name!r} gave {type(reward).__name__} instead of a callable")
    return Part(spec, _weight(spec, weight) if star else 1.0, reward)


def _weight(spec: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"reward {spec!r}: a weight is a number above 0, as in 0.3*f1, not {text!r}")
    return weight


def _culprit(reward: Reward, answers: Sequence[Written], samples: Sequence[Sample], error: Exception) -> str:
    """The first sample that fails alone and why it does; the whole batch if none fails alone."""
    for answer, sample in zip(answers, samples, strict=True):
        try:
            reward([answer], [sample])
        except Exception as own:  # whatever a reward does wrong
            return f"sample {sample.id!r}: {reason(own)}"
    return f"{_span(samples)}, though on none of them alone: {reason(error)}"


def _span(samples: Sequence[Sample]) -> str:
    return f"samples {samples[0].id!r} to {samples[-1].id!r}"


def _got(values: object) -> str:
    return f"not {len(values)}" if isinstance(values, Sequence) else f"not {type(values).__name__}"
