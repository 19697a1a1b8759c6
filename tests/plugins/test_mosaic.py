"""`mosaic`: the same sample every time, no photo in both splits, answers as a second reading has them."""

import re
from collections import Counter

import numpy as np
import pytest

from vismem_plugins.mosaic import CLASSES, DOMAINS, GROUPS, KINDS, LONG, NEW, SEEN, Grid, mosaic, photos

OPPOSITES = [{"left", "right"}, {"above", "below"}, {"most", "least"}]


def expected(prompt: str, grid: Grid) -> str:
    """The answer by way of arrays and regular expressions, unlike the package's own."""
    cells = np.array(grid.labels).reshape(grid.size, grid.size)
    places = [(int(row) - 1, int(column) - 1) for row, column in re.findall(r"row (\d) column (\d)", prompt)]
    names = [name for name in (*CLASSES, *grid.domain.classes) if name in prompt.split()]
    match prompt.split():
        case ["what", "is", "at", *_]:
            return str(cells[places[0]])
        case ["count", *_]:
            return str((cells == names[0]).sum())
        case ["where", *_]:
            ((row, column),) = np.argwhere(cells == names[0])
            return f"row {row + 1} column {column + 1}"
        case ["what", "is", "left", *_]:
            return str(np.roll(cells, 1, axis=1)[places[0]])
        case ["what", "is", "right", *_]:
            return str(np.roll(cells, -1, axis=1)[places[0]])
        case ["what", "is", "above", *_]:
            return str(np.roll(cells, 1, axis=0)[places[0]])
        case ["what", "is", "below", *_]:
            return str(np.roll(cells, -1, axis=0)[places[0]])
        case ["what", "is", "diagonal", *_]:
            return str(np.roll(cells, (-1, -1), axis=(0, 1))[places[0]])
        case ["what", "is", "most", *_]:
            return Counter(cells.ravel().tolist()).most_common(1)[0][0]
        case ["is", *_]:
            return "yes" if cells[places[0]] == cells[places[1]] else "no"
        case ["list", "the", "cells", ",", "and", "answer", ":", *rest]:
            return f"{expected('list the cells .', grid)} answer : {expected(' '.join(rest), grid)}"
        case ["list", *_]:
            return " ".join(" , ".join(row) + " ." for row in cells.tolist())
        case ["what", "kind", *_]:
            return KINDS[names[0]]
        case ["what", "is", "the", "opposite", "of", word, "?"]:
            ((other,),) = [pair - {word} for pair in OPPOSITES if word in pair]
            return other
    raise AssertionError(prompt)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("size", [None, 2, 3, 4])
@pytest.mark.parametrize("type_", SEEN + NEW + tuple(LONG))
def test_answers_follow_from_the_labels(type_: str, size: int | None, domain: str) -> None:
    data = mosaic("heldout", types=[type_], size=size, domain=domain)
    for number in range(100):
        sample = data[number]
        assert sample.answer == expected(sample.prompt, data.grid(type_, number)), sample.id
        assert (sample.id, sample.type) == (f"heldout/{type_}/{number}", type_)


def test_what_is_in_a_picture() -> None:
    data = mosaic("heldout", types=["right", "most"])
    for number in range(20):
        sample, grid = data[number], data.grid(data[number].type or "", number // 2)
        told = data.content(sample)
        cells = {key: own for key, own in told.items() if key.startswith("row")}
        assert cells == {
            f"row {row} column {column}": grid.at(row, column)
            for row in range(1, grid.size + 1)
            for column in range(1, grid.size + 1)
        }
        counts = Counter(cells.values())
        assert {key: int(own) for key, own in told.items() if key not in cells} == {
            f"number of {name}": counts[name] for name in CLASSES
        }


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_pictures_show_the_labels(split: str, domain: str) -> None:
    """Every cell is, pixel for pixel, a photo of its class in its split."""
    own = DOMAINS[domain]
    of_photo = {
        photo.tobytes(): name
        for name, of_class in zip(own.classes, photos(split, own), strict=True)
        for photo in of_class
    }
    data = mosaic(split, types=["read"], domain=domain)
    for number in range(50):
        (image,) = data[number].images
        grid = data.grid("read", number)
        pixels = np.asarray(image)
        assert pixels.shape == (28 * grid.size, 28 * grid.size, 3)
        cells = [cell for row in np.split(pixels[..., 0], grid.size) for cell in np.split(row, grid.size, axis=1)]
        assert tuple(of_photo[cell.tobytes()] for cell in cells) == grid.labels


@pytest.mark.parametrize(("domain", "counts"), [("clothes", (8 * 500, 8 * 80)), ("digits", (10 * 138, 10 * 36))])
def test_no_photo_is_in_both_splits(domain: str, counts: tuple[int, int]) -> None:
    train, heldout = (
        {photo.tobytes() for photo in photos(split, DOMAINS[domain]).reshape(-1, 28, 28)}
        for split in ("train", "heldout")
    )
    assert (len(train), len(heldout)) == counts
    assert not train & heldout


def test_digits_are_those_of_the_published_table() -> None:
    """Its first row, by the grey levels from 0 to 16 of the upper quarter."""
    zero = [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0]
    first = photos("train", DOMAINS["digits"])[0, 0]
    assert first.shape == (28, 28) and not first[:2].any() and not first[:, :2].any()
    middles = first[2:26, 2:26].reshape(8, 3, 8, 3)[:, 1, :, 1].astype(float) * 16 / 255
    assert np.corrcoef(middles[:2].ravel(), zero)[0, 1] > 0.99


def test_samples_depend_on_split_seed_type_and_number_alone() -> None:
    def key(sample):  # type: ignore[no-untyped-def]
        return sample.id, sample.prompt, sample.answer, sample.images[0].tobytes()

    data = mosaic("heldout", seed=3)
    number = 12 * 7 + data.types.index("right")
    assert key(data[number]) == key(mosaic("heldout", seed=3)[number])
    assert key(data[number]) == key(mosaic("heldout", types=["right"], seed=3)[7])
    assert key(data[number]) != key(mosaic("heldout", seed=4)[number])
    assert key(data[number])[1:] != key(mosaic("train", seed=3)[number])[1:]


def test_is_a_sequence() -> None:
    data = mosaic("heldout", types=["read", "below"])
    assert len(data) == 2000
    assert [sample.id for sample in data[10:13]] == ["heldout/read/5", "heldout/below/5", "heldout/read/6"]
    assert data[-1].id == "heldout/below/999"
    with pytest.raises(IndexError):
        data[2000]


def test_groups_part_the_types() -> None:
    assert {"seen": SEEN, "new": NEW, "long": tuple(LONG)} == GROUPS
    assert not set(SEEN) & set(NEW)


@pytest.mark.parametrize(
    "wrong", [{"split": "test"}, {"types": ["sing"]}, {"types": []}, {"size": 1}, {"domain": "cats"}]
)
def test_what_does_not_exist_is_said(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        mosaic(**wrong)  # type: ignore[arg-type]
