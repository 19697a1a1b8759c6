"""A look at one answer: where memory was invoked, where its query looked, what each latent is near and worth."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from io import BytesIO
from math import log
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vismem_core.answers.checking import prepare
from vismem_core.config import Kind
from vismem_core.decoding.replay import Answer, Replay, read_prompts
from vismem_core.files.checkpoint import atomically
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory
from vismem_core.memory.trace import Invocation, Trace

from .page import STYLE

WORDS = 3
"""Words that are told of a latent."""


@dataclass(frozen=True)
class Seen:
    """What is told of one invocation.

    Attributes:
        position: of the invocation token among the answer's.
        looked: how much each visual token moves the query, (T,), summing to 1; what the gradient says. Empty where
            the tokens are no one grid.
        near: of each latent, the words whose embeddings are nearest, with the cosine.
        worth: of each latent, the nats a token that the rest of the answer loses without it.
    """

    kind: Kind
    position: int
    looked: list[float]
    near: list[list[tuple[str, float]]]
    worth: list[float]


@dataclass(frozen=True)
class Look:
    """An answer, looked at.

    Attributes:
        text: with the names of its memory tokens.
        ids: with its memory tokens.
    """

    sample: Sample
    text: str
    ids: list[int]
    invocations: list[Seen]


def look(memory: Memory, sample: Sample, *, max_new_tokens: int = 64, trigger: str | None = None) -> Look:
    """Answer a question greedily, and look at its invocations.

    Raises:
        DataError: a bad sample.
    """
    _, inputs = prepare(memory.backbone, [sample])
    assert inputs is not None
    with torch.no_grad(), memory.triggered(trigger or memory.trigger):
        told = memory.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    ids: list[int] = told[0, inputs["input_ids"].shape[1] :].tolist()
    invocations = memory.trace.row(0)
    maps = looked(memory, inputs, ids, invocations)
    seen = [
        Seen(own.kind, own.position, at, near(memory, own.latents), _worth(memory, inputs, ids, invocations, number))
        for number, (own, at) in enumerate(zip(invocations, maps, strict=True))
    ]
    return Look(sample, memory.decode(ids, skip_special_tokens=True), ids, seen)


def near(memory: Memory, latents: Tensor) -> list[list[tuple[str, float]]]:
    """Of each latent (N, d), the tokens whose embeddings have the largest cosine with it."""
    table = memory.backbone.embeddings(torch.arange(memory.backbone.embeddings.weight.shape[0], device=latents.device))
    cosines = (
        torch.nn.functional.normalize(latents.float(), dim=-1)
        @ torch.nn.functional.normalize(table.detach().float(), dim=-1).T
    )
    best = cosines[:, : memory.tokens.first].topk(WORDS)
    tokenizer = memory.backbone.processor.tokenizer
    return [
        [
            (tokenizer.decode([int(at)]).strip() or repr(tokenizer.decode([int(at)])), float(own))
            for at, own in zip(*pair, strict=True)
        ]
        for pair in zip(best.indices, best.values, strict=True)
    ]


def looked(memory: Memory, inputs: Any, ids: list[int], invocations: list[Invocation]) -> list[list[float]]:
    """How much each visual token moves each invocation's query: of every one (T,), summing to 1.

    Nothing is told of images that the encoder took in tiles, or of several: their tokens are no one grid.
    """
    if not invocations:
        return []
    prompts = read_prompts(memory, inputs)
    if len(prompts.session.vision.rows[0]) > 1:
        return [[] for _ in invocations]
    answer = Answer(0, ids, {own.position: own.latents for own in invocations})
    replay = Replay(memory, prompts, [answer])
    told = []
    for own in invocations:
        context = replay.context([(0, own.position)])
        states = context.states.detach().requires_grad_()
        with torch.enable_grad():
            query = memory.builder(states, context.mask)
            (slope,) = torch.autograd.grad((query * query.detach()).sum(), states, allow_unused=True)
        moved = torch.zeros_like(states) if slope is None else slope
        sizes = (moved[0, : context.visual] * states[0, : context.visual].detach()).norm(dim=-1)
        sizes = sizes[context.mask[0, : context.visual]]
        told.append((sizes / sizes.sum().clamp(min=1e-12)).tolist())
    return told


def _worth(memory: Memory, inputs: Any, ids: list[int], invocations: list[Invocation], number: int) -> list[float]:
    """What the rest of the answer loses without each latent of one invocation."""
    own = invocations[number]
    whole = _likelihood(memory, inputs, ids, invocations, own.position)
    losses = []
    for at in range(len(own.latents)):
        kept = torch.cat([own.latents[:at], own.latents[at + 1 :]])
        others = [*invocations[:number], Invocation(0, own.kind, own.position, kept), *invocations[number + 1 :]]
        losses.append(whole - _likelihood(memory, inputs, ids, others, own.position))
    return losses


@torch.no_grad()
def _likelihood(memory: Memory, inputs: Any, ids: list[int], invocations: list[Invocation], after: int) -> float:
    """The mean log-likelihood of the text behind an invocation's end token."""
    grown = dict(inputs)
    grown["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids], device=inputs["input_ids"].device)], dim=1)
    count, before = len(ids), inputs["input_ids"].shape[1]
    for name, own in inputs.items():
        if name != "input_ids" and isinstance(own, Tensor) and own.shape == inputs["input_ids"].shape:
            filler = own.new_ones(1, count) if name == "attention_mask" else own.new_zeros(1, count)
            grown[name] = torch.cat([own, filler], dim=1)
    with memory.recalled(Trace(invocations)):
        logits = memory.model(**grown).logits[0, before - 1 : -1].float()
    told = logits.log_softmax(-1)[torch.arange(count), torch.tensor(ids)]
    text = [at for at in range(after + 2, count) if ids[at] < memory.tokens.first]
    return float(told[text].mean()) if text else 0.0


def write(told: Look, path: Path) -> None:
    """One HTML page that needs nothing beside itself."""
    atomically(path, lambda place: place.write_text("\n".join(_page(told)), encoding="utf-8"))


def _page(told: Look) -> Iterator[str]:
    images = told.sample.load_images()
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>vismem: an answer</title><style>{STYLE}'
    yield ".short { color: #a63603 } .long { color: #084594 } figure { display: inline-block; margin: 0 1rem 1rem 0 }"
    yield "</style><h1>An answer</h1>"
    for image in images:
        yield f"<figure>{picture(image, [])}</figure>"
    yield f"<p>{escape(told.sample.prompt)}</p><p><strong>{marked(told.text)}</strong></p>"
    if not told.invocations:
        yield "<p>Memory was not invoked.</p>"
    for number, own in enumerate(told.invocations, 1):
        yield f'<section><h2 class="{own.kind}">{number}. {own.kind}-term, at token {own.position}</h2>'
        if len(images) == 1 and own.looked:
            yield f"<figure>{picture(images[0], own.looked)}<figcaption class='note'>where its query looked: how much "
            yield "each visual token moves it (bluer: more)</figcaption></figure>"
        yield "<table><thead><tr><th>latent</th><th>nearest words (cosine)</th>"
        yield "<th>nats a token lost without it</th></tr>"
        yield "</thead><tbody>"
        for at, (words, worth) in enumerate(zip(own.near, own.worth, strict=True), 1):
            near = ", ".join(f"{escape(word)} ({cosine:.2f})" for word, cosine in words)
            yield f"<tr><td>{at}</td><td>{near}</td><td>{worth:+.3f}</td></tr>"
        yield "</tbody></table></section>"


def marked(text: str) -> str:
    """An answer as HTML, with ``‹short›`` or ``‹long›`` at each invocation, in elements of these classes."""
    text = escape(text)
    for kind, begin, end in (("short", "ms_I", "ms_E"), ("long", "ml_I", "ml_E")):
        mark = f'<span class="{kind}">‹{kind}›</span>'
        text = text.replace(f"&lt;{begin}&gt;", mark).replace(f"&lt;{end}&gt;", "")
    return text


def picture(image: Image.Image, looked: list[float]) -> str:
    """The image as SVG, and over it a cell for each visual token."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    width, height = image.size
    across, down = grid(len(looked), width, height)
    most = max(looked, default=0.0) or 1.0
    cells = "".join(
        f'<rect x="{at % across * width / across:.2f}" y="{at // across * height / down:.2f}" fill="#0072b2" '
        f'width="{width / across:.2f}" height="{height / down:.2f}" fill-opacity="{0.75 * own / most:.3f}"/>'
        for at, own in enumerate(looked)
    )
    data = base64.b64encode(buffer.getvalue()).decode()
    shown = 280
    pixels = "pixelated" if width < shown else "auto"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{shown}" height="{shown * height / width:.0f}" role="img" '
        f'aria-label="the image"><image href="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'style="image-rendering: {pixels}"/>{cells}</svg>'
    )


def grid(count: int, width: int, height: int) -> tuple[int, int]:
    """Columns and rows of ``count`` tokens of an image: the divisors whose cells are nearest to squares."""
    pairs = [(across, count // across) for across in range(1, count + 1) if count % across == 0] or [(1, 1)]
    return min(pairs, key=lambda own: abs(log(own[0] * height / (own[1] * width))))
