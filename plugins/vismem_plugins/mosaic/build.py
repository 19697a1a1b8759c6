"""Makes the sprite sheets of `mosaic` from Fashion-MNIST: `python -m vismem_plugins.mosaic.build [SOURCE]`.

SOURCE is a folder with the four published files (Debian: package `dataset-fashion-mnist`). Photos of the
training file go to the train sheet, photos of the test file to the held-out one. The same seed gives the same
bytes.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import CELL, CLASSES, COLUMNS, FOLDER, PER_CLASS

SOURCE = Path("/usr/share/datasets/fashion-mnist")
FILES = {"train": "train", "heldout": "t10k"}
# The published label of each class. Left out, since even people take them for a top or a coat: 2 (pullover)
# and 6 (shirt).
LABELS = {"top": 0, "trousers": 1, "dress": 3, "coat": 4, "sandal": 5, "sneaker": 7, "boot": 9, "bag": 8}


def read_idx(path: Path) -> NDArray[np.uint8]:
    """One gzipped IDX file of bytes (https://yann.lecun.org/exdb/mnist/) as an array of its own shape."""
    data = gzip.decompress(path.read_bytes())
    dims = data[3]
    shape = np.frombuffer(data, ">u4", count=dims, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def build(source: Path = SOURCE, seed: int = 0) -> None:
    """Writes `train.png`, `heldout.png` and `photos.json` (class -> indices in the published file)."""
    rng = np.random.default_rng(seed)
    chosen: dict[str, dict[str, list[int]]] = {}
    for split, file in FILES.items():
        images = read_idx(source / f"{file}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{file}-labels-idx1-ubyte.gz")
        chosen[split] = {
            name: sorted(rng.choice(np.flatnonzero(labels == LABELS[name]), PER_CLASS[split], replace=False).tolist())
            for name in CLASSES
        }
        photos = images[np.concatenate(list(chosen[split].values()))]  # (N, 28, 28)
        sheet = photos.reshape(-1, COLUMNS, CELL, CELL).swapaxes(1, 2).reshape(-1, COLUMNS * CELL)
        Image.fromarray(sheet).save(FOLDER / f"{split}.png", optimize=True)
    (FOLDER / "photos.json").write_text(json.dumps(chosen) + "\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE)
