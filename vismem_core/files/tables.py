"""Rows in tables of Arrow, which lie on disk and are mapped into memory: Parquet, and what ``datasets`` holds."""

from __future__ import annotations

import shutil
import tempfile
from array import array
from bisect import bisect
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vismem_core.errors import DataError

from .texts import PACKED, UNPACKED, Row

EXTRA = "pip install 'vismem[data]'"
TOGETHER = 256
"""Rows that are unpacked together; they may hold images."""


class Saved:
    """The rows of a data set of ``datasets``, images as they are stored, not decoded."""

    def __init__(self, data: Any) -> None:
        for name, feature in data.features.items():
            if (plain := _stored(feature)) != feature:
                data = data.cast_column(name, plain)
        self.data = data.with_format("arrow")

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        number = 0
        for table in self.data.iter(batch_size=TOGETHER):
            for row in table.to_pylist():
                number += 1
                yield number, row

    def again(self, at: int) -> Row:
        (row,) = self.data[at : at + 1].to_pylist()
        return row  # type: ignore[no-any-return]


def _stored(feature: Any) -> Any:
    import datasets

    if isinstance(feature, (datasets.Image, getattr(datasets, "Video", datasets.Image))):
        return type(feature)(decode=False)
    inner = getattr(feature, "feature", None)
    return type(feature)(_stored(inner)) if inner is not None else feature


class Parquet:
    """The rows of a Parquet file, which are found again in a temporary copy that is not packed."""

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import ArrowException, ipc, memory_map, parquet
        except ImportError as error:
            raise DataError(f"{path}: reading Parquet takes pyarrow: {EXTRA}") from error
        self.path, self.starts = path, array("q")
        self._parquet, self._ipc, self._map, self._errors = parquet, ipc, memory_map, (ArrowException, OSError)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        place = Path(tempfile.mkdtemp(prefix="vismem-")) / "rows.arrow"
        try:
            yield from self._copied(place)
        except self._errors as error:
            told = " ".join(str(error).split())[:200]
            raise DataError(f"{self.path}: cannot be read as Parquet: {told}") from error
        finally:  # also where nobody wanted the rest
            with suppress(*self._errors):
                self._copy = self._ipc.open_file(self._map(str(place)))
            shutil.rmtree(place.parent, ignore_errors=True)  # what is mapped stays

    def _copied(self, place: Path) -> Iterator[tuple[int, Row]]:
        number, most = 0, max(UNPACKED, PACKED * self.path.stat().st_size)
        with self._parquet.ParquetFile(self.path) as file:
            plain = _plain(file.schema_arrow)
            with self._ipc.new_file(str(place), plain) as copy:
                for batch in file.iter_batches(batch_size=TOGETHER):
                    self.starts.append(number)
                    copy.write_batch(batch.cast(plain))
                    if place.stat().st_size > most:
                        raise DataError(f"{self.path}: unpacks to more than {PACKED} times its size")
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row

    def again(self, at: int) -> Row:
        own = bisect(self.starts, at) - 1
        (row,) = self._copy.get_batch(own).slice(at - self.starts[own], 1).to_pylist()
        return row  # type: ignore[no-any-return]


def _plain(schema: Any) -> Any:
    """The same columns, none of them as numbers into a dictionary, which may differ between parts of a file."""
    for at, own in enumerate(schema):
        if hasattr(own.type, "value_type") and hasattr(own.type, "index_type"):
            schema = schema.set(at, own.with_type(own.type.value_type))
    return schema
