"""Batches: an order that a seed fixes, and prompts that grow without moving their padding."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import untied
from PIL import Image
from transformers import BatchFeature

from vismem_core.base.families import find_backbone
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample, Skipped
from vismem_core.training.batches import Batch, Sampler, extended
from vismem_core.training.draws import Draws
from vismem_core.training.processes import Processes


def test_every_epoch_is_a_permutation_and_positions_resume() -> None:
    sampler = Sampler(10, 4, seed=3)
    drawn = [index for _ in range(5) for index in sampler.draw()]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:] != list(range(10))
    later = Sampler(10, 4, seed=3)
    later.position = 8
    assert later.draw() == drawn[8:12]
    assert Sampler(10, 4, seed=4).draw() != drawn[:4]


def test_extended_prompts_are_padded_on_the_left_again() -> None:
    inputs = BatchFeature(
        {
            "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
            "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
            "mm_token_type_ids": torch.tensor([[0, 1, 0], [1, 0, 0]]),
            "pixel_values": torch.ones(2, 4),
        }
    )
    grown = extended(inputs, [[1, 2, 3], []], pad=0)
    assert grown["input_ids"].tolist() == [[5, 6, 1, 2, 3], [0, 0, 7, 8, 9]]
    assert grown["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert grown["mm_token_type_ids"].tolist() == [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert grown["pixel_values"] is inputs["pixel_values"]


class Slow(list[Sample]):
    """Samples that take their time, and know who asked for them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        super().__init__(samples)
        self.threads: list[str] = []

    def __getitem__(self, at: Any) -> Any:
        self.threads.append(threading.current_thread().name)
        time.sleep(0.02)
        return super().__getitem__(at)


def drawing(data: Sequence[Sample], left_out: list[Skipped] | None = None) -> Draws:
    base = untied()
    draws = Draws(find_backbone(base.model)(base.model, base.processor), data, 4, 0, Processes(), left_out)
    assert not draws.beside  # on a CPU
    draws.beside = True
    return draws


def samples(count: int = 12) -> list[Sample]:
    return [Sample(str(at), (Image.new("RGB", (56, 56)),), "red or green ?", "red", "t") for at in range(count)]


def ids(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [own.id for own in batch.samples]


def test_batches_are_made_ahead_and_are_the_same() -> None:
    data = Slow(samples())
    plain, ahead = drawing(samples()), drawing(data)
    for _ in range(7):
        expected = ids(plain(4))
        before = len(data.threads)
        assert ids(ahead(4)) == expected and ahead.position == plain.position
        ahead.ahead(4)
        time.sleep(0.2)
        assert len(data.threads) > before and data.threads[-1].startswith("vismem-batches")
    assert ids(ahead(2)) == ids(plain(2))  # who asks for another number gets what he would have got
    assert ids(ahead(4)) == ids(plain(4)) and ahead.position == plain.position == 34


def test_a_bad_sample_is_told_when_its_batch_is_asked_for() -> None:
    data = samples()
    first = Sampler(len(data), 4, 0)
    good, bad = first.draw(), first.draw()[0]
    data[bad] = Sample("bad", (b"no image",), "red ?", "red", "t")
    strict = drawing(data)
    assert sorted(ids(strict(4)), key=int) == sorted(map(str, good), key=int)
    strict.ahead(4)
    with pytest.raises(DataError, match="bad"):
        strict(4)
    left_out: list[Skipped] = []
    lenient = drawing(data, left_out)
    lenient(4)
    lenient.ahead(4)
    time.sleep(0.5)
    assert not left_out and lenient.position == 4  # what is saved now knows nothing of it
    assert "bad" not in ids(lenient(4)) and len(left_out) == 1 and lenient.position == 9


def test_an_image_is_decoded_once_in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, opened = [], Counter[str]()
    for at in range(12):
        Image.new("RGB", (56, 56), (at, 0, 0)).save(tmp_path / f"{at}.png")
        text = "red or <|image_pad|> ?" if at in Sampler(12, 4, 0).draw()[1:3] else "red or green ?"
        data.append(Sample(str(at), (tmp_path / f"{at}.png",), text, "red", "t"))
    real = Image.open

    def counted(file: Any, *rest: Any, **named: Any) -> Any:
        opened[str(file)] += 1
        return real(file, *rest, **named)

    monkeypatch.setattr(Image, "open", counted)
    left_out: list[Skipped] = []
    others = set(threading.enumerate())
    draws = drawing(data, left_out)
    batch = draws(4)
    assert set(threading.enumerate()) - others
    assert batch is not None and len(batch) == 4 and len(left_out) == 2
    assert set(opened.values()) == {1} and all(isinstance(own.images[0], Path) for own in batch.samples)
    draws.close()
    assert not set(threading.enumerate()) - others


def test_on_a_cpu_threads_are_used_where_data_is_waited_for() -> None:
    draws = drawing(samples())
    draws.beside = False
    draws.began -= 1e6
    draws.ahead(4)
    assert not draws._coming
    draws.waited = 1e6
    draws.ahead(4)
    assert list(draws._coming) == [(4, 0), (4, 4)]
    assert ids(draws(4)) == ids(drawing(samples())(4))
    draws.close()
