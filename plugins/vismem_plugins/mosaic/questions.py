"""The questions of `mosaic`: functions from a grid of class names to a prompt and its answer.

Rows and columns count from 1, row 1 on top. A question that does not fit a grid (nothing is left of column 1)
gives None, and the caller draws another grid.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType

from .domains import CLOTHES, KINDS, Domain

_OPPOSITES = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
    "most": "least",
    "least": "most",
}


@dataclass(frozen=True)
class Grid:
    """The class names of a mosaic of `size` x `size` cells, row by row."""

    size: int
    labels: tuple[str, ...]
    domain: Domain = CLOTHES

    def at(self, row: int, column: int) -> str:
        """The class at `row`, `column`, both in 1..size."""
        return self.labels[(row - 1) * self.size + column - 1]

    def holds(self, row: int, column: int) -> bool:
        """Whether there is such a cell."""
        return 1 <= row <= self.size and 1 <= column <= self.size


Question = Callable[[Grid, Random], tuple[str, str] | None]


def draw_grid(size: int, rng: Random, domain: Domain = CLOTHES) -> Grid:
    """Labels from a palette of two to eight classes, so that repeats and single classes are both common."""
    palette = rng.sample(domain.classes, rng.choice((2, 3, 4, 5, 6, 8)))
    return Grid(size, tuple(rng.choices(palette, k=size * size)), domain)


def _cell(grid: Grid, rng: Random) -> tuple[int, int]:
    return rng.randint(1, grid.size), rng.randint(1, grid.size)


def _name(row: int, column: int) -> str:
    return f"row {row} column {column}"


def _read(grid: Grid, rng: Random) -> tuple[str, str]:
    cell = _cell(grid, rng)
    return f"what is at {_name(*cell)} ?", grid.at(*cell)


def _count(grid: Grid, rng: Random) -> tuple[str, str]:
    counts = {name: grid.labels.count(name) for name in grid.domain.classes}
    count = rng.choice(sorted(set(counts.values())))  # every number that occurs is equally likely
    name = rng.choice([name for name in counts if counts[name] == count])
    return f"count the {name} cells .", str(count)


def _where(grid: Grid, rng: Random) -> tuple[str, str] | None:
    single = [name for name in grid.domain.classes if grid.labels.count(name) == 1]
    if not single:
        return None
    name = rng.choice(single)
    row, column = divmod(grid.labels.index(name), grid.size)
    return f"where is the {name} ?", _name(row + 1, column + 1)


def _same(grid: Grid, rng: Random) -> tuple[str, str] | None:
    same = rng.random() < 0.5  # first, so that both answers are equally likely
    cells = [(row, column) for row in range(1, grid.size + 1) for column in range(1, grid.size + 1)]
    pairs = [(a, b) for a in cells for b in cells if a != b and (grid.at(*a) == grid.at(*b)) is same]
    if not pairs:
        return None
    one, two = rng.choice(pairs)
    return f"is {_name(*one)} the same as {_name(*two)} ?", "yes" if same else "no"


def _list(grid: Grid, rng: Random) -> tuple[str, str]:
    rows = (range(row, row + grid.size) for row in range(0, grid.size**2, grid.size))
    return "list the cells .", " . ".join(" , ".join(grid.labels[i] for i in row) for row in rows) + " ."


def _fact(grid: Grid, rng: Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        name = rng.choice(tuple(KINDS))
        return f"what kind is a {name} ?", KINDS[name]
    word = rng.choice(list(_OPPOSITES))
    return f"what is the opposite of {word} ?", _OPPOSITES[word]


def _beside(relation: str, down: int, right: int) -> Question:
    """What stands `down` rows below and `right` columns right of a cell; never the cell's own class."""

    def question(grid: Grid, rng: Random) -> tuple[str, str] | None:
        row, column = _cell(grid, rng)
        if not grid.holds(row + down, column + right):
            return None
        answer = grid.at(row + down, column + right)
        return None if answer == grid.at(row, column) else (f"what is {relation} {_name(row, column)} ?", answer)

    return question


def _most(grid: Grid, rng: Random) -> tuple[str, str] | None:
    (first, count), *rest = Counter(grid.labels).most_common(2)
    return None if rest and rest[0][1] == count else ("what is most frequent ?", first)


def _listed(question: Question) -> Question:
    """Another question, answered at the end of a list of all cells: long answers that look at the image again."""

    def asked(grid: Grid, rng: Random) -> tuple[str, str] | None:
        if (found := question(grid, rng)) is None:
            return None
        prompt, answer = found
        return f"list the cells , and answer : {prompt}", f"{_list(grid, rng)[1]} answer : {answer}"

    return asked


_SHORT: Mapping[str, Question] = MappingProxyType(
    {
        "read": _read,
        "count": _count,
        "where": _where,
        "left": _beside("left of", 0, -1),
        "above": _beside("above", -1, 0),
        "same": _same,
        "list": _list,
        "fact": _fact,
        "right": _beside("right of", 0, 1),
        "below": _beside("below", 1, 0),
        "diagonal": _beside("diagonal to", 1, 1),
        "most": _most,
    }
)
LONG: Mapping[str, str] = MappingProxyType({f"list_{name}": name for name in ("right", "below", "diagonal", "most")})
"""Types with long answers, and the type that is asked at their end."""
QUESTIONS: Mapping[str, Question] = MappingProxyType(
    {**_SHORT, **{name: _listed(_SHORT[end]) for name, end in LONG.items()}}
)
