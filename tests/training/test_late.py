"""Memory between images and question: what follows it is written whatever the model would say, and not learnt."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from bases import Base, config, mini
from torch import Tensor

from vismem_core.answers.inference import answers
from vismem_core.config import KINDS, StageConfig
from vismem_core.decoding.replay import read_prompts
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample
from vismem_core.training.batches import make_batch
from vismem_core.training.formation import Formation, invocation_points
from vismem_core.training.invocation import _rest
from vismem_core.training.teacher import bring_up, likelihood
from vismem_plugins.mosaic import mosaic

LATE = [mosaic("heldout", types=["read", "where", "list"], late=True)[at] for at in range(6)]
PLAIN = [replace(own, late=False) for own in LATE]


def test_the_same_question_in_another_order() -> None:
    for late, plain, early in zip(LATE, PLAIN, mosaic("heldout", types=["read", "where", "list"]), strict=False):
        assert (late.prompt, late.answer, plain.digest()) == (early.prompt, early.answer, early.digest())
        assert late.digest() != plain.digest()


def test_without_memory_it_is_the_ordinary_prompt() -> None:
    """Answers of many lengths, in a batch with one that is not late, are what plain ``generate`` writes."""
    memory = mini().attach(config(trigger="never"))
    asked = [*LATE, PLAIN[0]]
    told = list(answers(memory, asked, max_new_tokens=20, batch=7))
    plain = list(answers(memory, [*PLAIN, PLAIN[0]], max_new_tokens=20, batch=7))
    assert [own.text for own in told] == [own.text for own in plain]
    assert len({len(own.text.split()) for own in told}) > 2
    assert told[0].tokens > plain[0].tokens == told[-1].tokens  # what was given was written too


@pytest.mark.parametrize(("trigger", "hides"), [("schedule:0=long", False), ("schedule:0=short", True)])
@torch.no_grad()
def test_memory_stands_before_the_question(trigger: str, hides: bool) -> None:
    """Answers are those of plain passes over image, memory, question, answer, laid out by hand."""
    base: Base = mini()
    memory = base.attach(config(trigger=trigger, drop_image_after_invocation=hides))
    told = list(answers(memory, LATE, max_new_tokens=12, batch=6))
    traced = list(memory.trace.invocations)
    assert [(own.row, own.position) for own in traced] == [(row, 0) for row in range(6)]
    backbone = memory.backbone
    for sample, answer, invocation in zip(LATE, told, traced, strict=True):
        inputs = backbone.inputs([sample.prompt], [sample.load_images()])
        ids, entered = inputs["input_ids"][0], list[Tensor]()
        with memory.off():
            hook = backbone.decoder.register_forward_pre_hook(partial(_note, entered), with_kwargs=True)
            backbone.model(**inputs)
            hook.remove()
        end = int((ids == backbone.placeholders["image"]).nonzero()[-1]) + 2  # with the token that closes the image
        kind = invocation.kind
        marks = torch.tensor([[memory.tokens.invocation(kind), memory.tokens.end(kind)]])
        opened, closed = memory.tokens.vectors(marks, entered[0])[0]
        positions = backbone.positions(inputs)
        words: list[int] = []
        for _ in range(12):
            text = backbone.embeddings(torch.tensor(words, dtype=torch.long))
            embeds = torch.cat(
                [entered[0][:end], opened[None], invocation.latents, closed[None], entered[0][end:], text]
            )
            count = len(embeds) - end
            after = positions[..., end - 1 : end] + torch.arange(1, count + 1)
            places = torch.cat([positions[..., :end], after], dim=-1)
            seen = torch.ones(len(embeds), len(embeds), dtype=torch.bool).tril()
            if hides:
                images = torch.zeros(len(embeds), dtype=torch.bool)
                images[:end] = ids[:end] == backbone.placeholders["image"]
                late = torch.arange(len(embeds)) > end  # behind the invocation token
                seen &= ~(late[:, None] & images[None])
            mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
            masks = dict.fromkeys(("full_attention", "sliding_attention"), mask)
            with memory.off():
                hidden = backbone.decoder(inputs_embeds=embeds[None], attention_mask=masks, position_ids=places)
            word = int(backbone.logits(hidden.last_hidden_state[0, -1]).argmax())
            if word == backbone.end_of_turn:
                break
            words.append(word)
        assert answer.text == base.processor.tokenizer.decode(words).strip()


def _note(entered: list[Tensor], module: Any, args: Any, named: Any) -> None:
    entered.append(named["inputs_embeds"][0])


def test_it_takes_an_image() -> None:
    memory = mini().attach(config())
    with pytest.raises(DataError, match="sample 'a': memory can come before the question where there is an image"):
        list(answers(memory, [Sample("a", (), "what ?", late=True)]))


def test_what_is_given_is_not_learnt() -> None:
    memory = mini().attach(config())
    batch = make_batch(memory.backbone, LATE)
    free = replace(batch, given=[0] * len(batch))
    whole = make_batch(memory.backbone, PLAIN)
    assert whole.given == [0] * len(PLAIN)
    for row, count in enumerate(batch.given):
        ids = [
            own[row][mask[row].bool()].tolist()
            for own, mask in ((b.inputs["input_ids"], b.inputs["attention_mask"]) for b in (batch, whole))
        ]
        assert ids[0] + batch.answers[row][:count] == ids[1]
        assert batch.answers[row][count:] == whole.answers[row]
    with torch.no_grad():
        some, everything = (
            likelihood(memory, bring_up(memory, own, ["long"] * 6, [0] * 6), range(6)) for own in (batch, free)
        )
    for row, count in enumerate(batch.given):
        assert not some[row, :count].any() and everything[row, :count].all()
        torch.testing.assert_close(some[row, count:], everything[row, count:])


@pytest.mark.parametrize("samples", [LATE, PLAIN], ids=["late", "plain"])
@pytest.mark.parametrize("kind", [None, "short", "long"])
@torch.no_grad()
def test_stage_two_scores_what_is_chosen(samples: list[Sample], kind: Any) -> None:
    """One reading of the prompts gives what a pass of its own for each choice gives: the mean over what was chosen."""
    memory = mini().attach(config())
    batch = make_batch(memory.backbone, samples)
    points = [0 if given else at % 2 for at, given in enumerate(batch.given)]
    prompts = read_prompts(memory, batch.inputs, kinds=KINDS)
    found, states = _rest(memory, prompts, batch, kind, points, [False] * 6)
    forced, opening = bring_up(memory, batch, [kind] * 6, points), None
    if kind:
        latents = forced.session.form(range(6), memory.builder, memory.former(kind))
        ends = memory.tokens.vectors(torch.full((6, 1), memory.tokens.end(kind)), latents)
        opening = torch.cat([latents, ends], dim=1)
    told = likelihood(memory, forced, range(6), opening)
    torch.testing.assert_close(found, told.sum(1) / torch.tensor(forced.counts(range(6))), atol=1e-4, rtol=1e-4)
    before = bring_up(memory, batch, [None] * 6, points).session.hidden[:, -1]
    torch.testing.assert_close(states, before, atol=1e-4, rtol=1e-4)


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
