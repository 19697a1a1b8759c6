"""What would go wrong without a word is refused, and every result of an attached model has its trace."""

import pytest
import torch
from bases import QUESTIONS, config, tied

import vismem_core as vismem
from vismem_core.errors import AttachError, DataError


def test_a_mask_that_is_not_the_ids() -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:1=short"))
    inputs = base.inputs(QUESTIONS[0])
    sequences = base.model.generate(**inputs, max_new_tokens=8)
    assert memory.tokens.contains(sequences).any()
    with pytest.raises(AttachError, match=r"the mask tells of every id, answers too"):
        base.model(**inputs | {"input_ids": sequences})


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "there are no rows"),
        (
            [{"prompt": "?", "answer": "<ms_I><ms_E> a"}, {"prompt": "?", "answer": "<ms_E> a"}],
            "row 1: .* ends nothing",
        ),
    ],
)
def test_rows_that_nothing_can_be_made_of(rows: list[dict[str, str]], reason: str) -> None:
    memory = tied().attach()
    with pytest.raises(DataError, match=reason):
        vismem.collate(memory, rows)


@pytest.mark.parametrize("trigger", ["never", "policy"])
def test_results_have_their_trace(trigger: str) -> None:
    base = tied()
    memory = base.attach(config(trigger=trigger))
    output = base.model.generate(**base.inputs(QUESTIONS[0]), max_new_tokens=2, return_dict_in_generate=True)
    assert output.memory is memory.trace
    assert isinstance(output.sequences, torch.Tensor)
