"""What cells show: photographs of clothes, or handwritten digits, which are another image domain.

A domain has two sheets of pictures, ``train`` and ``heldout``, that hold one class after the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path(__file__).parent
CELL = 28  # pixels along a side of a cell
COLUMNS = 40  # pictures in a row of a sheet


@dataclass(frozen=True, eq=False)
class Domain:
    """Attributes:
    kinds: what each class is a kind of, where it is one.
    per_class: pictures of a class in each split.
    pixels: along a side of a picture in the sheets; smaller ones are enlarged.
    mirrored: whether a picture's mirror image shows the same.
    """

    name: str
    classes: tuple[str, ...]
    per_class: Mapping[str, int]
    pixels: int = CELL
    mirrored: bool = True
    kinds: Mapping[str, str] = field(default_factory=dict)

    def sheet(self, split: str) -> Path:
        """The file of a split."""
        return FOLDER / (f"{split}.png" if self is CLOTHES else f"{self.name}_{split}.png")


KINDS: Mapping[str, str] = MappingProxyType(
    {
        "top": "clothing",
        "trousers": "clothing",
        "dress": "clothing",
        "coat": "clothing",
        "sandal": "footwear",
        "sneaker": "footwear",
        "boot": "footwear",
        "bag": "accessory",
    }
)
CLOTHES = Domain("clothes", tuple(KINDS), {"train": 500, "heldout": 80}, kinds=KINDS)
DIGITS = Domain("digits", tuple("0123456789"), {"train": 138, "heldout": 36}, pixels=8, mirrored=False)
DOMAINS: Mapping[str, Domain] = MappingProxyType({own.name: own for own in (CLOTHES, DIGITS)})


@cache
def photos(split: str, domain: Domain = CLOTHES) -> NDArray[np.uint8]:
    """The pictures of a split, (classes, pictures of a class, 28, 28); none is in both splits."""
    side, shape = domain.pixels, (len(domain.classes), domain.per_class[split])
    with Image.open(domain.sheet(split)) as image:
        sheet = np.asarray(image)
    cells = sheet.reshape(-1, side, COLUMNS, side).swapaxes(1, 2).reshape(-1, side, side)[: shape[0] * shape[1]]
    if side < CELL:
        cells = np.stack([_enlarged(own) for own in cells])
    cells = np.ascontiguousarray(cells).reshape(*shape, CELL, CELL)
    cells.flags.writeable = False
    return cells


def _enlarged(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As many times as large as fits, in the middle of a cell."""
    side = CELL // len(picture) * len(picture)
    larger = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
    return np.pad(larger, (CELL - side) // 2)
