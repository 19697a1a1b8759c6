import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vismem_core.errors import DataError
from vismem_core.files.samples import Sample, Skipped, open_dataset, question, read

ROW: dict[str, Any] = {"id": "a", "image": "red.png", "prompt": "what colour ?", "answer": "red", "type": "colour"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("red.png", "../outside.png"):
        Image.new("RGB", (4, 4), "red").save(folder / name)
    png = bytearray((folder / "red.png").read_bytes())
    png[-20] ^= 0xFF  # inside the pixels: it opens, but its checksum is wrong
    (folder / "damaged.png").write_bytes(png)
    (folder / "text.png").write_text("no image")
    return folder


def write(folder: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines) + b"\n")
    return path


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ROW.items() if name != key}


def test_reads_rows(folder: Path) -> None:
    several = {"id": 2, "images": ["red.png", "red.png"], "prompt": "<image> and <image> ?", "answer": "yes"}
    text_only = {"id": "c", "prompt": "hello", "answer": "hi"}
    numbers = [{"id": at, "prompt": "how many ?", "answer": own} for at, own in ((3, 4), (4, 0.5))]
    data = read(write(folder, ROW, "", several, text_only, *numbers), need_answer=True)
    assert data[0] == Sample("a", (folder / "red.png",), "what colour ?", "red", "colour")
    assert [(sample.id, len(sample.images), sample.type) for sample in data[1:3]] == [("2", 2, None), ("c", 0, None)]
    assert [sample.answer for sample in data[3:]] == ["4", "0.5"]
    assert data.skipped == ()
    assert data[0].load_images()[0].getpixel((0, 0)) == (255, 0, 0)


BAD: list[tuple[dict[str, Any] | str | bytes, str]] = [
    ('{"id": ', "not JSON"),
    (b'{"id": "\xff"}', "not JSON"),
    ("[1]", "expected a JSON object, got '[1]'"),
    (ROW | {"promt": "x"}, "unknown key 'promt'; did you mean 'prompt'?"),
    (without("prompt"), "'prompt' is missing"),
    (without("id"), "'id' is missing"),
    (without("answer"), "'answer' is missing"),
    (ROW | {"answer": " "}, "'answer' must be a text that is not empty"),
    (ROW | {"answer": True}, "'answer' must be a text that is not empty, got True"),
    (ROW | {"answer": float("inf")}, "'answer' must be a text that is not empty, got inf"),
    (ROW | {"type": 3}, "'type' must be a text"),
    (ROW | {"images": ["red.png"]}, "both 'image' and 'images'"),
    (ROW | {"image": ["red.png"]}, "'image' must be a path"),
    (ROW | {"image": "blue.png"}, "data/blue.png"),
    (ROW | {"image": "damaged.png"}, "data/damaged.png is damaged"),
    (ROW | {"image": "text.png"}, "data/text.png is damaged or of no known format"),
    (ROW | {"image": "../outside.png"}, "lies outside the folder"),
    (ROW | {"image": "/etc/hostname"}, "lies outside the folder"),
    (ROW | {"prompt": "<image> or <image> ?"}, "the prompt has 2 <image>, and images: 1"),
    (ROW | {"id": "first"}, "the id 'first' is taken by line 1"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_rows(folder: Path, row: dict[str, Any] | str | bytes, message: str) -> None:
    path = write(folder, ROW | {"id": "first"}, row)
    with pytest.raises(DataError) as error:
        read(path, need_answer=True)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_bad_rows_are_skipped_and_listed(folder: Path) -> None:
    path = write(folder, *[row for row, _ in BAD if row != ROW | {"id": "first"}], ROW)
    data = read(path, need_answer=True, on_bad="skip")
    assert [sample.id for sample in data] == ["a"]
    assert [skipped.line for skipped in data.skipped] == list(range(1, len(BAD)))
    assert data.skipped[2] == Skipped(3, "expected a JSON object, got '[1]'", str(path))


@pytest.mark.parametrize("text", ["", "{", "\n\n"])
def test_nothing_usable(folder: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl: no usable row"):
        read(write(folder, text), need_answer=True, on_bad="skip")


def test_answers_are_needed_in_training_only(folder: Path) -> None:
    assert read(write(folder, without("answer")), need_answer=False)[0].answer is None


def test_images_outside_when_allowed(folder: Path) -> None:
    path = write(folder, ROW | {"image": "../outside.png"})
    assert read(path, need_answer=True, allow_outside=True)[0].images == (folder.parent / "outside.png",)


def test_links_inside_the_folder_may_lead_out(folder: Path) -> None:
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    assert len(read(write(folder, ROW | {"image": "link.png"}), need_answer=True)) == 1


def test_images_that_do_not_decode_name_sample_and_file(folder: Path) -> None:
    data = read(write(folder, ROW), need_answer=True)
    (folder / "red.png").write_text("replaced")
    with pytest.raises(DataError, match=r"data\.jsonl:1: the image .*red\.png does not decode"):
        data[0].load_images()


def test_images_are_turned_upright_and_rgb(folder: Path) -> None:
    image = Image.new("L", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(folder / "turned.jpg", exif=exif)
    loaded = Sample("a", (folder / "turned.jpg", Image.new("RGBA", (3, 3))), "?").load_images()
    assert [(picture.mode, picture.size) for picture in loaded] == [("RGB", (2, 4)), ("RGB", (3, 3))]


def test_open_dataset(folder: Path) -> None:
    assert open_dataset(write(folder, ROW), "heldout")[0].id == "a"
    first = {split: open_dataset("mosaic", split)[0] for split in ("train", "heldout")}  # type: ignore[arg-type]
    assert first["train"].id != first["heldout"].id
    with pytest.raises(DataError, match=r"mosiac: neither a file nor a data set; did you mean 'mosaic'\?"):
        open_dataset("mosiac", "train")


def test_a_question_is_checked_like_a_row(folder: Path) -> None:
    assert question("<image> ?", [folder / "red.png"]).images == (folder / "red.png",)
    for prompt, name, message in [
        (" ", "red.png", "the prompt is empty"),
        ("?", "blue.png", "no such image"),
        ("?", "text.png", "damaged"),
        ("<image><image>", "red.png", "has 2 <image>, and images: 1"),
    ]:
        with pytest.raises(DataError, match=message):
            question(prompt, [folder / name])


def test_postscript_is_refused(folder: Path) -> None:
    (folder / "red.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"red\.png is PostScript, which is a program"):
        read(write(folder, ROW), need_answer=True)
    with pytest.raises(DataError, match="is PostScript"):
        Sample("a", ((folder / "red.png").read_bytes(),), "?").load_images()
