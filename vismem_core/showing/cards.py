"""The page's answers and maps as HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from PIL import Image

from vismem_core.answers.evaluation import right
from vismem_core.experiments.look import marked, picture
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory
from vismem_core.memory.trace import Invocation

from .writing import Writing

EMPTY = '<p class="vm-hint">Ask, and the answer appears here: with memory, and without it.</p>'
MEANING = {"short": "fine evidence from the image", "long": "abstract semantics"}
"""What each memory is for, in the paper's words."""


def cards(memory: Memory, asked: Sample, own: Writing, plain: Writing | None) -> str:
    """The answers side by side as far as they are written.

    Args:
        asked: with a reference answer, where one is known.
        plain: the base's; None before it is begun.
    """
    with_memory = _card("With memory", _text(memory, own.ids), _note(memory, asked, own))
    without = "waits for its turn" if plain is None else _note(memory, asked, plain)
    return (
        f'<div class="vm-cards" aria-live="polite">{with_memory}'
        f"{_card('Without memory', _text(memory, plain.ids) if plain else '', without)}</div>{_legend(own)}"
    )


def maps(image: Image.Image, invocations: Sequence[Invocation], looked: Sequence[Sequence[float]], why: str) -> str:
    """For each invocation the image, and over it how much each visual token moved the query.

    Args:
        looked: of each invocation, of each visual token; of none where these are no one grid.
        why: said where memory was not invoked.
    """
    if not invocations:
        return f'<p class="vm-hint">{escape(why)}</p>'
    figures = "".join(
        f'<figure>{picture(image, list(own))}<figcaption><span class="{one.kind}">‹{one.kind}›</span> '
        f"invocation {number}, at token {one.position}{'' if any(own) else _blank(own)}</figcaption>"
        "</figure>"
        for number, (one, own) in enumerate(zip(invocations, looked, strict=True), 1)
    )
    told = "Bluer: the visual token there moves the query more, from which that memory was formed."
    return f'<h3>Where memory looked</h3><div class="vm-maps">{figures}</div><p class="vm-hint">{told}</p>'


def _blank(looked: Sequence[float]) -> str:
    return ": its query does not look" if looked else ": no map of an image that is read in tiles"


def _card(title: str, text: str, note: str) -> str:
    return (
        f'<article class="vm-card"><h3>{title}</h3><p class="vm-answer">{text or "…"}</p>'
        f'<p class="vm-hint">{note}</p></article>'
    )


def _text(memory: Memory, ids: list[int]) -> str:
    text = memory.decode(ids, skip_special_tokens=True)
    return marked(text.rstrip("\ufffd").strip())  # half a character waits for its other half


def _note(memory: Memory, asked: Sample, own: Writing) -> str:
    if not own.over:
        return f"{len(own.ids)} tokens …"
    words = memory.decode([one for one in own.ids if one < memory.tokens.first], skip_special_tokens=True)
    good = right(words, asked)
    verdict = {None: "", True: " · ✓ right", False: f" · ✗ the reference is “{escape(asked.answer or '')}”"}[good]
    return f"{len(own.ids)} tokens{verdict}"


def _legend(own: Writing) -> str:
    if not own.over:
        return ""
    counts = Counter(one.kind for one in own.trace.invocations)
    told = "".join(
        f'<li><span class="{kind}">‹{kind}›</span> {count} × {kind}-term memory: {MEANING[kind]}</li>'
        for kind, count in counts.items()
    )
    return f'<ul class="vm-legend">{told}</ul>'
