"""docs/model_types.md still says what the suite says, for a type of each outcome."""

from __future__ import annotations

import pytest
import transformers
from model_types import TYPES
from survey import DOCUMENT, contract, recorded, survey, table

SAMPLE = {
    "qwen2_vl": "passes",
    "aya_vision": "passes",
    "ovis2": "passes",
    "paligemma": "passes",
    "qwen3_vl": "passes",
    "qwen3_5": "passes",
    "gemma3": "passes",
    "florence2": "refused",
    "janus": "refused",
}


@pytest.mark.long
@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_document_agrees(model_type: str) -> None:
    line = survey(model_type)
    assert line == recorded()[model_type]
    assert line["outcome"] == SAMPLE[model_type]


def test_the_document_says_what_was_recorded() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == table(recorded())


def test_the_document_names_every_type() -> None:
    if f"transformers {transformers.__version__}:" not in DOCUMENT.read_text(encoding="utf-8"):
        pytest.skip("it was written for another version of transformers")
    lines = recorded()
    assert tuple(lines) == TYPES
    outcomes = [own["outcome"] for own in lines.values()]
    assert outcomes.count("passes") >= 59
    assert "fails" not in outcomes, "what breaks a promise must be refused when memory is attached"


@pytest.mark.long
def test_compiled_passes_where_a_layer_works_on_all_that_is_cached() -> None:
    contract("generic", "kimi_k25").test_static_caches(compiled=True)  # it expands what it keeps of each token
