"""Where rows come from: files of several kinds, folders, and the hub; each row with the line or number it stands at."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from vismem_core.base.images import is_file, shown
from vismem_core.errors import DataError

HUB = "hub:"
HELDOUT = ("heldout", "validation", "val", "test", "dev")
"""Splits that are asked for as ``heldout``, the first that there is."""
CAPTION = "Describe the image."
"""What is asked about an image that comes with nothing but a caption."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
EXTRA = "pip install 'vismem[data]'"

Row = bytes | Mapping[str, Any]
"""A line that holds JSON, or what a row holds by column."""


def known(source: str | Path) -> bool:
    """Whether this names a file, a folder with data or a data set of the hub."""
    return str(source).startswith(HUB) or is_file(Path(source)) or os.path.isdir(source)


def rows(source: str | Path, split: Literal["train", "heldout"]) -> Iterator[tuple[int, Row]]:
    """The rows of a source, in order.

    Raises:
        DataError: it cannot be read; the message names it.
    """
    path = Path(source)
    if str(source).startswith(HUB):
        return _hub(str(source), split)
    if path.is_dir():
        return _folder(path, split)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _table(path, "\t" if suffix == ".tsv" else ",")
    return _parquet(path) if suffix == ".parquet" else _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Lines of JSON, or the elements of one JSON array, which may go over several."""
    with _opened(path) as file:
        start = file.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        if start == b"[":
            yield from _array(path, file.read())
        else:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


class _opened:
    """A file's bytes, unpacked where gzip packed them; what goes wrong while they are read is told by its name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> io.BufferedReader:
        try:
            self.file = self.path.open("rb")
            start = self.file.peek(2)[:2]
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        if start in (b"\xff\xfe", b"\xfe\xff"):
            self.file.close()
            raise DataError(f"{self.path}: is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
        if start != b"\x1f\x8b":
            return self.file
        return io.BufferedReader(gzip.GzipFile(fileobj=self.file))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.file.close()
        if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
            raise DataError(f"{self.path}: is compressed by gzip and damaged: {error}") from error
        if isinstance(error, OSError):
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error


def _array(path: Path, data: bytes) -> Iterator[tuple[int, Row]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: {error}") from error
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if at >= len(text):
            raise DataError(f"{path}:{line}: the list of rows does not end; the file is perhaps cut off")
        if text[at] == "]":
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: not JSON: {error}") from error
        if not isinstance(row, Mapping):
            raise DataError(f"{path}:{line}: expected an object for each row, got {str(row)[:40]!r}")
        yield line, row


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    """Rows of a table with a line of names; empty cells are none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in table:
                if None in row:
                    raise DataError(f"{path}:{table.line_num}: more cells than columns; quote what holds {delimiter!r}")
                yield table.line_num, {name: cell for name, cell in row.items() if cell}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8: {error}") from error
    except csv.Error as error:
        raise DataError(f"{path}: is no such table: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path}: reading Parquet takes pyarrow: {EXTRA}") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error


def _folder(path: Path, split: str) -> Iterator[tuple[int, Row]]:
    """What ``datasets`` saved, or images with captions or a table beside them."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    for name in ("metadata.jsonl", "metadata.csv"):
        if (path / name).is_file():
            return _named(rows(path / name, "train"))
    pictures = sorted(own for own in path.rglob("*") if own.suffix.lower() in PICTURES)
    captioned = [own for own in pictures if own.with_suffix(".txt").is_file()]
    if not captioned:
        raise DataError(
            f"{shown(path)}: neither what datasets saved (save_to_disk) nor images with a caption each (a.png, a.txt) "
            "or a metadata.jsonl or metadata.csv with their file_name"
        )
    return _captioned(path, captioned)


def _named(found: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    """Rows of the form that ``datasets`` gives folders of images: ``file_name`` is the image's."""
    for number, row in found:
        try:
            told = json.loads(row) if isinstance(row, bytes) else dict(row)
        except (ValueError, RecursionError):  # whoever reads the row says what is wrong with it
            told = row
        if isinstance(told, dict) and "file_name" in told:
            told["image"] = told.pop("file_name")
            if "text" in told and not {"prompt", "question"} & told.keys():
                told |= {"prompt": CAPTION, "answer": told.pop("text")}
        yield number, told if isinstance(told, dict) else row


def _captioned(path: Path, pictures: list[Path]) -> Iterator[tuple[int, Row]]:
    for number, own in enumerate(pictures, 1):
        name = own.relative_to(path).as_posix()
        try:
            caption = own.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{own.with_suffix('.txt')}: cannot be read: {error}") from error
        yield number, {"id": name, "image": name, "prompt": CAPTION, "answer": caption}


def _saved(path: Path, split: str) -> Iterator[tuple[int, Row]]:
    datasets = _datasets(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises nearly anything
        raise DataError(f"{shown(path)}: cannot be read by datasets: {' '.join(str(error).split())[:200]}") from error
    return _columns(found if not isinstance(found, Mapping) else found[_split(str(path), found, split)])


def _hub(source: str, split: str) -> Iterator[tuple[int, Row]]:
    """``hub:ORG/NAME``, ``hub:ORG/NAME/CONFIG``, and ``:SPLIT`` behind either."""
    name, _, wanted = source.removeprefix(HUB).partition(":")
    parts = name.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise DataError(f"{source}: expected hub:ORG/NAME, with /CONFIG and :SPLIT where it has several")
    datasets = _datasets(source)
    config = parts[2] if len(parts) == 3 else None
    try:
        splits = [wanted] if wanted else datasets.get_dataset_split_names("/".join(parts[:2]), config)
        found = datasets.load_dataset(
            "/".join(parts[:2]), config, split=wanted or _split(source, dict.fromkeys(splits), split)
        )
    except DataError:
        raise
    except Exception as error:  # the library raises nearly anything
        raise DataError(f"{source}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    return _columns(found)


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{source}: reading it takes the package datasets: {EXTRA}") from error
    return datasets


def _split(source: str, found: Mapping[str, Any], split: str) -> str:
    for name in ("train",) if split == "train" else HELDOUT:
        if name in found:
            return name
    wanted = "train" if split == "train" else " or ".join(HELDOUT)
    raise DataError(f"{source}: has no split {wanted}; it has {', '.join(found)}; name one: {HUB}ORG/NAME:SPLIT")


def _columns(data: Any) -> Iterator[tuple[int, Row]]:
    """Rows of a data set of ``datasets``; images as they are stored, not decoded."""
    datasets = _datasets("")

    def stored(feature: Any) -> Any:
        if isinstance(feature, datasets.Image):
            return datasets.Image(decode=False)
        inner = getattr(feature, "feature", None)
        return type(feature)(stored(inner)) if inner is not None else feature

    for name, feature in data.features.items():
        if (plain := stored(feature)) != feature:
            data = data.cast_column(name, plain)
    yield from enumerate(data, 1)
