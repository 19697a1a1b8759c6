"""Evaluation: which samples are asked, which conditions are measured, and what the blind control shows."""

from __future__ import annotations

import pytest
from tiny import picture, qwen

import vismem_core as vismem
from vismem_core.answers.evaluation import evaluate, pick
from vismem_core.answers.inference import answers
from vismem_core.files.samples import Sample


def sample(number: int, kind: str, answer: str = "boot") -> Sample:
    return Sample(str(number), (picture(24, 16, number),), "what is left ?", answer, kind)


def test_the_first_samples_of_each_type_are_picked() -> None:
    chosen = pick([sample(n, "ab"[n % 2]) for n in range(9)], 2)
    assert {kind: [own.id for own in found] for kind, found in chosen.items()} == {"a": ["0", "2"], "b": ["1", "3"]}


def test_accuracies_are_those_of_plain_answers() -> None:
    memory = vismem.attach(*qwen())
    asked = [sample(n, "ab"[n % 2]) for n in range(4)]
    with memory.off():
        told = [answer.text for answer in answers(memory, asked, max_new_tokens=4)]
    forced = [answer.text for answer in answers(memory, asked, max_new_tokens=4, trigger="schedule:0=long")]
    right = [
        Sample(own.id, own.images, own.prompt, (told if n < 2 else forced)[n], own.type) for n, own in enumerate(asked)
    ]
    report = evaluate(memory, right, groups={"seen": ("a",), "new": ("b",)}, max_new_tokens=4)
    assert forced[:2] != told[:2]
    for group, kind, rows in (("seen", "a", (0, 2)), ("heldout", "b", (1, 3))):
        for condition, texts in (("base", told), ("long", forced)):
            expected = sum(texts[n] == right[n].answer for n in rows) / 2
            assert report[group][condition] == {kind: expected}, (group, condition)


def test_the_blind_control_is_asked_over_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    import vismem_core.answers.dealt as module

    seen: dict[str | None, list[object]] = {}

    def spy(memory: object, asked: list[Sample], *, trigger: str | None, **rest: object) -> object:
        seen.setdefault(trigger, []).append([own.images for own in asked])
        return iter([module.Answer(own.id, "", (), "", 1) for own in asked])

    monkeypatch.setattr(module, "answers", spy)
    asked = [sample(n, "a") for n in range(3)]
    evaluate(vismem.attach(*qwen()), asked)
    (blind,) = seen["never"]
    assert blind == [asked[1].images, asked[2].images, asked[0].images]
    own = [sample.images for sample in asked]
    assert seen["policy"] == [own, own, blind]  # memory, noise, blind
