"""Accuracy on held-out samples: the base, memory, memory of one kind only, and the controls.

The blind control asks the same questions over other samples' images, which show something else: what it gets right was
not seen. A question for which there is no other image is left out of it, and counted. The noise control puts noise in
the latents' places: what it gets right the latents did not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from vismem_core.base.images import content
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample, Skipped
from vismem_core.memory.memory import Memory

from . import metric as metrics
from .checking import prepare
from .dealt import Alone, Processes, dealt
from .inference import Answer


class Condition(NamedTuple):
    """Under what answers are given: the trigger (None for memory off), whose image, what stands for the latents."""

    trigger: str | None
    blind: bool = False
    replaced: str | None = None


CONDITIONS = {
    "base": Condition(None),
    "memory": Condition("policy"),
    "noise": Condition("policy", replaced="noise"),
    "blind_base": Condition("never", blind=True),
    "blind": Condition("policy", blind=True),
    "short": Condition("schedule:0=short"),
    "long": Condition("schedule:0=long"),
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
    left_out: list[Skipped] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Measure every question type under every condition.

    Args:
        groups: question types the base was trained on (``seen``) and was not (``new``); without it all are new.
        per_type: samples of each type, the first ones.
        metric: what answers are judged by, as a spec ``NAME[:ARGUMENT]``.
        left_out: gets the samples that cannot be used; without it the first one raises.
        progress: called with the condition, the samples done and their number.
        processes: those that answer together, if there are several; all have to call. The first alone judges.

    Returns:
        ``{"heldout": {condition: {type: accuracy}}, "seen": {...}, "invocations_per_answer": x, "invocations":
        {type: {kind: per answer}}, "samples": n, "questions": {type: n}, "not_blind": {type: n}, "metric": name}``; a
        metric's value stands in the accuracies' places. Conditions are
        ``base``, ``memory``, ``noise``, ``blind_base``, ``blind``, and ``short`` and ``long``, one memory of that kind
        forced at the start of each answer. ``not_blind`` counts the questions that the blind conditions leave out.
        Processes beside the first get nothing.

    Raises:
        DataError: there is nothing to measure, or a bad sample.
        PluginError, ConfigError, MetricError: an unknown metric, or one that fails.
    """
    judged, processes = metrics.parse(metric), processes or Alone()
    chosen = pick(samples, per_type)
    if left_out is not None:
        chosen = {kind: list(_usable(memory, own, batch, left_out)) for kind, own in chosen.items()}
        chosen = {kind: own for kind, own in chosen.items() if own}
    if not chosen:
        raise DataError("there is no sample to measure")
    other = swapped(chosen)
    names = {"seen": [kind for kind in (groups or {}).get("seen", ()) if kind in chosen]}
    names["heldout"] = [kind for kind in chosen if kind not in names["seen"]]
    tables: dict[str, dict[str, dict[str, float]]] = {"heldout": {}, "seen": {}}
    used: dict[str, dict[str, float]] = {}
    for condition, (_, blind, _) in CONDITIONS.items():
        asked = other if blind else chosen
        flat = [sample for own in asked.values() for sample in own]
        show = partial(progress, condition) if progress else None
        with under(memory, condition) as spec:
            ask: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch": batch, "trigger": spec}
            told = dealt(memory, flat, processes, show, **ask)
        if not processes.first:
            continue
        by_type = dict(zip(asked, _split(told, [len(own) for own in asked.values()]), strict=True))
        for group, kinds in names.items():
            tables[group][condition] = {
                kind: judged.over([own.text for own in by_type[kind]], asked[kind]) for kind in kinds if asked[kind]
            }
        if condition == "memory":
            used = {kind: _invocations(own) for kind, own in by_type.items()}
    if not processes.first:
        return {}
    count = sum(len(own) for own in chosen.values())
    total = sum(len(chosen[kind]) * sum(own.values()) for kind, own in used.items())
    return {
        **tables,
        "invocations_per_answer": total / count,
        "invocations": used,
        "samples": count,
        "questions": {kind: len(own) for kind, own in chosen.items()},
        "metric": judged.name,
        "not_blind": {kind: lost for kind, own in chosen.items() if (lost := len(own) - len(other[kind]))},
    }


@contextmanager
def under(memory: Memory, condition: str) -> Iterator[str | None]:
    """Answers inside are given under a condition; gives their trigger, as a spec."""
    trigger, _, replaced = CONDITIONS[condition]
    if trigger is None:
        with memory.off():
            yield None
        return
    spec = memory.config.trigger if trigger == "policy" else trigger
    with memory.replaced(replaced) if replaced else nullcontext():
        yield spec


def pick(samples: Sequence[Sample], per_type: int) -> dict[str, list[Sample]]:
    """The first ``per_type`` samples of each type, types in order of appearance.

    A sequence that makes its samples when they are asked for may have a method ``type_of(index)``, so that only those
    are made that are picked.
    """
    type_of = getattr(samples, "type_of", lambda at: samples[at].type)
    chosen: dict[str, list[int]] = {}
    for at in range(len(samples)):
        own = chosen.setdefault(type_of(at) or "all", [])
        if len(own) < per_type:
            own.append(at)
    return {kind: [samples[at] for at in own] for kind, own in chosen.items()}


def swapped(chosen: Mapping[str, Sequence[Sample]]) -> dict[str, list[Sample]]:
    """The same questions, each over the images of the next sample that has as many, and none of the same content.

    The next of its type, or else of any. Where all samples share an image, such as a reference, the next with another
    image beside it; a sample for which there is none either is left out.
    """
    everyone = [sample for own in chosen.values() for sample in own]
    shown = {id(sample): [content(image) for image in sample.load_images()] for sample in everyone}

    def differs(sample: Sample, other: Sample, wholly: bool) -> bool:
        ours, theirs = shown[id(sample)], shown[id(other)]
        if len(ours) != len(theirs):
            return False
        return bool(ours) and set(ours).isdisjoint(theirs) if wholly else not set(ours) <= set(theirs)

    found: dict[str, list[Sample]] = {}
    for kind, own in chosen.items():
        found[kind] = []
        for at, sample in enumerate(own):
            following = [own[(at + step) % len(own)] for step in range(1, len(own))]
            candidates = ((other, wholly) for wholly in (True, False) for other in chain(following, everyone))
            donor = next((other for other, wholly in candidates if differs(sample, other, wholly)), None)
            if donor is not None:
                found[kind].append(replace(sample, images=donor.images))
    return found


def _usable(memory: Memory, samples: Sequence[Sample], batch: int, out: list[Skipped]) -> Iterator[Sample]:
    for first in range(0, len(samples), batch):
        yield from prepare(memory.backbone, samples[first : first + batch], out)[0]


def _split(told: Sequence[Answer], sizes: Sequence[int]) -> list[list[Answer]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(told[start : start + size]))
        start += size
    return parts


def right(text: str, sample: Sample, metric: str = "exact") -> bool | None:
    """Whether an answer is the sample's reference answer, wholly; None if it has none."""
    if sample.answer is None:
        return None
    return metrics.parse(metric)([text], [sample])[0] >= 1


def _invocations(told: Sequence[Answer]) -> dict[str, float]:
    return {
        kind: sum(place.kind == kind for answer in told for place in answer.invocations) / len(told)
        for kind in ("short", "long")
    }
