"""Likelihoods of given answers, and answers that stop at texts, against passes over whole sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from bases import mini

import vismem_core as vismem
from vismem_core.answers.inference import answers
from vismem_core.answers.likelihood import Likelihood, likelihoods
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample
from vismem_plugins.mini import path
from vismem_plugins.mosaic import mosaic

SAMPLES = [replace(own, type=None) for own in mosaic("heldout", types=["most", "list", "right"])[:3]]
GIVEN = [replace(own, answer=text) for own in SAMPLES[:2] for text in ("boot", " boot , top .", "row 2 column 2")]
LIMIT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def memory() -> Iterator[vismem.Memory]:
    base = mini()
    memory = vismem.attach(base.model, base.processor, path("qwen2_5_vl") / "memory")
    yield memory
    memory.detach()


def passed(memory: vismem.Memory, sample: Sample, told: Likelihood) -> float:
    """The same by one pass over the sequence, in which the memory tokens stand where they were written."""
    ids = memory.backbone.processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    for own in told.invocations:
        ids[own.position : own.position] = [memory.tokens.invocation(own.kind), memory.tokens.end(own.kind)]
    inputs = memory.backbone.inputs([sample.prompt], [sample.load_images()])
    start, extra = inputs["input_ids"].shape[1], torch.tensor([ids])
    for name, own in (("input_ids", extra), ("attention_mask", extra > -1), ("mm_token_type_ids", extra * 0)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], own.to(inputs[name])], dim=1)
    with torch.no_grad():
        logits = memory.model(**inputs).logits[0, start - 1 : -1, : memory.tokens.first].log_softmax(-1)
    return sum(float(logits[at, own]) for at, own in enumerate(ids) if own < memory.tokens.first)


@pytest.mark.parametrize("trigger", [None, "never", "schedule:2=long"])
def test_a_given_answer_is_scored_as_a_pass_over_it_scores_it(memory: vismem.Memory, trigger: str | None) -> None:
    told = list(likelihoods(memory, GIVEN, batch=4, trigger=trigger))
    for own, sample in zip(told, GIVEN, strict=True):
        assert own.logprob == pytest.approx(passed(memory, sample, own), abs=1e-4)
    invoked = [len(own.invocations) for own in told]
    assert any(invoked) == (trigger != "never")
    if trigger and "schedule" in trigger:  # one token leaves nothing to invoke for
        assert invoked == [0, 1, 1] * 2 and {own.position for one in told for own in one.invocations} == {2}


def test_off_is_the_base(memory: vismem.Memory) -> None:
    never = [own.logprob for own in likelihoods(memory, GIVEN, trigger="never")]
    with memory.off():
        assert [own.logprob for own in likelihoods(memory, GIVEN)] == never


def test_what_greedy_decoding_writes_is_greedy_on_the_same_road(memory: vismem.Memory) -> None:
    written = list(answers(memory, SAMPLES, **LIMIT))
    given = [replace(own, answer=answer.text) for own, answer in zip(SAMPLES, written, strict=True)]
    told = list(likelihoods(memory, [*given, GIVEN[2]], batch=4))
    assert [own.greedy for own in told] == [True, True, True, False]
    assert [own.invocations for own in told[:3]] == [own.invocations for own in written]
    assert any(own.invocations for own in written)
    assert memory.trace.row(0)[0].kind == told[0].invocations[0].kind


def test_nothing_is_certain_and_what_cannot_be_scored_is_said(memory: vismem.Memory) -> None:
    (told,) = likelihoods(memory, [replace(SAMPLES[0], answer=" ")])
    assert (told.logprob, told.greedy, told.tokens, told.invocations) == (0.0, True, 0, ())
    with pytest.raises(DataError, match="it has no answer"):
        list(likelihoods(memory, [replace(SAMPLES[0], answer=None)]))
    with pytest.raises(DataError, match="it is late"):
        list(likelihoods(memory, [replace(SAMPLES[0], late=True)]))


def test_a_stop_text_ends_its_row_and_no_other(memory: vismem.Memory) -> None:
    plain, stopped = (list(answers(memory, SAMPLES, stop=stop, **LIMIT)) for stop in ((), (" ,", "zzz")))
    assert " ," in plain[1].text
    for before, after in zip(plain, stopped, strict=True):
        assert after.text == before.text.partition(" ,")[0]
        assert after.invocations == before.invocations
        if " ," not in before.text:
            assert after.tokens == before.tokens
    assert stopped[1].tokens < plain[1].tokens and stopped[1].marked.endswith(",")
    alone = [next(answers(memory, [own], stop=[" ,"], **LIMIT)) for own in SAMPLES]
    assert alone == stopped


def test_what_generate_takes_is_passed_on(memory: vismem.Memory) -> None:
    torch.manual_seed(0)
    greedy = [own.text for own in answers(memory, SAMPLES, **LIMIT)]
    hot = [own.text for own in answers(memory, SAMPLES, do_sample=True, temperature=5.0, top_k=0, **LIMIT)]
    cold = [own.text for own in answers(memory, SAMPLES, do_sample=True, temperature=1e-4, **LIMIT)]
    assert hot != greedy and cold == greedy
