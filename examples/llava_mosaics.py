"""Questions about mosaics as LLaVA writes its data: ``train.json``, ``heldout.json`` and their images.

python examples/llava_mosaics.py --rows 200 --heldout 40 --output data
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from vismem_core.files.samples import Sample
from vismem_plugins.mosaic import mosaic


def write(samples: Sequence[Sample], split: str, folder: Path) -> None:
    """One file of rows; their images are in a folder beside it."""
    rows = []
    for number, own in enumerate(samples):
        name = f"images/{split}-{number}.png"
        own.load_images()[0].save(folder / name)
        turns = [{"from": "human", "value": f"<image>\n{own.prompt}"}, {"from": "gpt", "value": own.answer}]
        rows.append({"id": f"{split}-{number}", "image": name, "type": own.type, "conversations": turns})
    (folder / f"{split}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"{folder / split}.json: {len(rows)} questions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="questions to train on")
    parser.add_argument("--heldout", type=int, default=40, help="questions to ask afterwards, over other photographs")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    told = parser.parse_args()
    (told.output / "images").mkdir(parents=True, exist_ok=True)
    write(mosaic("train")[: told.rows], "train", told.output)
    write(mosaic("heldout")[: told.heldout], "heldout", told.output)


if __name__ == "__main__":
    main()
