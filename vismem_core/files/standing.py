"""Which rows of a source are good, found by looking at all of them once, and where they stand."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from vismem_core.errors import DataError, cut

from .reading import Read, Reader
from .sources import Rows


class Bad(NamedTuple):
    """A bad row: which one it is, from 0, its line, and what is wrong with it."""

    at: int
    line: int
    why: str


class Standing:
    """The good rows of a source. Of each is kept which one it is, its line, its type and a hash of its id."""

    def __init__(self, rows: Rows, reader: Reader) -> None:
        self.rows, self.reader = rows, reader
        self.places, self.lines, self.ids, self.kinds = array("q"), array("q"), array("q"), array("l")
        self.names: list[str | None] = []

    def look(self, stop: bool) -> list[Bad]:
        """Look at all rows, and say which are bad, in order.

        Args:
            stop: look no further than the first bad one.
        """
        bad: list[Bad] = []
        numbers: dict[str | None, int] = {}
        rows = iter(self.rows)
        for at, (line, told) in enumerate(rows):
            try:
                row = self.reader.first(line, told)
            except DataError as error:
                bad.append(Bad(at, line, str(error)))
                if stop:
                    break
                continue
            self.places.append(at)
            self.lines.append(line)
            self.ids.append(hash(row.id))
            self.kinds.append(numbers.setdefault(row.type, len(numbers)))
        del rows  # which ends it, and lets what was read so far be read again
        self.names = list(numbers)
        return sorted([*bad, *self._taken()])

    def _taken(self) -> list[Bad]:
        """Leave out rows whose id an earlier one has."""
        taken: dict[int, str] = {}
        for own in _alike(self.ids):
            first: dict[str, int] = {}
            for index in own:
                if (name := self.read(index).id) in first:
                    taken[index] = f"the id {cut(name)!r} is taken by line {first[name]}; ids must differ"
                else:  # two ids may have one hash
                    first[name] = self.lines[index]
        bad = [Bad(self.places[index], self.lines[index], why) for index, why in taken.items()]
        for name in ("places", "lines", "ids", "kinds") if taken else ():
            column = getattr(self, name)
            kept = (value for index, value in enumerate(column) if index not in taken)
            setattr(self, name, array(column.typecode, kept))
        return bad

    def read(self, index: int) -> Read:
        """One of the good rows.

        Raises:
            DataError: it is not what it was.
        """
        return self.reader.again(self.lines[index], self.rows.again(self.places[index]))

    def type_of(self, index: int) -> str | None:
        """The type of a row, which need not be read for it."""
        return self.names[self.kinds[index]]

    def __len__(self) -> int:
        return len(self.places)


def _alike(hashes: array[int]) -> Iterator[list[int]]:
    """Indices that have the same hash, where several do; in order."""
    import numpy as np  # commands without data need none

    if len(hashes) < 2:
        return
    own = np.asarray(hashes)
    order = np.argsort(own, kind="stable")
    same = (own[order][1:] == own[order][:-1]).astype(np.int8)
    edges = np.diff(same, prepend=0, append=0)
    for start, end in zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True):
        yield order[start : end + 1].tolist()
