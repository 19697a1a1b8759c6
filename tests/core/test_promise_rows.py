"""Promise 3: a row's output does not depend on its neighbours."""

import copy
from itertools import product
from typing import Any

import pytest
import tiny
import torch
from bases import FAMILIES, QUESTIONS, Base, config, internvl, llava, mini, rice, tied, untied
from reference import one_pass, query, short_latents
from transformers import GenerationMixin

from vismem_core.config import KINDS, Kind

ROWS = [*QUESTIONS, (QUESTIONS[0][0], [tiny.picture(32, 32, 7)])]
"""The last row asks what the first asks, about another image of the same size."""

ENCODES_FIRST = hasattr(GenerationMixin, "_supports_mm_encoder_outputs")
"""Whether ``generate`` encodes images before it copies prompts."""

FORMERS = [*product(["lora"], ["cache", "recompute"], ["encoder", "cross"]), ("transformer", "cache", "encoder")]


def compare(base: Base, memory: Any, together: Any, atol: float = 1e-4) -> None:
    """Each row of ``together`` is what the row gives alone, up to its end token; then it is padding."""
    traces = [[(own.kind, own.position) for own in memory.trace.row(row)] for row in range(len(ROWS))]
    pad = base.model.generation_config.pad_token_id
    for row, question in enumerate(ROWS):
        alone = base.generate(question)
        length = alone.answers.shape[1]
        assert together.answers[row, :length].tolist() == alone.answers[0].tolist()
        assert together.answers[row, length:].eq(pad).all()
        assert [(own.kind, own.position) for own in memory.trace.invocations] == traces[row]
        for name in ("logits", "scores"):
            batch = torch.stack([step[row] for step in together[name][:length]])
            torch.testing.assert_close(batch, torch.cat(alone[name]), atol=atol, rtol=1e-4)


@pytest.mark.parametrize(("name", "context", "builder"), FORMERS)
@pytest.mark.parametrize("make", [tied, untied, *FAMILIES])
def test_rows_alone_and_together(make: Any, name: str, context: str, builder: str) -> None:
    base = make()
    memory = base.attach(config(name, context, builder))
    if builder == "cross":
        memory.trigger = "random:0.6"
        memory.delimiters = frozenset(range(0, memory.tokens.first, 2))  # random models write hardly any comma
    together = base.generate(*ROWS)
    places = {(own.row, own.position) for own in memory.trace.invocations}
    assert len({position for _, position in places}) >= 3
    assert all(any(row == own for own, _ in places) for row in range(len(ROWS)))
    compare(base, memory, together)


@pytest.mark.parametrize("make", [tied, mini, llava, internvl])
@pytest.mark.parametrize(("only", "packs"), [(None, True), (None, False), *((kind, True) for kind in KINDS)])
def test_the_policys_rows(make: Any, only: Kind | None, packs: bool) -> None:
    base = make()
    memory = base.attach(config(trigger=f"policy@{only}" if only else "policy", distance=2))
    memory.backbone.packs &= packs
    with torch.no_grad():
        memory.tokens.head *= 8.0
        memory.tokens.head[1] *= -1.0  # so that some states ask for the one, some for the other
    together = base.generate(*ROWS)
    assert {own.kind for own in memory.trace.invocations} == ({only} if only else set(KINDS))
    compare(base, memory, together, atol=1e-3)  # the tokens' own logits are eight times as large


def test_first_answers_of_equal_prompts_draw_alike() -> None:
    base = tied()
    memory = base.attach(config(trigger="anywhere:0.5"))
    base.generate(ROWS[0], ROWS[0], eos_token_id=None)
    first, second = ([(own.kind, own.position) for own in memory.trace.row(row)] for row in range(2))
    assert first == second


@pytest.mark.parametrize("make", [tied, untied, *(own for own in FAMILIES if own is not rice)])  # it expands no images
@pytest.mark.parametrize("context", ["cache", "recompute"])
def test_copies_of_a_prompt_see_its_images(make: Any, context: str) -> None:
    base, copies, questions = make(), 3, QUESTIONS
    if make in FAMILIES and not ENCODES_FIRST:
        if make is internvl:
            pytest.skip("this transformers hands the tiles of a prompt's copies to one another")
        questions = [question for question in QUESTIONS if len(question[1]) < 2]  # and so it does with images
    pristine = copy.deepcopy(base.model)
    memory = base.attach(config(context=context, trigger="anywhere:0.3@short"))
    torch.manual_seed(0)
    output = base.generate(*questions, do_sample=True, num_return_sequences=copies, eos_token_id=None)
    traces = [tuple(own.position for own in memory.trace.row(row)) for row in range(len(output.answers))]
    assert len(set(traces)) > len(questions)  # copies draw on their own
    for row, answer in enumerate(output.answers.tolist()):
        question = questions[row // copies]
        sequence = one_pass(memory, base.inputs(question), answer, row)
        got = torch.stack([step[row, : sequence.logits.shape[1]] for step in output.logits])
        torch.testing.assert_close(got, sequence.logits, atol=1e-4, rtol=1e-4)
        for own in memory.trace.row(row)[:1]:
            asked = query(memory, sequence, sequence.places[0], sequence.places[own.position])
            expected = short_latents(pristine, memory, base.inputs(question), asked, context)
            torch.testing.assert_close(own.latents, expected, atol=1e-4, rtol=1e-3)
