"""Answers that begin with given words: written whatever the model would say, neither learnt nor judged."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from bases import Base, config, mini

from vismem_core.answers.inference import answers
from vismem_core.config import StageConfig
from vismem_core.files.samples import Sample
from vismem_core.training.batches import make_batch
from vismem_core.training.formation import Formation, invocation_points
from vismem_core.training.teacher import bring_up, likelihood
from vismem_core.training.trainable import collate
from vismem_plugins.mosaic import mosaic

LATE = [mosaic("heldout", types=["right", "most"], late=True)[at] for at in range(4)]
PLAIN = [replace(own, given="") for own in LATE]


def test_the_question_begins_the_answer() -> None:
    early = mosaic("heldout", types=["right", "most"])
    for at, own in enumerate(LATE):
        assert (own.prompt, own.given, own.answer) == ("describe the image .", early[at].prompt, early[at].answer)
        assert own.digest() != early[at].digest() != PLAIN[at].digest()


@pytest.mark.parametrize("trigger", ["never", "schedule:0=long", "schedule:0=short,12=long"])
def test_answers_go_on_from_what_is_given(trigger: str) -> None:
    """Token by token what ``forward`` finds likeliest after the prompt, the memory, what is given, and so on."""
    base: Base = mini()
    memory = base.attach(config(trigger=trigger))
    told = list(answers(memory, LATE, max_new_tokens=4, batch=4))
    marks = {"short": "<ms_I><ms_E>", "long": "<ml_I><ml_E>"}
    for sample, answer in zip(LATE, told, strict=True):
        assert sample.answer is not None
        begun = marks["long" if "0=long" in trigger else "short"] if answer.invocations else ""
        words: list[str] = []
        for _ in range(4):
            text = " ".join([sample.given, *words, "bag"])
            row = {"prompt": sample.prompt, "images": sample.load_images(), "answer": begun + text}
            batch = collate(memory, [row])
            batch.pop("labels")
            with torch.no_grad(), memory.triggered("policy"):
                logits = memory.model(**batch).logits[0, -3, : memory.tokens.first]
            word = base.processor.tokenizer.decode(int(logits.argmax()), skip_special_tokens=True)
            if not word:
                break
            words.append(word)
        if "12=" not in trigger:
            assert answer.text == " ".join(words)
        assert sample.given in answer.marked
        assert sample.given not in answer.text
    places = {(place.kind, place.position) for answer in told for place in answer.invocations}
    assert places >= ({("long", 0)} if trigger == "schedule:0=long" else set())


def test_what_is_given_is_not_learnt() -> None:
    memory = mini().attach(config())
    batch = make_batch(memory.backbone, LATE)
    free = replace(batch, given=[0] * len(batch))
    assert batch.given == [len(own.given.split()) for own in LATE]
    with torch.no_grad():
        some, everything = (
            likelihood(memory, bring_up(memory, own, ["long"] * 4, [0] * 4), range(4)) for own in (batch, free)
        )
    for row, count in enumerate(batch.given):
        assert not some[row, :count].any() and everything[row, :count].all()
        torch.testing.assert_close(some[row, count:], everything[row, count:])


def test_memory_comes_before_what_is_given() -> None:
    memory = mini().attach(config())
    batch = make_batch(memory.backbone, LATE)
    chances = [Random(at) for at in range(200)]
    many = replace(batch, answers=batch.answers[:1] * 200, given=[0] * 200)
    assert len(set(invocation_points(memory, many, chances, 1.0))) > 1
    many = replace(many, given=batch.given[:1] * 200)
    assert set(invocation_points(memory, many, chances, 1.0)) == {0}


@pytest.mark.parametrize(("trigger", "learns"), [("policy", {"short", "long"}), ("policy@long", {"long"})])
def test_stage_one_trains_the_kinds_that_may_be_invoked(trigger: str, learns: set[str]) -> None:
    memory = mini().attach(config(trigger=trigger))
    stage = Formation(memory, StageConfig())
    loss, figures = stage.loss(make_batch(memory.backbone, PLAIN), "key")
    trained: Any = {kind: [own for name, own in memory.trained().items() if name.startswith(kind)] for kind in learns}
    own = [tensor for tensors in trained.values() for tensor in tensors]
    assert all(grad is not None for grad in torch.autograd.grad(loss, own, allow_unused=True))
    assert {name.removeprefix("loss_") for name in figures if name.startswith("loss_")} == learns


def test_samples_without_are_as_they_were() -> None:
    own = Sample("a", (), "what ?", "b")
    assert own.given == "" and own.digest() == replace(own, given="").digest()
