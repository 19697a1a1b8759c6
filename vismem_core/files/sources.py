"""Where rows come from: files of several kinds, folders, and the hub; each row with the line or number it stands at."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from vismem_core.base.images import is_file, shown
from vismem_core.errors import DataError

from .tables import EXTRA, Parquet, Saved
from .texts import Row, text_rows

HUB = "hub:"
HELDOUT = ("heldout", "validation", "val", "test", "dev")
"""Splits that are asked for as ``heldout``, the first that there is."""
CAPTION = "Describe the image."
"""What is asked about an image that comes with nothing but a caption."""
LONGEST_CAPTION = 2**20
"""Bytes of one."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Rows(Protocol):
    """Rows that are read where they stand, and not kept."""

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Each row with its line or number, once; :meth:`again` knows those that were given."""
        ...

    def again(self, at: int) -> Row:
        """The same row by its place among those given, from 0; any thread may ask."""
        ...


def known(source: str | Path) -> bool:
    """Whether this names a file, a folder with data or a data set of the hub."""
    return str(source).startswith(HUB) or is_file(Path(source)) or os.path.isdir(source)


def rows(source: str | Path, split: Literal["train", "heldout"]) -> Rows:
    """The rows of a source, in order.

    Raises:
        DataError: it cannot be read; the message names it.
    """
    path = Path(source)
    if str(source).startswith(HUB):
        return _hub(str(source), split)
    if path.is_dir():
        return _folder(path, split)
    return Parquet(path) if path.suffix.lower() == ".parquet" else text_rows(path)


def _folder(path: Path, split: str) -> Rows:
    """What ``datasets`` saved, or images with captions or a table beside them."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    for name in ("metadata.jsonl", "metadata.csv"):
        if (path / name).is_file():
            return Renamed(rows(path / name, "train"), _named)
    return Captioned(path)


class Renamed:
    """Rows of which each is changed a little."""

    def __init__(self, rows: Rows, change: Callable[[Row], Row]) -> None:
        self.rows, self.change = rows, change

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return ((number, self.change(row)) for number, row in self.rows)

    def again(self, at: int) -> Row:
        return self.change(self.rows.again(at))


def _named(row: Row) -> Row:
    """A row of the form that ``datasets`` gives folders of images: ``file_name`` is the image's."""
    try:
        told = json.loads(row) if isinstance(row, bytes) else dict(row)
    except (ValueError, RecursionError):  # whoever reads the row says what is wrong with it
        return row
    if not isinstance(told, dict):
        return row
    if "file_name" in told:
        told["image"] = told.pop("file_name")
        if "text" in told and not {"prompt", "question"} & told.keys():
            told |= {"prompt": CAPTION, "answer": told.pop("text")}
    return told


class Captioned:
    """A folder of images with a caption each: ``a.png`` and ``a.txt``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = (own.relative_to(path).as_posix() for own in path.rglob("*") if own.suffix.lower() in PICTURES)
        self.names = sorted((own for own in found if self._caption(own).is_file()), key=lambda own: own.split("/"))
        if not self.names:
            raise DataError(
                f"{shown(path)}: neither what datasets saved (save_to_disk) nor images with a caption each (a.png, "
                "a.txt) or a metadata.jsonl or metadata.csv with their file_name"
            )

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        return ((at + 1, self.again(at)) for at in range(len(self.names)))

    def again(self, at: int) -> Row:
        name = self.names[at]
        place = self._caption(name)
        try:
            with place.open("rb") as file:
                caption = file.read(LONGEST_CAPTION).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{place}: cannot be read: {error}") from error
        return {"id": name, "image": name, "prompt": CAPTION, "answer": caption}

    def _caption(self, name: str) -> Path:
        return (self.path / name).with_suffix(".txt")


def _saved(path: Path, split: str) -> Rows:
    datasets = _datasets(str(path))
    _stays_inside(path)
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises nearly anything
        raise DataError(f"{shown(path)}: cannot be read by datasets: {' '.join(str(error).split())[:200]}") from error
    return Saved(found if not isinstance(found, Mapping) else found[_split(str(path), found, split)])


def _stays_inside(path: Path) -> None:
    """``datasets`` reads whatever file a folder's own tables name."""
    try:
        index, state = path / "dataset_dict.json", path / "state.json"
        names = list(json.loads(index.read_bytes())["splits"]) if index.is_file() else []
        if state.is_file():
            names += [own["filename"] for own in json.loads(state.read_bytes())["_data_files"]]
        inside = all(isinstance(own, str) and own == Path(own).name for own in names)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{shown(path)}: is damaged: not what datasets saves (save_to_disk)") from error
    if not inside:
        raise DataError(f"{shown(path)}: names parts that lie outside it")
    for own in names if index.is_file() else ():
        _stays_inside(path / own)


def _hub(source: str, split: str) -> Rows:
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
    return Saved(found)


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
