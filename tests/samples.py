"""Samples and rewards that the training tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tiny
from transformers import TrainerCallback

from vismem_core.answers.reward import Written
from vismem_core.files.samples import Sample

SAMPLES = [
    Sample("one", (tiny.picture(32, 32, 0),), "what is on the left ?", "a bag , a coat ."),
    Sample("two", (tiny.picture(48, 32, 1), tiny.picture(16, 40, 2)), "and ?", "boot"),
    Sample("none", (), "what is it ?", "a boot , what ?"),
    Sample("more", (tiny.picture(24, 56, 3),), "is it a boot ?", "the coat , the bag , the boot ."),
]


def even(answers: Sequence[Written], samples: Sequence[Sample]) -> list[float]:
    """A reward with signal in any group: the share of even ids."""
    return [sum(token % 2 == 0 for token in own.ids) / len(own.ids) for own in answers]


def unlike(answers: Sequence[Written], samples: Sequence[Sample]) -> list[float]:
    """A reward that hardly any two answers share, so that no two choices are worth the same."""
    return [sum(own.ids) % 97 / 97 for own in answers]


def fickle(answers: Sequence[Written], samples: Sequence[Sample]) -> list[float]:
    """As :func:`even` for samples with an odd number for an id; all others' groups are silent."""
    scores = zip(even(answers, samples), samples, strict=True)
    return [score if sample.id.isdigit() and int(sample.id) % 2 else 0.0 for score, sample in scores]


def right_arm(answers: Sequence[Written], samples: Sequence[Sample]) -> list[float]:
    """1 for an answer whose first invocation is of the kind that its sample names, .5 for one without any."""
    scores = []
    for own, sample in zip(answers, samples, strict=True):
        asked = next((kind for token in own.ids if (kind := ARMS.get(token))), None)
        scores.append(0.5 if asked is None else float(asked == sample.answer))
    return scores


class Once(TrainerCallback):
    """Asks for a save and an evaluation after the first step, in the last of the processes alone."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        last = args.process_index == args.world_size - 1
        control.should_evaluate = control.should_save = last and state.global_step == 1


ARMS: dict[int, str] = {}
"""Ids of the invocation tokens, set by the test that knows the model."""
