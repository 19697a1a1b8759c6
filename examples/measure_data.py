"""What it costs to open many rows and to read them, in each format: seconds, memory over the imports, and a row's time.

python examples/measure_data.py --rows 1000000 --json
python examples/measure_data.py --wait --json
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMATS = ("jsonl", "jsonl.gz", "json", "csv", "parquet", "datasets")
READ = 10_000
"""Rows that are read at random once the data is open."""


def rows(count: int, pictures: int) -> Iterator[dict[str, str]]:
    """Questions such as people ask, of some 150 bytes each."""
    for at in range(count):
        yield {
            "id": f"question-{at:08d}",
            "image": f"images/{at % pictures}.jpg",
            "prompt": f"<image> how many cups are on the table number {at} ?",
            "answer": f"there are {at % 13}",
            "type": ("count", "colour", "place", "kind")[at % 4],
        }


def write(folder: Path, name: str, *size: int) -> Path:
    """The rows as a file, or a folder, of one format."""
    path = folder / f"rows.{name}"
    if name in ("jsonl", "jsonl.gz"):
        with (gzip.open if name.endswith("gz") else open)(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows(*size))
    elif name == "json":
        with path.open("w") as file:
            file.write("[" + ",\n".join(map(json.dumps, rows(*size))) + "]")
    elif name == "csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(next(rows(1, 1))))
            table.writeheader()
            table.writerows(rows(*size))
    else:
        import datasets

        datasets.disable_progress_bars()
        own = datasets.Dataset.from_generator(
            rows, gen_kwargs={"count": size[0], "pictures": size[1]}, cache_dir=str(folder / "cache")
        )
        own.to_parquet(str(path)) if name == "parquet" else own.save_to_disk(str(folder / name))
        if name == "datasets":
            path = folder / name
            (path / "images").symlink_to(folder / "images")
    return path


def opened(path: str) -> dict[str, Any]:
    """Open one source, read rows of it at random, and say what both cost."""
    import numpy  # noqa: F401 - what is imported is not counted

    from vismem_core.files.samples import read

    if path.endswith(("parquet", "datasets")):
        import datasets  # noqa: F401
        import pyarrow.parquet  # noqa: F401
    before = _peak(anew=True)
    began, worked = time.perf_counter(), time.process_time()
    data = read(path, need_answer=True)
    seconds, worked, peak = time.perf_counter() - began, time.process_time() - worked, _peak()
    places = [random.Random(0).randrange(len(data)) for _ in range(READ)]
    began = time.perf_counter()
    assert all(data[at].id == f"question-{at:08d}" for at in places)
    each = (time.perf_counter() - began) / READ
    return {
        "rows": len(data),
        "seconds": round(seconds, 1),
        "processor_seconds": round(worked, 1),
        "megabytes": round((peak - before) / 2**20),
        "megabytes_after_reading": round((_peak() - before) / 2**20),
        "microseconds_a_row": round(each * 1e6),
    }


def _peak(anew: bool = False) -> int:
    """The most memory that this process had, in bytes; on Linux from now on, if that is asked for."""
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if anew:
        forget.write_text("5")
    return 1024 * int(next(own for own in status.read_text().splitlines() if own.startswith("VmHWM")).split()[1])


def measure(count: int, pictures: int, formats: list[str]) -> dict[str, Any]:
    """Every format in a process of its own."""
    from PIL import Image

    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images").mkdir()
        for at in range(pictures):
            Image.new("RGB", (64, 48), (at % 256, at // 4 % 256, 90)).save(folder / "images" / f"{at}.jpg")
        for name in formats:
            path = write(folder, name, count, pictures)
            told = subprocess.run([sys.executable, __file__, "--open", str(path)], check=True, stdout=subprocess.PIPE)
            found[name] = json.loads(told.stdout)
            print(f"{name}: {found[name]}", file=sys.stderr)
    return found


def waiting(steps: int, batch: int, seconds: float) -> dict[str, Any]:
    """The share of training's time in which it waits for data, where a device takes so many seconds for a step.

    The device is stood in for by sleep; rows, photos of 1280 x 960 and the embedded Qwen2.5-VL's processor are real.
    """
    import numpy as np
    from PIL import Image

    from vismem_core.base.families import find_backbone
    from vismem_core.base.loading import load_base
    from vismem_core.files.samples import read
    from vismem_core.training.draws import AHEAD, Draws
    from vismem_core.training.processes import Processes

    model, processor, _ = load_base("qwen2_5_vl")
    backbone, noise = find_backbone(model)(model, processor), np.random.default_rng(0)
    told: dict[str, Any] = {"steps": steps, "batch": batch, "step_seconds": seconds}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.jsonl"
        for at in range(4 * batch):
            small = Image.fromarray(noise.integers(0, 256, (120, 160, 3), dtype=np.uint8))
            small.resize((1280, 960)).save(Path(place) / f"{at}.jpg")
        own = ({"id": str(at), "image": f"{at}.jpg", "prompt": "what ?", "answer": "a bag"} for at in range(4 * batch))
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
        data = read(path, need_answer=True)
        for name, beside in (("waits_without_threads", False), ("waits", True)):
            draws = Draws(backbone, data, batch, 0, Processes(), None)
            draws(batch)  # the first batch is always waited for
            draws.waited, began, worked = 0.0, time.perf_counter(), time.process_time()
            for _ in range(steps):
                draws.beside = beside
                if beside:
                    draws.ahead(batch)
                time.sleep(seconds)
                draws(batch)
            told[name] = round(draws.waited / (time.perf_counter() - began), 4)
            draws.close()
            told["processor_seconds_a_batch"] = round((time.process_time() - worked) / (steps + AHEAD * beside), 2)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=1000, help="images that the rows are about")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--wait", action="store_true", help="measure how long training waits for data instead")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--step-seconds", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print(json.dumps(opened(args.open)))
        return
    if args.wait:
        found = waiting(args.steps, args.batch, args.step_seconds)
    else:
        found = measure(args.rows, args.pictures, args.formats.split(","))
    if args.json:
        print(json.dumps(found))
    elif args.wait:
        print(*(f"{name}: {value}" for name, value in found.items()), sep="\n")


if __name__ == "__main__":
    main()
