"""Accuracy on held-out samples: the base, memory, memory of one kind only, and the controls.

The blind control asks the same questions over other samples' images: what it gets right was not seen. The noise control
puts noise in the latents' places: what it gets right the latents did not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

from .data import Sample
from .inference import Answer, answers
from .memory import Memory
from .plugins import registry


class Condition(NamedTuple):
    """Under what answers are given: the trigger (None for memory off), whose image, what stands for the latents."""

    trigger: str | None
    blind: bool = False
    replaced: str | None = None


CONDITIONS = {
    "base": Condition(None),
    "memory": Condition("policy"),
    "noise": Condition("policy", replaced="noise"),
    "blind": Condition("policy", blind=True),
    "short": Condition("schedule:0=short"),
    "long": Condition("schedule:0=long"),
    "blind_base": Condition("never", blind=True),
}


def evaluate(
    memory: Memory,
    samples: Sequence[Sample],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    per_type: int = 100,
    batch: int = 50,
    max_new_tokens: int = 64,
    metric: str = "exact",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure every question type under every condition.

    Args:
        groups: question types the base was trained on (``seen``) and was not (``new``); without it all are new.
        per_type: samples of each type, the first ones.
        progress: called with the condition, the samples done and their number.

    Returns:
        ``{"heldout": {condition: {type: accuracy}}, "seen": {...}, "invocations_per_answer": x, "invocations":
        {type: {kind: per answer}}, "samples": n}``; conditions are ``base``, ``blind_base``, ``memory``, ``blind``,
        ``noise``, and ``short`` and ``long``, one memory of that kind forced at the start of each answer.
    """
    chosen = pick(samples, per_type)
    names = {"seen": [kind for kind in (groups or {}).get("seen", ()) if kind in chosen]}
    names["heldout"] = [kind for kind in chosen if kind not in names["seen"]]
    tables: dict[str, dict[str, dict[str, float]]] = {"heldout": {}, "seen": {}}
    used: dict[str, dict[str, float]] = {}
    for condition, (trigger, blind, replaced) in CONDITIONS.items():
        asked = {kind: _swapped(own) if blind else own for kind, own in chosen.items()}
        flat = [sample for own in asked.values() for sample in own]
        told: list[Answer] = []
        with memory.off() if trigger is None else memory.replaced(replaced) if replaced else nullcontext():
            spec = trigger if trigger is None or trigger == "never" else _restricted(trigger, memory)
            for answer in answers(memory, flat, max_new_tokens=max_new_tokens, batch=batch, trigger=spec):
                told.append(answer)
                if progress:
                    progress(condition, len(told), len(flat))
        by_type = dict(zip(asked, _split(told, [len(own) for own in asked.values()]), strict=True))
        for group, kinds in names.items():
            scores = {kind: _accuracy(metric, by_type[kind], chosen[kind]) for kind in kinds}
            tables[group][condition] = scores
        if condition == "memory":
            used = {kind: _invocations(own) for kind, own in by_type.items()}
    count = sum(len(own) for own in chosen.values())
    total = sum(len(chosen[kind]) * sum(own.values()) for kind, own in used.items())
    return {**tables, "invocations_per_answer": total / count, "invocations": used, "samples": count}


def pick(samples: Sequence[Sample], per_type: int) -> dict[str, list[Sample]]:
    """The first ``per_type`` samples of each type, types in order of appearance."""
    chosen: dict[str, list[Sample]] = {}
    misses = 0
    for at in range(len(samples)):
        sample = samples[at]
        own = chosen.setdefault(sample.type or "all", [])
        if len(own) < per_type:
            own.append(sample)
            misses = 0
        else:
            misses += 1
            if misses > 100 * len(chosen) and all(len(have) == per_type for have in chosen.values()):
                break
    return chosen


def _restricted(trigger: str, memory: Memory) -> str:
    return memory.config.trigger if trigger == "policy" else trigger


def _swapped(samples: Sequence[Sample]) -> list[Sample]:
    """The same questions, each over the next sample's images."""
    return [
        replace(sample, images=other.images if len(other.images) == len(sample.images) else sample.images)
        for sample, other in zip(samples, [*samples[1:], *samples[:1]], strict=True)
    ]


def _split(told: Sequence[Answer], sizes: Sequence[int]) -> list[list[Answer]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(told[start : start + size]))
        start += size
    return parts


def _accuracy(metric: str, told: Sequence[Answer], samples: Sequence[Sample]) -> float:
    scores = registry("metrics").get(metric)([answer.text for answer in told], samples)
    return float(sum(scores) / len(scores))


def _invocations(told: Sequence[Answer]) -> dict[str, float]:
    return {
        kind: sum(place.kind == kind for answer in told for place in answer.invocations) / len(told)
        for kind in ("short", "long")
    }
