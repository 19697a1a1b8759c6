"""Makes the sheets of `mosaic`: `python -m vismem_plugins.mosaic.build clothes|digits SOURCE`.

For clothes SOURCE is a folder with the four published files of Fashion-MNIST (Debian: package
`dataset-fashion-mnist`). Photos of the training file go to the train sheet, photos of the test file to the held-out
one. For digits it is `digits.csv.gz`, as scikit-learn's wheel has it (`sklearn/datasets/data`): the last ones of each
class are held out. The same seed gives the same bytes.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .domains import CLOTHES, COLUMNS, DIGITS, FOLDER, Domain

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


def save(domain: Domain, split: str, pictures: NDArray[np.uint8]) -> None:
    """Writes the sheet of pictures (N, pixels, pixels), one class after the other."""
    side = domain.pixels
    blank = np.zeros((-len(pictures) % COLUMNS, side, side), np.uint8)
    filled = np.concatenate([pictures, blank]).reshape(-1, COLUMNS, side, side)
    Image.fromarray(filled.swapaxes(1, 2).reshape(-1, COLUMNS * side)).save(domain.sheet(split), optimize=True)


def clothes(source: Path, seed: int = 0) -> None:
    """Writes `train.png`, `heldout.png` and `photos.json` (class -> indices in the published file)."""
    rng = np.random.default_rng(seed)
    chosen: dict[str, dict[str, list[int]]] = {}
    for split, file in FILES.items():
        images = read_idx(source / f"{file}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{file}-labels-idx1-ubyte.gz")
        chosen[split] = {
            name: sorted(
                rng.choice(np.flatnonzero(labels == LABELS[name]), CLOTHES.per_class[split], replace=False).tolist()
            )
            for name in CLOTHES.classes
        }
        save(CLOTHES, split, images[np.concatenate(list(chosen[split].values()))])
    (FOLDER / "photos.json").write_text(json.dumps(chosen) + "\n")


def digits(source: Path) -> None:
    """Writes `digits_train.png` and `digits_heldout.png`."""
    table = np.loadtxt(gzip.decompress(source.read_bytes()).decode("ascii").splitlines(), np.uint8, delimiter=",")
    images, labels = table[:, :-1].reshape(-1, DIGITS.pixels, DIGITS.pixels), table[:, -1]
    images = (images.astype(np.float32) * 255 / 16).round().astype(np.uint8)  # of 17 levels
    places = [np.flatnonzero(labels == int(name)) for name in DIGITS.classes]
    train, heldout = (DIGITS.per_class[split] for split in ("train", "heldout"))
    save(DIGITS, "train", images[np.concatenate([own[:train] for own in places])])
    save(DIGITS, "heldout", images[np.concatenate([own[-heldout:] for own in places])])


if __name__ == "__main__":
    {"clothes": clothes, "digits": digits}[sys.argv[1]](Path(sys.argv[2]))
