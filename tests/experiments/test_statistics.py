"""Means, standard errors and paired intervals against numbers worked out apart."""

import random
from math import sqrt

import numpy as np
import pytest

from vismem_core.experiments.statistics import accuracy, mean, paired


def test_the_mean_over_seeds_and_its_error() -> None:
    told = mean([0.5, 0.7, 0.9])
    assert (told.mean, told.seeds) == (pytest.approx(0.7), (0.5, 0.7, 0.9))
    assert told.error == pytest.approx(0.2 / sqrt(3))  # the standard deviation of 0.5, 0.7, 0.9 is 0.2
    assert mean([0.5]).error is None


def test_accuracy_is_the_mean_over_types_not_over_questions() -> None:
    seeds = [{"a": [1.0, 1.0, 1.0, 0.0], "b": [0.0]}, {"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0]}]
    told = accuracy(seeds, ["a", "b", "never asked"])
    assert told is not None
    assert told.seeds == (0.375, 0.625)
    assert accuracy(seeds, ["never asked"]) is None


def test_paired_differences_of_questions() -> None:
    one, other = [[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]], [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]]
    gaps = np.array([1.0, -0.5, 0.0, 0.5])  # means over seeds: 1, .5, 0, 1 and 0, 1, 0, .5
    told = paired(one, other)
    assert told.mean == pytest.approx(gaps.mean())
    assert told.effect == pytest.approx(gaps.mean() / gaps.std(ddof=1))
    assert told.questions == 4
    assert told.low < 0 < told.high
    assert not told.clear
    with pytest.raises(ValueError, match="4 questions and 3"):
        paired(one, [[0.0] * 3])


def test_the_interval_is_that_of_the_normal_distribution_where_there_are_many_questions() -> None:
    rng = random.Random(0)
    gaps = np.array([rng.choice([0.0, 0.0, 1.0, -1.0, 1.0]) for _ in range(2000)])
    told = paired([(gaps + 1).tolist()], [[1.0] * len(gaps)])
    error = gaps.std(ddof=1) / sqrt(len(gaps))
    assert told.low == pytest.approx(gaps.mean() - 1.96 * error, abs=0.15 * error)
    assert told.high == pytest.approx(gaps.mean() + 1.96 * error, abs=0.15 * error)
    assert told.clear
    assert paired([gaps.tolist()], [gaps.tolist()]).effect == 0.0


def test_intervals_hold_what_they_promise() -> None:
    """Of many experiments with a known difference, about 95 of 100 intervals hold it."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        one, other = rng.random((1, 80)) < 0.6, rng.random((1, 80)) < 0.4
        told = paired(one.astype(float).tolist(), other.astype(float).tolist())
        held += told.low <= 0.2 <= told.high
    assert 180 <= held <= 199
