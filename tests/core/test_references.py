"""Questions with several right answers: learnt by one, scored against each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vismem_core.answers.reward import Written, by_row, parse, score
from vismem_core.errors import DataError, RewardError
from vismem_core.files.samples import Sample, read

SEVERAL = Sample("a", (), "how many ?", "two", references=("two", "2", "two", "a pair"))


def row(tmp_path: Path, **told: Any) -> Sample:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "a", **told}) + "\n")
    return read(path, need_answer=True)[0]


def test_one_answer_is_the_only_reference() -> None:
    assert Sample("a", (), "?", "x").references == ("x",)
    assert Sample("a", (), "?").references == ()
    assert replace(SEVERAL, images=(b"",)).references == SEVERAL.references


@pytest.mark.parametrize("asked", ["prompt", "question"])
def test_rows_with_several(asked: str, tmp_path: Path) -> None:
    own = row(tmp_path, **{asked: "?", "answers": ["2", "two", "two"]})
    assert (own.answer, own.references) == ("two", ("2", "two", "two"))
    own = row(tmp_path, **{asked: "?", "answer": "pair", "answers": [{"answer": "2"}, {"answer": "two"}]})
    assert (own.answer, own.references) == ("pair", ("pair", "2", "two"))
    assert row(tmp_path, **{asked: "?", "answers": ["one"]}).references == ("one",)
    with pytest.raises(DataError, match="'answers' must be a list of texts"):
        row(tmp_path, **{asked: "?", "answers": [None]})
    assert row(tmp_path, **{asked: "?", "answers": [3, 3.5]}).references == ("3", "3.5")


def test_what_is_only_ours_is_no_key_of_a_row(tmp_path: Path) -> None:
    for key in ("turns", "references"):
        with pytest.raises(DataError, match=f"unknown key '{key}'"):
            row(tmp_path, prompt="?", answer="x", **{key: [1]})


def test_rewards_take_the_best() -> None:
    for spec, text, value in [
        ("substring", "it is a pair", 1.0),
        ("number", "2", 1.0),
        ("f1", "pair", 1.0),
        ("f1", "6", 0.0),
    ]:
        assert score(parse([spec]), [Written(text)], [SEVERAL]) == [value], spec


def test_a_reference_that_cannot_be_read_counts_only_alone() -> None:
    assert score(parse(["number"]), [Written("3")], [SEVERAL]) == [0.0]  # "two" holds no number
    with pytest.raises(RewardError, match="no number in the sample's answer 'two'"):
        score(parse(["number"]), [Written("3")], [replace(SEVERAL, references=("two", "a pair"))])
    rule = by_row(lambda text, own: float(own.references == (own.answer,)))
    assert score(rule, [Written("")], [SEVERAL]) == [1.0]
