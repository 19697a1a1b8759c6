"""The model sees the picture that a person sees, whatever way it comes in."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import tied
from PIL import Image
from runs import read, written

from vismem_core.base.families import find_backbone
from vismem_core.base.images import decode
from vismem_core.errors import AttachError, DataError
from vismem_core.files.samples import Sample

RAMP = np.linspace(0, 1, 256)[None].repeat(4, 0)
EXPECTED = np.arange(256)


def file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ramp(depth: int, dtype: Any = np.uint16) -> Image.Image:
    """From black to white in so many bits."""
    return Image.fromarray((RAMP * (2**depth - 1)).round().astype(dtype))


DEEP = {
    "16 bits": ramp(16),
    "16 bits, PNG": file(ramp(16), "PNG"),
    "16 bits, TIFF": file(ramp(16), "TIFF"),
    "12 bits": ramp(12),
    "12 bits, PNG": file(ramp(12), "PNG"),
    "12 bits, TIFF": file(ramp(12), "TIFF", tiffinfo={}),
    "10 bits": ramp(10),
    "8 bits in 32": ramp(8, np.int32),
    "16 bits in 32": ramp(16, np.int32),
    "floats to 1": Image.fromarray(RAMP.astype(np.float32)),
    "floats to 255": Image.fromarray((255 * RAMP).astype(np.float32)),
    "floats around 0": Image.fromarray((2 * RAMP - 1).astype(np.float32)),
    "floats, TIFF": file(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_brightness_is_scaled_by_depth(name: str) -> None:
    shown = np.asarray(decode(DEEP[name]))
    assert shown.shape == (4, 256, 3)
    np.testing.assert_allclose(shown[0, :, 0], EXPECTED, atol=1)


def test_a_dark_picture_whose_file_says_its_depth_stays_dark() -> None:
    image = Image.fromarray((RAMP * 100).astype(np.uint16))
    assert np.asarray(decode(image)).max() == 100  # taken for 8 bits
    image.tag_v2 = {258: (12,)}  # type: ignore[attr-defined]  # what pillow tells of a TIFF of 12 bits
    assert np.asarray(decode(image)).max() == round(100 * 255 / 4095)


def shape_on_transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    image.putpixel((0, 7), (0, 0, 0, 128))
    return image.convert(mode)


TRANSPARENT = {
    "RGBA": shape_on_transparent("RGBA"),
    "LA": shape_on_transparent("LA"),
    "La": shape_on_transparent("LA").convert("La"),
    "RGBa": shape_on_transparent("RGBa"),
    "PNG": file(shape_on_transparent("RGBA"), "PNG"),
    "WebP": file(shape_on_transparent("RGBA"), "WEBP", lossless=True),
    "palette": file(shape_on_transparent("RGBA").quantize(), "PNG"),
    "GIF": file(shape_on_transparent("RGBA"), "GIF"),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_transparent_is_white(name: str) -> None:
    shown = decode(TRANSPARENT[name])
    assert shown.mode == "RGB"
    assert (shown.getpixel((0, 0)), shown.getpixel((4, 4))) == ((255,) * 3, (0,) * 3)
    if name not in ("palette", "GIF"):
        half = shown.getpixel((0, 7))
        assert all(126 <= value <= 129 for value in half)  # type: ignore[union-attr]


def test_a_colour_that_stands_for_transparent() -> None:
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    shown = decode(file(image, "PNG", transparency=(1, 2, 3)))
    assert (shown.getpixel((1, 1)), shown.getpixel((0, 0))) == ((255,) * 3, (9, 9, 9))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "PA", "I", "F", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    assert decode(Image.new(mode, (3, 2))).mode == "RGB"


def turned() -> Image.Image:
    """Red above blue, stored a quarter turn away."""
    upright = Image.new("RGB", (16, 32), "blue")
    upright.paste("red", (0, 0, 16, 16))
    image = upright.transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6
    return image


def test_turned_pictures_are_upright_opened_or_not(tmp_path: Path) -> None:
    image = turned()
    exif = image.getexif()
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        for way in (tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes(), opened):
            shown = decode(way)
            assert shown.size == (16, 32)
            assert (shown.getpixel((8, 4)), shown.getpixel((8, 28))) == ((255, 0, 0), (0, 0, 255))


@pytest.mark.parametrize("name", ["alpha", "16 bits", "turned"])
def test_the_models_inputs_are_the_same_in_every_way(tmp_path: Path, name: str) -> None:
    """A path, bytes, an opened image, and what they show, in ``inputs`` and from a file of rows."""
    image = {"alpha": shape_on_transparent("RGBA").resize((32, 32)), "16 bits": ramp(16).resize((32, 32))}.get(name)
    path = tmp_path / "image.png"
    (image or turned()).save(path, exif=turned().getexif() if image is None else None)
    base = tied()
    backbone = find_backbone(base.model)(base.model, base.processor)
    expected = backbone.inputs(["?"], [[decode(path)]])["pixel_values"]
    with Image.open(path) as opened:
        for way in (path, path.read_bytes(), opened):
            assert backbone.inputs(["?"], [[way]])["pixel_values"].equal(expected)
    row = {"id": "a", "image": "image.png", "prompt": "?", "answer": "a"}
    sample = read(written(tmp_path / "q.jsonl", [row]))[0]
    assert backbone.inputs(["?"], [sample.load_images()])["pixel_values"].equal(expected)
    with Image.open(path) as opened:
        plain = Sample("a", (Image.fromarray(np.asarray(opened.convert("RGB"))),), "?")
        same = backbone.inputs(["?"], [plain.load_images()])["pixel_values"]
        assert same.shape != expected.shape or not torch.equal(same, expected)  # it does matter


def test_base64_is_decoded_or_told_shortly(tmp_path: Path) -> None:
    image = Image.new("RGB", (24, 24), "red")
    text = base64.b64encode(file(image, "PNG")).decode()
    row = {"id": "a", "prompt": "?", "answer": "a"}
    good = [row | {"image": f"data:image/png;base64,{text}"}, row | {"id": "b", "image": text}]
    good.append(row | {"id": "c", "image": base64.urlsafe_b64encode(file(image, "PNG")).decode()})
    for sample in read(written(tmp_path / "good.jsonl", good)):
        assert sample.load_images()[0].getpixel((3, 3)) == (255, 0, 0)
    for bad, told in [
        ("data:image/png;base64," + "!" * 5000, "base64 that does not decode"),
        ("data:image/png," + "%20" * 5000, "data URL without base64"),
        (text[: len(text) // 2] + "!" + "A" * 5000, "no such image"),
        ("A" * 5000, "no such image"),
        ("x/" * 3000, "no such image"),
        ("some folder/" * 600, "no such image"),
        ("https://example.org/" + "a" * 5000, "is a URL"),
    ]:
        with pytest.raises(DataError, match=told) as error:
            read(written(tmp_path / "bad.jsonl", [row | {"image": bad}]))
        assert str(error.value).startswith(f"{tmp_path / 'bad.jsonl'}:1: ")
        assert len(str(error.value)) < len(str(tmp_path)) + 400


def test_pictures_in_python_may_be_texts_and_nothing_else_is_taken(tmp_path: Path) -> None:
    base = tied()
    backbone = find_backbone(base.model)(base.model, base.processor)
    image = Image.new("RGB", (24, 24), "red")
    image.save(tmp_path / "a.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    expected = backbone.inputs(["?"], [[image]])["pixel_values"]
    for way in (str(tmp_path / "a.png"), url):
        assert backbone.inputs(["?"], [[way]])["pixel_values"].equal(expected)
    for wrong, told in (
        (np.asarray(image), "is a ndarray; give an image of PIL"),
        ("lost.png", "is no file: lost.png"),
    ):
        with pytest.raises(DataError, match=rf"image 0 of prompt 0 {told}"):
            backbone.inputs(["?"], [[wrong]])
    assert backbone.inputs(["?"])["input_ids"].equal(backbone.inputs(["?"], [[]])["input_ids"])


def test_images_over_the_limit_are_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    row = {"id": "a", "image": "large.png", "prompt": "?", "answer": "a"}
    with pytest.raises(DataError, match=r"large\.png has more than 2,000 pixels: resize it, or raise"):
        read(written(tmp_path / "q.jsonl", [row]))


def test_an_image_given_in_python_that_does_not_decode(tmp_path: Path) -> None:
    base = tied()
    backbone = find_backbone(base.model)(base.model, base.processor)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "cut.png").write_bytes(file(Image.fromarray(noise), "JPEG")[:2000])
    with pytest.raises((DataError, AttachError), match="image 1 of prompt 0 does not decode"):
        backbone.inputs(["?"], [[Image.new("RGB", (24, 24)), tmp_path / "cut.png"]])
