"""Damaged rows, images and memories, thousands of them: each is read, refused in one line, or left out and listed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from bases import config, tied
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import picture

from vismem_core.base.images import decode
from vismem_core.errors import CheckpointError, DataError, VismemError
from vismem_core.files import checkpoint
from vismem_core.files.formats import KEYS
from vismem_core.files.samples import read

ROWS, IMAGES, MEMORIES = 10_000, 2_000, 2_000
TOGETHER = 50
"""Rows that one example puts into a file."""
options: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
chances = st.integers(0, 2**48).map(Random)
TEXTS = [
    "", " ", "\0", "\ud83d", "\udc80", "a", "é", "e\u0301", "<image>", "<image><image>", "<ms_I>", "../x.png", "a.png",
    "/etc/passwd", "b.jpg", "c.tif", "missing.png", "x" * 5000, "a/" * 3000, "https://x.org/a.png", "A" * 200,
    "data:,x", "data:image/png;base64,", "data:image/png;base64,AAAA",
]  # fmt: skip
NUMBERS = [0, -1, 1e308, 10**30, float("nan"), float("inf")]
LISTS = [["a.png"], ["a.png", "b.jpg"], [["a.png"]], [None], {"url": "a.png"}, ["a.png", 3], [], {}]
VALUES: list[Any] = [None, True, False, *TEXTS, *NUMBERS, *LISTS]


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.strip() and "\n" not in text, repr(text)
    assert len(text) < 2000, len(text)
    text.encode()  # it can be printed and written
    return text


def damaged(data: bytes, chance: Random) -> bytes:
    """Bytes flipped, cut, doubled, put in or taken out."""
    held = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(held) + 1)
        how = chance.randrange(6)
        if how == 0 and held:
            held[at % len(held)] ^= 1 << chance.randrange(8)
        elif how == 1 and held:
            held[at % len(held)] = chance.choice((0, 0xFF, 0x80, 0x7F, 0x22, 0x5C, 0x7B))
        elif how == 2:
            del held[at:]
        elif how == 3:
            del held[at : at + chance.randrange(1, 9)]
        elif how == 4:
            held[at:at] = chance.randbytes(chance.randrange(1, 9))
        else:
            held[at:at] = held[at : at + chance.randrange(1, 40)]
    return bytes(held)


def row(number: int, chance: Random) -> bytes:
    """A row that is wrong in some way, or, now and then, not."""
    told: dict[str, Any] = {"id": str(number), "image": chance.choice(("a.png", "b.jpg", "c.tif", "d.gif", "e.webp"))}
    told |= {"prompt": chance.choice(("what ?", "<image> what ?", "é ?")), "answer": "bag", "type": "t"}
    for _ in range(chance.choice((0, 1, 1, 2))):
        how = chance.randrange(4)
        if how == 0:
            told[chance.choice(KEYS)] = chance.choice(VALUES)
        elif how == 1:
            told.pop(chance.choice(list(told)), None)
        elif how == 2:
            told[chance.choice(("imge", "\ud83d", "k" * 300, ""))] = 1
        else:
            told["id"] = "0"
    text = json.dumps(told, ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass")
    return damaged(text, chance) if chance.random() < 0.5 else text


def files(folder: Path) -> dict[str, bytes]:
    """Small images of several kinds, by name."""
    image = picture(12, 10, 0)
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.tif", "TIFF"), ("d.gif", "GIF"), ("e.webp", "WEBP")):
        image.save(folder / name, kind)
    deep = Image.new("I;16", (9, 7), 3000)
    deep.save(folder / "f.png", "PNG")
    deep.save(folder / "g.tif", "TIFF")
    Image.new("LA", (9, 7), (10, 20)).save(folder / "h.png", "PNG")
    image.save(folder / "i.bmp", "BMP")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rows")
    files(place)
    return place


def test_rows(folder: Path) -> None:
    found = Counter[str]()

    @settings(max_examples=ROWS // TOGETHER, **options)
    @given(chances)
    def check(chance: Random) -> None:
        lines = [row(number, chance).replace(b"\n", b" ") for number in range(TOGETHER)]
        path = folder / "q.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        told = [number for number, line in enumerate(lines, 1) if line.strip()]
        try:
            data = read(path, need_answer=True, on_bad="skip")
        except DataError as error:
            assert one_line(error).startswith(f"{path}: ")
            return
        used = [int(sample.place.rpartition(":")[2]) for sample in data]
        left = [own.line for own in data.skipped]
        assert sorted([*used, *left]) == told  # every row is one or the other
        found.update({"read": len(used), "left out": len(left)})
        for own in data.skipped:
            one_line(DataError(own.reason))
        json.dumps([str(own) for own in data.skipped]).encode()
        for sample in data:
            sample.digest()
            try:
                assert all(image.mode == "RGB" for image in sample.load_images())
            except DataError as error:
                assert one_line(error).startswith(f"{path}:")
        if left:
            with pytest.raises(DataError) as first:
                read(path, need_answer=True)
            assert one_line(first.value).startswith(f"{path}:{min(left)}: ")

    check()
    assert found["read"] > ROWS // 6 and found["left out"] > ROWS // 2, found


def test_images(folder: Path) -> None:
    found = Counter[str]()

    @settings(max_examples=IMAGES, **options)
    @given(chances)
    def check(chance: Random) -> None:
        name = chance.choice([path.name for path in sorted(folder.iterdir()) if path.suffix != ".jsonl"])
        held = damaged((folder / name).read_bytes(), chance)
        try:
            shown = decode(held)
        except DataError as error:
            one_line(error)
            found["refused"] += 1
        else:
            found["read"] += 1
            assert shown.mode == "RGB" and shown.width * shown.height == len(shown.tobytes()) // 3

    check()
    assert found["read"] > IMAGES // 5 and found["refused"] > IMAGES // 5, found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base, place = tied(), tmp_path_factory.mktemp("memory")
    memory = base.attach(config())
    memory.save(place / "whole")
    return memory, place


def tampered(tensors: dict[str, torch.Tensor], chance: Random) -> dict[str, torch.Tensor]:
    name = chance.choice(sorted(tensors))
    how, own = chance.randrange(7), tensors[name]
    changed = {
        0: lambda: own[..., :-1] if own.ndim else own[None],
        1: lambda: own.half(),
        2: lambda: own.long(),
        3: lambda: own * float("nan"),
        4: lambda: own.flatten(),
        5: lambda: torch.zeros(0),
    }
    if how in changed:
        return tensors | {name: changed[how]().contiguous()}
    return {key: value for key, value in tensors.items() if key != name} | {"new": own.clone()}


@pytest.mark.long
def test_memories(saved: Any) -> None:
    found = Counter[str]()

    @settings(max_examples=MEMORIES, **options)
    @given(chances)
    def check(chance: Random) -> None:
        memory, place = saved
        about, weights = ((place / "whole" / name).read_bytes() for name in ("vismem.json", "memory.safetensors"))
        target = place / "damaged"
        target.mkdir(exist_ok=True)
        how = chance.randrange(4)
        told = json.loads(about)
        if how == 0:
            weights = damaged(weights, chance)
        elif how == 1:  # whole files, whose content is another
            save_file(
                tampered(load_file(place / "whole" / "memory.safetensors"), chance), target / "memory.safetensors"
            )
            weights = (target / "memory.safetensors").read_bytes()
        elif how == 2:
            section = chance.choice((told, told["base"], told["memory"], told["memory"]["short"]))
            section[chance.choice([*section, "new"])] = chance.choice([value for value in VALUES if value != 10**30])
        (target / "memory.safetensors").write_bytes(weights)
        if chance.random() < 0.8:
            told["weights"] = checkpoint._digest(target / "memory.safetensors")
        about = json.dumps(told).encode()
        (target / "vismem.json").write_bytes(damaged(about, chance) if how == 3 else about)
        before = {name: own.detach().clone() for name, own in memory.trained().items()}
        try:
            stored = checkpoint.read(target, memory.backbone)
            stored.fill(memory.trained())
            found["read"] += 1
        except CheckpointError as error:
            found["refused"] += 1
            assert str(target) in one_line(error)
            after = memory.trained()
            assert all(after[name].equal(own) for name, own in before.items())  # nothing is filled in half
        except VismemError as error:
            one_line(error)
        assert all(own.isfinite().all() for own in memory.trained().values())

    check()
    assert found["read"] > MEMORIES // 20 and found["refused"] > MEMORIES // 2, found
