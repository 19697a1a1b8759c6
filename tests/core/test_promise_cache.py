"""Promise 2: insertion with the KV cache equals one forward pass over the whole sequence."""

import pytest
import torch
from bases import QUESTIONS, Base, config
from reference import one_pass

SCHEDULES = {
    "short": "schedule:3=short",
    "long": "schedule:0=long",
    "both": "schedule:0=short,5=long,9=short",
    "anywhere": "anywhere:0.4",
}


RAGGED = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("rows", "packs"),
    [([0], True), ([1], True), ([2], True), (RAGGED, True), (RAGGED, False)],
    ids=["one", "images", "text", "ragged", "apart"],
)
@pytest.mark.parametrize("spec", SCHEDULES.values(), ids=SCHEDULES)
def test_insertion_equals_one_pass(any_base: Base, spec: str, rows: list[int], packs: bool) -> None:
    """Rows that take in latents do so in one pass with their neighbours' next tokens, or apart."""
    questions = [QUESTIONS[row] for row in rows]
    memory = any_base.attach(config(trigger=spec))
    memory.backbone.packs &= packs
    any_base.model.generation_config.eos_token_id = None
    output = any_base.generate(*questions)
    assert len(memory.trace) >= len(rows)
    for row, question in enumerate(questions):
        expected = one_pass(memory, any_base.inputs(question), output.answers[row].tolist(), row)
        got = torch.stack([logits[row] for logits in output.logits])
        torch.testing.assert_close(got[:, : expected.logits.shape[1]], expected.logits, atol=1e-4, rtol=1e-4)
        offered = got[:, memory.tokens.first : memory.tokens.first + 2] > float("-inf")
        assert not offered.any()  # forced schedules leave nothing to the policy


def test_the_policys_own_logits(base: Base) -> None:
    memory = base.attach(config(trigger="policy", budget=2))
    with torch.no_grad():
        memory.tokens.head *= 8.0
    output = base.generate(*QUESTIONS)
    assert len(memory.trace) >= len(QUESTIONS)
    for row, question in enumerate(QUESTIONS):
        answer = [token for token in output.answers[row].tolist() if token != base.processor.tokenizer.pad_token_id]
        expected = one_pass(memory, base.inputs(question), answer, row)
        got = torch.stack([logits[row, memory.tokens.first :] for logits in output.logits[: len(answer)]])
        offered = got[:, :2] > float("-inf")
        assert offered.any()
        torch.testing.assert_close(got[:, :2][offered], expected.asks[offered], atol=1e-4, rtol=1e-4)
        assert (got[:, 2:] == float("-inf")).all()
