"""A look at an answer: words, worths and maps against computations of their own, and the page."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import Base, config, internvl, llava, llava_next, mini
from typer.testing import CliRunner

from vismem_cli.app import app
from vismem_core import Memory
from vismem_core.base.embedded import embedded
from vismem_core.decoding.attach import attach
from vismem_core.experiments import look as looking
from vismem_core.experiments.look import grid, look
from vismem_core.training.trainable import collate
from vismem_plugins.mosaic import mosaic

SAMPLE = mosaic("heldout", types=["right"], size=3)[3]


@pytest.fixture(scope="module")
def shipped() -> Memory:
    base = mini()
    return attach(base.model, base.processor, embedded("qwen2_5_vl")[1].memory)


def test_what_is_told_of_an_invocation(shipped: Memory) -> None:
    told = look(shipped, SAMPLE, trigger="schedule:0=long,1=short", max_new_tokens=8)
    assert [(own.kind, own.position) for own in told.invocations] == [("long", 0)]
    (own,) = told.invocations
    latents = shipped.trace.invocations[0].latents
    table = shipped.backbone.embeddings.weight.detach()
    for latent, words in zip(latents, own.near, strict=True):
        cosines = torch.stack([torch.cosine_similarity(latent, row, dim=0) for row in table])
        best = cosines.argsort(descending=True)[:3]
        assert [word for word, _ in words] == [shipped.backbone.processor.tokenizer.decode([int(at)]) for at in best]
        assert words[0][1] == pytest.approx(float(cosines.max()), abs=1e-5)
    assert len(own.looked) == 9 and sum(own.looked) == pytest.approx(1, abs=1e-4)
    assert len(own.worth) == 16


def test_a_latent_is_worth_what_the_answer_loses_without_it(shipped: Memory) -> None:
    told = look(shipped, SAMPLE, trigger="schedule:0=long", max_new_tokens=8)
    invocation = shipped.trace.invocations[0]
    text = shipped.decode(told.ids, skip_special_tokens=True)
    row = {"prompt": SAMPLE.prompt, "images": SAMPLE.load_images(), "answer": text}

    def likelihood(latents: torch.Tensor) -> float:
        batch = collate(shipped, [row])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad(), shipped.replaced(lambda _: latents[None]):
            logits = shipped.model(**batch).logits[0, :-1].float().log_softmax(-1)
        chosen = (labels >= 0) & (labels < shipped.tokens.first)
        return float(logits[chosen].gather(1, labels[chosen][:, None]).mean())

    whole = likelihood(invocation.latents)
    for at in (0, 7, 15):
        without = torch.cat([invocation.latents[:at], invocation.latents[at + 1 :]])
        assert told.invocations[0].worth[at] == pytest.approx(whole - likelihood(without), abs=1e-4)


def test_queries_that_look_nowhere_have_no_map() -> None:
    memory = mini().attach(config(builder="constant", trigger="schedule:0=short"))
    (own,) = look(memory, SAMPLE, max_new_tokens=4).invocations
    assert not any(own.looked)


@pytest.mark.parametrize(("make", "mapped"), [(llava, True), (llava_next, False), (internvl, False)])
def test_images_in_tiles_have_no_map(make: Callable[[], Base], mapped: bool) -> None:
    """What llava reads as one grid, the others read as several tiles."""
    memory = make().attach(config(trigger="schedule:0=short"))
    (own,) = look(memory, replace(SAMPLE, prompt="what is it ?"), max_new_tokens=4).invocations
    assert bool(own.looked) is mapped


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(9, (84, 84), (3, 3)), (12, (200, 150), (4, 3)), (12, (90, 300), (2, 6)), (7, (70, 10), (7, 1))],
)
def test_the_grid_of_an_image(count: int, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert grid(count, *size) == expected


def test_the_page_from_the_command(tmp_path: Path) -> None:
    path = tmp_path / "answer.html"
    told = CliRunner().invoke(app, ["infer", "--html", str(path), "--trigger", "schedule:0=short"])
    assert told.exit_code == 0, told.output
    text = path.read_text(encoding="utf-8")
    assert "1. short-term, at token 0" in text and '<span class="short">‹short›</span>' in text
    assert len(re.findall(r"<rect ", text)) == 9
    assert text.count("<tr><td>") == 8
    assert not re.search(r'(src|href)="(?!data:)', text)
    odd = CliRunner().invoke(app, ["infer", "--html", str(tmp_path / "no" / "a.html")])
    assert odd.exit_code != 0


def test_without_invocations(tmp_path: Path) -> None:
    memory = mini().attach(config(trigger="never"))
    told = look(memory, SAMPLE, max_new_tokens=3)
    looking.write(told, tmp_path / "a.html")
    assert "Memory was not invoked." in (tmp_path / "a.html").read_text(encoding="utf-8")
