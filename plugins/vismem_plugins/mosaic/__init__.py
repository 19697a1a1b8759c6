"""`mosaic`: questions about grids of real photographs, shipped with the package.

A mosaic has G x G cells of 28 x 28 pixels, each one photo of Fashion-MNIST (Xiao, Rasul and Vollgraf 2017,
https://github.com/zalandoresearch/fashion-mnist; the licence is in NOTICE), so that with patches of 14 and a
merge of 2 one cell is one language token. Eight of its ten classes are kept, those that people tell apart.
Another domain (`domains`) are handwritten digits (Alpaydin and Kaynak 1998, UCI Machine Learning Repository).
The types in `SEEN` are what the base model `mini` was trained on; those in `NEW` were kept from it, for
memory to learn.

    >>> sample = mosaic("heldout", types=["right"])[17]
    >>> sample.id, sample.prompt, sample.answer
"""

from collections.abc import Sequence
from random import Random
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vismem_core.files.samples import Sample

from .domains import CELL, CLOTHES, DOMAINS, KINDS, Domain, photos
from .questions import LONG, QUESTIONS, Grid, draw_grid

__all__ = [
    "CELL",
    "CLASSES",
    "DOMAINS",
    "GROUPS",
    "KINDS",
    "LONG",
    "NEW",
    "QUESTIONS",
    "SEEN",
    "Domain",
    "Grid",
    "Mosaic",
    "draw_grid",
    "mosaic",
    "photos",
]

CLASSES = CLOTHES.classes
SEEN: tuple[str, ...] = ("read", "count", "where", "left", "above", "same", "list", "fact")
NEW: tuple[str, ...] = ("right", "below", "diagonal", "most")
GROUPS = {"seen": SEEN, "new": NEW, "long": tuple(LONG)}
MIX = {"train": SEEN + 4 * NEW, "heldout": SEEN + NEW}
"""Types by default. What the base can answer already teaches memory to say nothing: latents that are the same for all
images. With as many questions of each type some seeds stayed there for hundreds of steps."""

LENGTH = {"train": 100_000, "heldout": 1_000}  # samples of a type
SIZES = (2, 3)


def draw_photos(grid: Grid, split: str, rng: Random) -> NDArray[np.uint8]:
    """A picture of each cell's class, (G * G, 28, 28)."""
    classes, count = grid.domain.classes, grid.domain.per_class[split]
    return photos(split, grid.domain)[
        [classes.index(name) for name in grid.labels], [rng.randrange(count) for _ in grid.labels]
    ]


def assemble(cells: NDArray[np.uint8], size: int) -> Image.Image:
    """The cells (G * G, 28, 28), row by row, as one RGB picture of G * 28 pixels a side."""
    picture = cells.reshape(size, size, CELL, CELL).swapaxes(1, 2).reshape(size * CELL, size * CELL)
    return Image.fromarray(np.repeat(picture[..., None], 3, axis=-1))


class Mosaic(Sequence[Sample]):
    """Samples made when asked for: the i-th is number `i // len(types)` of type `types[i % len(types)]`.

    A sample depends on the split, the seed, the size, the domain, its type and its number alone.
    """

    groups = GROUPS

    def __init__(
        self,
        split: str,
        size: int | None,
        types: Sequence[str],
        seed: int,
        numbers: range,
        late: bool = False,
        domain: Domain = CLOTHES,
    ) -> None:
        self.split, self.size, self.types, self.seed, self._numbers = split, size, tuple(types), seed, numbers
        self.late, self.domain = late, domain

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Mosaic": ...
    def __getitem__(self, index: int | slice) -> "Sample | Mosaic":
        if isinstance(index, slice):
            numbers = self._numbers[index]
            return Mosaic(self.split, self.size, self.types, self.seed, numbers, self.late, self.domain)
        turn, at = divmod(self._numbers[index], len(self.types))
        type_ = self.types[at]
        return self._make(type_, turn * self.types.count(type_) + self.types[:at].count(type_))

    def type_of(self, index: int) -> str:
        """The type of a sample, which is not made for it."""
        return self.types[self._numbers[index] % len(self.types)]

    def grid(self, type_: str, number: int) -> Grid:
        """The labels under a sample's picture."""
        return self._draw(type_, number)[0]

    def content(self, sample: Sample) -> dict[str, str]:
        """What is in a sample's picture, for probes: the class of each cell, and how many cells show each."""
        _, type_, number = sample.id.split("/")
        grid = self.grid(type_, int(number))
        cells = {f"row {at // grid.size + 1} column {at % grid.size + 1}": own for at, own in enumerate(grid.labels)}
        return {**cells, **{f"number of {name}": str(grid.labels.count(name)) for name in grid.domain.classes}}

    def _draw(self, type_: str, number: int) -> tuple[Grid, str, str, Random]:
        of = "" if self.domain is CLOTHES else f"/{self.domain.name}"
        rng = Random(f"{self.seed}/{self.split}/{self.size}/{type_}/{number}{of}")
        size = self.size or rng.choice(SIZES)
        while (asked := QUESTIONS[type_](grid := draw_grid(size, rng, self.domain), rng)) is None:
            pass
        return grid, *asked, rng

    def _make(self, type_: str, number: int) -> Sample:
        grid, prompt, answer, rng = self._draw(type_, number)
        image = assemble(draw_photos(grid, self.split, rng), grid.size)
        return Sample(f"{self.split}/{type_}/{number}", (image,), prompt, answer, type_, self.late)


def mosaic(
    split: str = "train",
    *,
    size: int | None = None,
    types: Sequence[str] | None = None,
    seed: int = 0,
    late: bool = False,
    domain: str = "clothes",
) -> Mosaic:
    """Questions about mosaics, answered from the labels of the photos.

    Args:
        split: "train" or "heldout"; they share no photo.
        size: cells along a side; None mixes 2 x 2 and 3 x 3.
        types: the question types, taken in turn; one named twice is asked twice as often. By default `MIX`: all of
            them, and to train on mostly the new ones.
        seed: another seed gives other mosaics of the same photos.
        late: memory comes before the question.
        domain: what cells show, "clothes" or "digits".

    Raises:
        ValueError: an unknown split, type or domain, or a size in which a type has no question.
    """
    if split not in LENGTH:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(LENGTH)}")
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; there are {', '.join(DOMAINS)}")
    types = tuple(types) if types is not None else MIX[split]
    if not types or (unknown := [name for name in types if name not in QUESTIONS]):
        raise ValueError(f"unknown question types {unknown if types else types}; there are {', '.join(QUESTIONS)}")
    if size is not None and not 2 <= size <= 9:
        raise ValueError(f"a mosaic has 2 to 9 cells along a side, not {size}")
    return Mosaic(split, size, types, seed, range(LENGTH[split] * len(types)), late, DOMAINS[domain])
