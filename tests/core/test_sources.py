"""Rows of many kinds of source and format come to the same samples."""

from __future__ import annotations

import base64
import csv
import gzip
import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from vismem_cli.app import app
from vismem_core.errors import DataError
from vismem_core.files import window
from vismem_core.files.samples import Dataset, Sample, open_dataset, read

COLOURS = ("red", "green", "blue")


def png(colour: str) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    return tmp_path


def asked(data: Dataset) -> list[tuple[Any, ...]]:
    """What is asked, with what the images show in place of the images."""
    return [
        (own.prompt, own.answer, own.turns, [image.getpixel((0, 0)) for image in own.load_images()]) for own in data
    ]


PLAIN = [
    {"id": colour, "image": f"{colour}.png", "prompt": "<image> what colour ?", "answer": colour} for colour in COLOURS
]
LLAVA = [
    {
        "id": colour,
        "image": f"{colour}.png",
        "conversations": [
            {"from": "human", "value": "<image> what colour ?"},
            {"from": "gpt", "value": colour},
        ],
    }
    for colour in COLOURS
]
CHAT = [
    {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": f"{colour}.png"}, {"type": "text", "text": " what colour ?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": colour}]},
        ]
    }
    for colour in COLOURS
]
URL = [
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}"},
                    },
                    {"type": "text", "text": " what colour ?"},
                ],
            },
            {"role": "assistant", "content": colour},
        ]
    }
    for colour in COLOURS
]
TRL = [
    {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what colour ?"}]}],
        "completion": [{"role": "assistant", "content": colour}],
        "images": [f"{colour}.png"],
    }
    for colour in COLOURS
]
VQA = [
    {
        "question_id": at,
        "image": f"{colour}.png",
        "question": "<image> what colour ?",
        "answers": [{"answer": colour}, {"answer": "grey"}, {"answer": colour}],
        "confidence": 3,
    }
    for at, colour in enumerate(COLOURS)
]
FORMATS = {"ours": PLAIN, "conversations": LLAVA, "chat": CHAT, "url": URL, "trl": TRL, "vqa": VQA}
EXPECTED = [
    ("<image> what colour ?", "red", (), [(255, 0, 0)]),
    ("<image> what colour ?", "green", (), [(0, 128, 0)]),
    ("<image> what colour ?", "blue", (), [(0, 0, 255)]),
]


def jsonl(folder: Path, rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def packed(folder: Path, rows: Any) -> Path:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def array(folder: Path, rows: Any) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    return path


def parquet(folder: Path, rows: Any) -> Path:
    from pyarrow import Table
    from pyarrow import parquet as files

    path = folder / "rows.parquet"
    files.write_table(Table.from_pylist(rows), path)
    return path


def saved(folder: Path, rows: Any) -> Path:
    datasets = pytest.importorskip("datasets")
    path = folder / "saved"
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    for own in folder.glob("*.png"):
        (path / own.name).write_bytes(own.read_bytes())
    return path


PAIRS = [(name, write) for name in FORMATS for write in (jsonl, packed, array)]
PAIRS += [(name, write) for name in ("ours", "conversations", "trl", "vqa") for write in (parquet, saved)]
"""One column of a table cannot hold texts and lists of parts, as chats have them."""


@pytest.mark.parametrize(("name", "write"), PAIRS, ids=[f"{name}-{write.__name__}" for name, write in PAIRS])
def test_all_come_to_the_same(name: str, write: Callable[[Path, Any], Path], folder: Path) -> None:
    data = open_dataset(write(folder, FORMATS[name]), "train")
    assert asked(data) == EXPECTED
    assert len({own.id for own in data}) == 3


def test_tables(folder: Path) -> None:
    path = folder / "rows.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["picture", "q", "a", "note"])
        for colour in COLOURS:
            table.writerow([f"{colour}.png", '<image> what\n"colour", then ?', colour, ""])
    data = read(path, need_answer=True, columns={"image": "picture", "prompt": "q", "answer": "a"})
    assert [own.prompt for own in data] == ['<image> what\n"colour", then ?'] * 3
    assert [own.place for own in data] == [f"{path}:{line}" for line in (3, 5, 7)]
    with pytest.raises(DataError, match=r"rows\.csv:3: there is no column 'query'; there are picture, q, a"):
        read(path, need_answer=True, columns={"prompt": "query"})


def test_images_that_a_table_holds(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [str(folder / f"{colour}.png") for colour in COLOURS], "question": ["what colour ?"] * 3}
    table = datasets.Dataset.from_dict({**rows, "answer": list(COLOURS)}).cast_column("image", datasets.Image())
    several = [{"images": [{"bytes": png(own), "path": "gone"}] * 2, "question": "?", "answer": own} for own in COLOURS]
    parts = datasets.DatasetDict({"train": table, "validation": table.select([2])})
    parts.save_to_disk(str(folder / "parts"))
    for own in folder.glob("*.png"):
        own.unlink()
    assert [row[3] for row in asked(open_dataset(folder / "parts", "train"))] == [row[3] for row in EXPECTED]
    assert [row[1] for row in asked(open_dataset(folder / "parts", "heldout"))] == ["blue"]
    assert [len(row[3]) for row in asked(read(parquet(folder, several), need_answer=True))] == [2, 2, 2]


def test_folders_of_images(folder: Path) -> None:
    for colour in COLOURS:
        (folder / f"{colour}.txt").write_text(f"all {colour}\n")
    data = read(folder, need_answer=True)
    assert [(own.id, own.prompt, own.answer) for own in data] == [
        (f"{colour}.png", "Describe the image.", f"all {colour}") for colour in sorted(COLOURS)
    ]
    (folder / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a red square"}\n')
    (own,) = read(folder, need_answer=True)
    assert (own.images, own.answer) == ((folder / "red.png",), "a red square")
    (folder / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a red square"}\n{"file_\n[1]\n')
    data = read(folder, need_answer=True, on_bad="skip")
    assert len(data) == 1 and [lost.line for lost in data.skipped] == [2, 3]
    with pytest.raises(DataError, match=r":2: not JSON"):
        read(folder, need_answer=True)


def test_a_mark_that_utf8_does_not_need(folder: Path) -> None:
    path = array(folder, PLAIN)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert asked(read(path, need_answer=True)) == EXPECTED


@pytest.mark.parametrize("piece", [7, 40, 1000])
def test_an_array_is_read_in_pieces(piece: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever pieces end: in a row, in a character, between rows."""
    monkeypatch.setattr(window, "PIECE", piece)
    rows = [
        {"id": f"{at}", "image": "red.png", "prompt": "größer\n[{]" * (at % 5 + 1), "answer": "ü"} for at in range(9)
    ]
    path = folder / "rows.json"
    path.write_text(" \n[\n\n" + " ,\n".join(json.dumps(own, ensure_ascii=False, indent=1) for own in rows) + "\n]\n")
    data = read(path, need_answer=True)
    assert [own.prompt for own in data] == [own["prompt"] for own in rows]
    at = [own for own, text in enumerate(path.read_text().splitlines(), 1) if text.startswith("{")]
    assert [own.place for own in data] == [f"{path}:{line}" for line in at]
    path.write_bytes(path.read_bytes().rpartition(b": ")[0] + b" 3")
    with pytest.raises(DataError, match=rf"rows.json:{at[-1]}: not JSON: .* at byte {path.stat().st_size - 1}$"):
        read(path, need_answer=True)
    monkeypatch.setattr(window, "LONGEST", 60)
    with pytest.raises(DataError, match="is longer than 60 bytes, or does not end"):
        read(path, need_answer=True)


def test_turns(folder: Path) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "this ?"}]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "image", "image": "blue.png"}]},
            {"role": "assistant", "content": "blue"},
        ]
    }
    (own,) = read(jsonl(folder, [row]), need_answer=True)
    assert own.turns == (("system", "be brief"), ("user", "<image>this ?"), ("assistant", "red"))
    assert (own.prompt, own.answer) == ("and <image>", "blue")
    assert own.images == (folder / "red.png", folder / "blue.png")
    assert own.digest() != Sample("1", own.images, own.prompt).digest()
    row["messages"].pop()
    with pytest.raises(DataError, match="'answer' is missing"):
        read(jsonl(folder, [row]), need_answer=True)
    assert read(jsonl(folder, [row]), need_answer=False)[0].prompt == "and <image>"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "robot", "content": "x"}]}, "turn 1: 'role' is 'robot'; it must be one of"),
    ({"messages": ["x"]}, "turn 1 must be an object"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "no question of a user"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "turn 1: a part of type"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 shows more images than the row has"),
    (
        {"conversations": [{"from": "human", "value": "<image><image> ?"}], "image": "red.png"},
        "the prompt has 2 <image>",
    ),
    ({"question": "?", "answers": [{"text": "x"}]}, "'answers' must be a list of texts"),
    ({"question": "?", "image": 3, "answer": "x"}, "'image' must be a path"),
    ({"question": "?", "image": "../x.png", "answer": "x"}, "lies outside the folder of the file"),
    ({"question": "?", "image": "http://x/y.png", "answer": "x"}, "is a URL"),
]


@pytest.mark.parametrize(("row", "says"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_with_a_row(row: dict[str, Any], says: str, folder: Path) -> None:
    path = array(folder, [{"id": "x", **PLAIN[0]}, row | {"id": "7"}])
    line = path.read_text()[: path.read_text().rindex('"id": "7"')].count("\n")  # of the row's brace
    with pytest.raises(DataError) as caught:
        read(path, need_answer=False)
    told = str(caught.value)
    assert told.startswith(f"{path}:") and says in told
    assert int(told.removeprefix(f"{path}:").split(":")[0]) <= line
    data = read(path, need_answer=False, on_bad="skip")
    assert (len(data), len(data.skipped)) == (1, 1)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[\n{"id"', "a.json:2: not JSON"),
        ("a.json", b'[{"id": "1", "prompt": "x", "answer": "y"},\n', "a.json:2: the list of rows does not end"),
        ("a.json", b"[1]", "a.json:1: expected an object for each row"),
        ("a.json", b"[\xff", "a.json: is not UTF-8"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv:2: more cells than columns"),
        ("a.csv", b'a,b\n"1,2\n', "a.csv: is no such table"),
        ("a.csv", b"\xff\xfe", "a.csv: is not UTF-8"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read as Parquet"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00", "is compressed by gzip and damaged"),
        ("a.csv", b"", "no usable row"),
    ],
)
def test_what_is_wrong_with_a_file(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says.replace(".", r"\.")):
        read(tmp_path / name, need_answer=True)


def test_what_is_wrong_with_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="neither what datasets saved"):
        read(tmp_path, need_answer=True)
    for source in ("hub:alone", "hub:a/b/c/d", "hub:/b"):
        with pytest.raises(DataError, match="expected hub:ORG/NAME"):
            read(source, need_answer=True)
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="hub:no/such: cannot be loaded"):
        open_dataset("hub:no/such", "train")


def test_data_shows_what_was_understood(folder: Path) -> None:
    path = array(folder, [*LLAVA, {"id": "bad", "conversations": []}])
    done = CliRunner().invoke(app, ["data", str(path), "--json", "--html", str(folder / "page.html")])
    told = json.loads(done.stdout)
    assert (told["questions"], told["images"], told["without_answer"]) == (3, {"1": 3}, 0)
    assert told["words_prompt"] == {"least": 4, "middle": 4, "most": 4}
    (lost,) = told["skipped"]
    assert "no question of a user" in lost["reason"]
    page = (folder / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "what colour ?" in page
    done = CliRunner().invoke(app, ["data", str(path)])
    assert done.exit_code == 0 and "questions" in done.stdout
    assert CliRunner().invoke(app, ["data", str(path), "--columns", "prompt"]).exit_code == 2
