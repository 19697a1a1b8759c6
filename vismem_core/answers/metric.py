"""The interface of metrics: how good answers are, and what that makes of a whole set of them.

A metric gives a number for each answer. Most say of a set what its answers come to on average; one that knows more of
a set than that, as BLEU does, has a method ``corpus`` besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

from vismem_core.errors import ConfigError, MetricError, VismemError
from vismem_core.files.samples import Sample
from vismem_core.plugins import reason, registry


class Scores(Protocol):
    """A plain callable over lists: what a plugin registers as a metric.

    It may have a method ``corpus(predictions, samples) -> float``, for a set whose value is not the mean of its
    answers' values.
    """

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample], /) -> list[float]:
        """A number for each prediction, higher is better, most from 0 to 1; whatever it raises ends the evaluation."""


@dataclass(frozen=True)
class Metric:
    """A metric under its name, whose results are checked.

    Attributes:
        spec: how it was asked for, ``NAME[:ARGUMENT]``.
        name: without the argument, which may be a long address.
    """

    spec: str
    scores: Scores

    @property
    def name(self) -> str:
        return self.spec.partition(":")[0]

    def __call__(self, predictions: Sequence[str], samples: Sequence[Sample]) -> list[float]:
        """The value of each answer.

        Raises:
            MetricError: the metric raised, or gave something else than a number for each answer.
        """
        values = self._told(self.scores, predictions, samples)
        if not isinstance(values, Sequence) or len(values) != len(samples):
            raise MetricError(f"metric {self.spec} must give a list of {len(samples)} numbers")
        return [self._number(value) for value in values]

    def over(self, predictions: Sequence[str], samples: Sequence[Sample]) -> float:
        """The value of a set that is not empty; errors as in a call."""
        corpus = getattr(self.scores, "corpus", None)
        if corpus is not None:
            return self._number(self._told(corpus, predictions, samples))
        return math.fsum(self(predictions, samples)) / len(samples)

    def _told(self, rule: Callable[..., object], predictions: Sequence[str], samples: Sequence[Sample]) -> object:
        try:
            return rule(predictions, samples)
        except VismemError as error:
            raise MetricError(f"metric {self.spec}: {error}") from error
        except Exception as error:  # whatever a metric does wrong
            raise MetricError(f"metric {self.spec} failed: {reason(error)}") from error

    def _number(self, value: object) -> float:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise MetricError(f"metric {self.spec} gave {value!r} instead of a number")
        return float(value)


def parse(spec: str) -> Metric:
    """The metric of a spec ``NAME[:ARGUMENT]``, such as ``vqa`` or ``judge:http://127.0.0.1:8000/v1``.

    Raises:
        PluginError: an unknown name.
        ConfigError: an argument that it does not take, or a package of its that is not installed.
    """
    name, colon, argument = spec.partition(":")
    entry = registry("metrics").entry(name)
    if entry.facts.get("made"):
        return Metric(spec, entry.load()(argument))
    if colon:
        raise ConfigError(f"metric {name} takes no argument, not {argument!r}")
    return Metric(spec, entry.load())
