"""The built-in metrics on examples worked by hand, and against what the packages behind them say themselves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vismem_core.answers.metric import Metric, parse
from vismem_core.errors import ConfigError, MetricError, PluginError
from vismem_core.files.samples import Sample
from vismem_plugins.metrics.text import edits
from vismem_plugins.metrics.vqa import normal


def asked(*references: str, prompt: str = "what ?") -> Any:
    """A sample with several right answers."""
    return SimpleNamespace(prompt=prompt, answer=references[0], references=references)


def value(spec: str, text: str, *references: str) -> float:
    (own,) = parse(spec)([text], [asked(*references)])
    return own


TEN = ("a boot",) * 2 + ("boots",) * 3 + ("shoe",) * 5


@pytest.mark.parametrize(
    ("spec", "text", "references", "expected"),
    [
        ("exact", " A  Boot", ("boots", "a boot"), 1),
        ("exact", "boot", ("boots", "a boot"), 0),
        ("ending", "it is large : a boot", ("so : A boot",), 1),
        ("vqa", "Shoe.", TEN, 1),
        ("vqa", "boots", TEN, (3 * 2 / 3 + 7) / 10),  # three are compared with two of their own
        ("vqa", "a boot", TEN, (2 * 1 / 3 + 8 * 2 / 3) / 10),  # without its article it is "boot", and so is theirs
        ("vqa", "bag", TEN, 0),
        ("vqa", "two", ("2",), 1),
        ("vqa", "yes", ("yes", "no"), 0.5),
        ("vqa", "yes", ("yes", "yes"), 1),
        ("anls", "Hello wrld", ("hello world", "x"), 1 - 1 / 11),
        ("anls", "abcd", ("abxy",), 0.5),  # just enough
        ("anls", "abc", ("axyz",), 0),
        ("anls", "", ("",), 1),
        ("relaxed", "10.5", ("10",), 1),
        ("relaxed", "10.51", ("10",), 0),
        ("relaxed", "-9.5", ("-10",), 1),
        ("relaxed", "52%", ("0.5",), 1),
        ("relaxed", "0.1", ("0",), 0),
        ("relaxed", "North", ("north", "3"), 1),
        ("relaxed", "about 10", ("10",), 0),
        ("relaxed", "nan", ("nan",), 1),
        ("f1", "the black cat", ("dog", "a cat"), 2 / 3),
        ("rouge", "the cat sat", ("the cat sat down", "x"), 2 * 1 * 0.75 / 1.75),
    ],
)
def test_by_hand(spec: str, text: str, references: tuple[str, ...], expected: float) -> None:
    assert value(spec, text, *references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("1,000 dogs", "1000 dogs"),
        ("2.5", "2.5"),
        ("black-and-white", "black and white"),
        ("black - white", "black white"),
        ("it isnt a toy!", "it isn't toy"),
        ("none", "0"),
        (" ten\nmen ", "10 men"),
    ],
)
def test_what_vqa_accuracy_compares(text: str, expected: str) -> None:
    assert normal(text) == expected


def test_edits() -> None:
    for first, second, count in (("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)):
        assert edits(first, second) == edits(second, first) == count


PREDICTIONS = ["a cat sits on the mat", "two dogs play in the snow", "a red bus"]
REFERENCES = [
    ("a cat sits on a mat", "the cat is on the mat"),
    ("two dogs are playing in snow",),
    ("a red bus on the street", "one red bus", "a bus"),
]


def rows(references: Sequence[tuple[str, ...]] = REFERENCES) -> list[Any]:
    return [asked(*own) for own in references]


def test_bleu_of_a_set_is_sacrebleus_and_no_mean() -> None:
    import sacrebleu

    metric = parse("bleu")
    streams = [[own[at] if at < len(own) else None for own in REFERENCES] for at in range(3)]
    expected = sacrebleu.corpus_bleu(PREDICTIONS, streams).score / 100
    assert metric.over(PREDICTIONS, rows()) == pytest.approx(expected)
    each = metric(PREDICTIONS, rows())
    assert each[0] == pytest.approx(sacrebleu.sentence_bleu(PREDICTIONS[0], list(REFERENCES[0])).score / 100)
    assert abs(sum(each) / 3 - expected) > 0.01
    # by hand: 4 of 4, 3 of 3, 2 of 2 and 1 of 1 n-grams, and exp(1 - 5 / 4) for being short by one
    assert metric.over(["a cat sat down"], rows([("a cat sat down there",)])) == pytest.approx(2.718281828**-0.25)


def test_rouge_is_the_packages() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    for text, own, got in zip(PREDICTIONS, REFERENCES, parse("rouge")(PREDICTIONS, rows()), strict=True):
        assert got == pytest.approx(max(scorer.score(one, text)["rougeL"].fmeasure for one in own))


def test_cider_is_the_packages_and_knows_the_whole_set() -> None:
    from pycocoevalcap.cider.cider import Cider

    metric = parse("cider")
    expected, each = Cider().compute_score(
        dict(enumerate(map(list, REFERENCES))), {n: [own] for n, own in enumerate(PREDICTIONS)}
    )
    assert metric(PREDICTIONS, rows()) == pytest.approx(list(each))
    assert metric.over([f"{own.capitalize()}." for own in PREDICTIONS], rows()) == pytest.approx(expected)
    # by hand: a text that is its only reference, of n-grams that nobody else has, is worth 10 for each length it has
    assert metric(["one two three four", "x"], rows([("one two three four",), ("five",)])) == pytest.approx([10, 0])
    assert metric(["one", "x"], rows([("one",), ("five",)])) == pytest.approx([2.5, 0])


def test_choice_and_judge_are_the_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "which ? A. cat B. dog"
    samples = [Sample("1", (), options, "B"), Sample("2", (), options, "cat"), Sample("3", (), options, "A")]
    assert parse("choice")(["dog", "(A)", "B"], samples) == [1, 1, 0]
    from vismem_plugins.rewards.judge import Judge

    graded: list[tuple[str, str | None]] = []

    def grade(judge: Judge, answer: Any, sample: Sample) -> float:
        graded.append((answer.text, sample.answer))
        return len(sample.answer or "") / 10

    monkeypatch.setattr(Judge, "grade", grade)
    metric = parse("judge:http://127.0.0.1:1/v1#some")
    assert metric.name == "judge" and metric(["a", "b"], samples[:2]) == [0.1, 0.3]
    assert sorted(graded) == [("a", "B"), ("b", "cat")]


@pytest.mark.parametrize("spec", ["bleu", "rouge", "cider"])
def test_a_missing_package_is_one_line(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "sacrebleu",
        "rouge_score",
        "rouge_score.rouge_scorer",
        "pycocoevalcap",
        "pycocoevalcap.cider.cider_scorer",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf'^metric {spec} needs [\w-]+: pip install "vismem\[metrics\]" \('):
        parse(spec)


def test_what_is_wrong_is_told() -> None:
    with pytest.raises(PluginError, match="unknown metric 'exakt'; did you mean 'exact'"):
        parse("exakt")
    for spec in ("exact:1", "bleu:4"):
        with pytest.raises(ConfigError, match=r"metric \w+ takes no argument"):
            parse(spec)
    with pytest.raises(ConfigError, match="takes a URL"):
        parse("judge:there")
    with pytest.raises(MetricError, match=r"metric choice: .*the prompt lists no options"):
        parse("choice")(["x"], [Sample("1", (), "what ?", "B")])
    odd = {"short": [0.5], "text": ["good", 1.0], "nan": [float("nan"), 1.0]}
    for name, values in odd.items():
        with pytest.raises(MetricError, match=f"metric {name} (gave|must give)"):
            Metric(name, lambda *_, values=values: values)(["a", "b"], rows()[:2])  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="metric own failed: ZeroDivisionError"):
        Metric("own", lambda *_: 1 / 0).over(["a"], rows()[:1])  # type: ignore[arg-type, return-value]
