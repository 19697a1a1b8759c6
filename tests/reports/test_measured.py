"""What an evaluation measures: every type of a file, and a blind control that is blind."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from bases import Base, mini
from PIL import Image
from tiny import picture

import vismem_core as vismem
from vismem_core.answers.evaluation import evaluate, pick, swapped
from vismem_core.base.images import content
from vismem_core.files.samples import Sample
from vismem_plugins.mosaic import mosaic


def sample(name: str, shade: int, kind: str = "read", images: int = 1) -> Sample:
    pictures = tuple(Image.new("RGB", (8, 8), (shade + at, 0, 0)) for at in range(images))
    return Sample(name, pictures, "?", "a", kind)


def shades(told: Sample) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in told.load_images()]  # type: ignore[index]


def test_every_type_of_a_sorted_file_is_picked() -> None:
    rows = [sample(f"{kind}{at}", at, kind) for kind in ("read", "count", "where") for at in range(250)]
    assert {kind: len(own) for kind, own in pick(rows, 20).items()} == {"read": 20, "count": 20, "where": 20}


def test_samples_that_say_their_type_are_not_made_to_be_passed_over() -> None:
    class Lazy(Sequence[Sample]):
        made: list[int] = []

        def __len__(self) -> int:
            return 3000

        def __getitem__(self, at: Any) -> Any:
            self.made.append(at)
            return sample(str(at), at % 200, self.type_of(at))

        def type_of(self, at: int) -> str:
            return "first" if at < 2000 else "second"

    lazy = Lazy()
    assert [len(own) for own in pick(lazy, 2).values()] == [2, 2]
    assert lazy.made == [0, 1, 2000, 2001]
    shipped = mosaic("heldout")
    assert [shipped.type_of(at) for at in range(30)] == [shipped[at].type for at in range(30)]


def test_blind_is_another_picture_whatever_the_order() -> None:
    """Four questions about each image, one after the other, as VQA data has them."""
    rows = [sample(f"{image}-{at}", 10 * image) for image in range(5) for at in range(4)]
    blind = swapped({"read": rows})["read"]
    assert [own.id for own in blind] == [own.id for own in rows]
    assert all(shades(ours) != shades(theirs) for ours, theirs in zip(rows, blind, strict=True))


def test_blind_is_by_content_not_by_file() -> None:
    rows = [sample("a", 10), sample("b", 10), sample("c", 20)]
    assert [shades(own) for own in swapped({"read": rows})["read"]] == [[20], [20], [10]]


def test_blind_where_the_numbers_of_images_alternate() -> None:
    rows = [sample(str(at), 10 * at, images=1 + at % 2) for at in range(6)]
    blind = swapped({"read": rows})["read"]
    assert [len(own.images) for own in blind] == [len(own.images) for own in rows]
    assert all(set(shades(ours)).isdisjoint(shades(theirs)) for ours, theirs in zip(rows, blind, strict=True))


def test_blind_where_all_samples_share_an_image() -> None:
    """A reference beside each question's own image: the own one is swapped, and by a wholly other pair if there is."""
    reference = Image.new("RGB", (8, 8), (200, 0, 0))
    rows = [Sample(str(at), (Image.new("RGB", (8, 8), (at, 0, 0)), reference), "?", "a", "pair") for at in (1, 2, 3)]
    assert [shades(own) for own in swapped({"pair": rows})["pair"]] == [[2, 200], [3, 200], [1, 200]]
    other = sample("other", 50, images=2)
    assert [shades(own) for own in swapped({"pair": rows, "read": [other]})["pair"]] == [[50, 51]] * 3


def test_the_only_sample_of_a_type_is_shown_another_types_image() -> None:
    rows = {"read": [sample("a", 10)], "count": [sample("b", 20, "count"), sample("c", 30, "count")]}
    assert [shades(own) for own in swapped(rows)["read"]] == [[20]]


def test_what_cannot_be_swapped_is_left_out_and_counted() -> None:
    base = mini()
    memory = base.attach()
    none = Sample("none", (), "what is it ?", "bag", "text")
    many = Sample("many", tuple(picture(28, 28, at) for at in range(3)), "what is it ?", "bag", "many")
    own = mosaic("heldout", types=["read"])[:3]
    report = evaluate(memory, [none, many, *own], per_type=3, max_new_tokens=2)
    assert report["not_blind"] == {"text": 1, "many": 1}
    assert set(report["heldout"]["memory"]) == {"text", "many", "read"}
    assert set(report["heldout"]["blind"]) == set(report["heldout"]["blind_base"]) == {"read"}


@pytest.fixture(scope="module")
def shipped() -> vismem.Memory:
    base = mini()
    return vismem.attach(base.model, base.processor)


@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_the_blind_base_knows_nothing_in_any_order(shipped: vismem.Memory, order: str) -> None:
    """The trained model reads cells; over another picture it is right about as often as chance (one in eight)."""
    rows = []
    for number, told in enumerate(mosaic("heldout", types=["list"], size=2)[:15]):
        cells = [cell.strip() for line in str(told.answer).rstrip(" .").split(" . ") for cell in line.split(" , ")]
        for at, cell in enumerate(cells):
            prompt = f"what is at row {at // 2 + 1} column {at % 2 + 1} ?"
            rows.append(Sample(f"{number}-{at}", told.images, prompt, cell, "read"))
    if order == "shuffled":
        Random(0).shuffle(rows)
    found = evaluate(shipped, rows, per_type=60, max_new_tokens=4)["heldout"]
    assert found["base"]["read"] > 0.8
    assert found["blind_base"]["read"] < 0.4


def test_pictures_are_told_apart_by_what_they_show() -> None:
    assert content(picture(8, 8, 0)) == content(picture(8, 8, 0).copy())
    assert content(picture(8, 8, 0)) != content(picture(8, 8, 1))


def test_base_alone_is_enough(any_base: Base) -> None:
    """A single sample, which nothing can be swapped with, measures what can be measured."""
    report = evaluate(any_base.attach(), [Sample("a", (picture(24, 24, 0),), "what ?", "bag", "t")], max_new_tokens=2)
    assert report["not_blind"] == {"t": 1} and report["heldout"]["blind"] == {}
    assert set(report["heldout"]["base"]) == {"t"}
