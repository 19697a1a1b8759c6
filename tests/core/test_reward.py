"""Specs of rewards, their weighted mean, and what is said of a reward that fails."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from vismem_core.answers.reward import Part, Reward, Weighted, Written, by_row, parse, score
from vismem_core.errors import ConfigError, PluginError, RewardError
from vismem_core.files.samples import Sample

SAMPLES = [Sample(name, (), "which animal ?", "black cat") for name in ("s0", "s1", "s2")]
ANSWERS = [Written("Black  cat", (5, 900, 6)), Written("a cat"), Written("dog")]


def gives(*values: object) -> Reward:
    """A reward whose batch call gives ``values``, whatever they are."""
    return lambda answers, samples: list(values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        (["exact"], [1, 0, 0]),
        (["f1"], [1, 2 / 3, 0]),
        (["2*exact"], [1, 0, 0]),
        (["exact", "f1"], [1, 1 / 3, 0]),
        (["3 * exact", "1*f1"], [1, 1 / 6, 0]),
        (["exact", "0.5*f1", "0.5*substring"], [1, 1 / 6, 0]),
    ],
)
def test_the_sum_is_divided_by_the_weights(specs: list[str], expected: list[float]) -> None:
    assert score(parse(specs), ANSWERS, SAMPLES) == pytest.approx(expected)


def test_a_mean_of_ones_is_one() -> None:
    weights = (0.1, 0.2, 0.3, 0.7, 1.1)
    assert sum(weights) != math.fsum(weights)  # plain sums would not do
    reward = Weighted(tuple(Part(str(weight), weight, gives(1.0, 1.0, 1.0)) for weight in weights))
    assert score(reward, ANSWERS, SAMPLES) == [1, 1, 1]


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ([], ConfigError, "no reward is given; known: .*exact"),
        (["exacct"], PluginError, "unknown reward 'exacct'; did you mean 'exact'"),
        (["exact", "x*f1"], ConfigError, r"reward 'x\*f1': a weight is a number above 0, as in 0.3\*f1, not 'x'"),
        (["*f1"], ConfigError, "not ''"),
        (["0*f1"], ConfigError, "not '0'"),
        (["-1*f1"], ConfigError, "not '-1'"),
        (["nan*f1"], ConfigError, "not 'nan'"),
        (["inf*f1"], ConfigError, "not 'inf'"),
        (["exact:1"], ConfigError, "reward exact takes no argument, not '1'"),
    ],
)
def test_bad_specs(specs: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(specs)


def test_an_argument_may_hold_stars_and_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "vm_own_reward.py").write_text("def half(answers, samples): return [0.5] * len(answers)\n")
    assert score(parse(["0.5*call:vm_own_reward:half", "exact"]), ANSWERS[:1], SAMPLES[:1]) == pytest.approx([5 / 6])
    with pytest.raises(ConfigError, match=r"not 'a\*b:c'"):
        parse(["call:a*b:c"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.5, 1.5, 0), "reward mine gave 1.5 for sample 's1'; rewards are from 0 to 1"),
        ((0.5, 0, -0.1), "gave -0.1 for sample 's2'"),
        ((math.nan, 0, 0), "gave nan for sample 's0'"),
        ((0, math.inf, 0), "gave inf for sample 's1'"),
        ((0, None, 0), "gave None for sample 's1'"),
        ((0, "1", 0), "gave '1' for sample 's1'"),
        ((0, 1), "reward mine must give a list of 3 numbers for samples 's0' to 's2', not 2"),
        ((0, 1, 0, 1), "not 4"),
    ],
)
def test_values_are_checked(values: tuple[object, ...], message: str) -> None:
    with pytest.raises(RewardError) as caught:
        score(gives(*values), ANSWERS, SAMPLES, "mine")
    assert message in str(caught.value)


def test_values_of_another_type_are_checked() -> None:
    with pytest.raises(RewardError, match="list of 3 numbers for samples 's0' to 's2', not float"):
        score(lambda answers, samples: 1.0, ANSWERS, SAMPLES)  # type: ignore[arg-type, return-value]


def test_numbers_become_floats() -> None:
    scores = score(gives(True, 0, 0.25), ANSWERS, SAMPLES)
    assert scores == [1, 0, 0.25]
    assert {type(value) for value in scores} == {float}


def test_a_failure_names_the_first_sample_that_fails_alone() -> None:
    def picky(text: str, sample: Sample) -> float:
        if sample.id != "s0":
            raise ValueError(f"two\nlines of {sample.id}")
        return 1.0

    with pytest.raises(RewardError) as caught:
        score(by_row(picky), ANSWERS, SAMPLES, "picky:1")
    assert str(caught.value) == "reward picky:1 failed on sample 's1': ValueError: two lines of s1"


def test_a_failure_of_the_batch_alone_names_its_ends() -> None:
    def crowded(answers: Sequence[Written], samples: Sequence[Sample]) -> list[float]:
        if len(answers) > 1:
            raise MemoryError("too many")
        return [1.0]

    with pytest.raises(RewardError) as caught:
        score(crowded, ANSWERS, SAMPLES)
    message = "reward crowded failed on samples 's0' to 's2', though on none of them alone: MemoryError: too many"
    assert str(caught.value) == message


def test_a_part_of_a_sum_is_named_once() -> None:
    bare = [Sample("s0", (), "which ?", None)]
    with pytest.raises(RewardError) as caught:
        score(parse(["f1", "2*exact"]), ANSWERS[:1], bare)
    assert str(caught.value) == "reward f1 failed on sample 's0': the sample has no answer to compare with"
    with pytest.raises(RewardError, match=r"^reward half failed on sample 's0': ZeroDivisionError"):
        score(Weighted((Part("half", 1.0, lambda answers, samples: [1 / 0]),)), ANSWERS[:1], SAMPLES[:1])


def test_stopping_is_no_failure() -> None:
    calls: list[int] = []

    def stopped(answers: Sequence[Written], samples: Sequence[Sample]) -> list[float]:
        calls.append(len(answers))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(stopped, ANSWERS, SAMPLES)
    assert calls == [3]


def test_no_rows_and_uneven_rows() -> None:
    assert score(parse(["exact", "f1"]), [], []) == []
    assert score(gives(1.0), [], []) == []
    with pytest.raises(RewardError, match="2 answers to 3 samples"):
        score(parse(["exact"]), ANSWERS[:2], SAMPLES)


def test_rewards_see_memory_tokens() -> None:
    assert score(lambda answers, samples: [float(900 in a.ids) for a in answers], ANSWERS, SAMPLES) == [1, 0, 0]
