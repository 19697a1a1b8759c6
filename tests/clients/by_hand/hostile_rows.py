"""Rows, images and archives as somebody who means harm would write them: each is told in one line or understood, soon,
and no file beside the data is read.

    python tests/clients/by_hand/hostile_rows.py --cases 5000
"""

from __future__ import annotations

import argparse
import base64
import gzip
import io
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from vismem_core.errors import DataError
from vismem_core.files import tables, texts, window
from vismem_core.files.samples import read

SECRET = "what-nobody-may-read"
COLOUR = (201, 17, 93)
"""Of an image that lies outside."""
SECONDS = 20
GOOD = {"id": "good", "image": "good.png", "prompt": "what is it ?", "answer": "good"}


class Hang(BaseException):
    """A case took too long."""


def png(width: int = 4, height: int = 4, colour: tuple[int, int, int] = (1, 2, 3), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG that says that it is large, of few bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def paths(outside: Path) -> list[Any]:
    deep = "../" * 30
    own = [f"../outside/{name}" for name in ("secret.png", "secret.txt")]
    own += [f"{outside}/secret.png", f"{outside}/secret.txt", f"/{outside}/secret.png", f"file://{outside}/secret.png"]
    own += [f"{deep}{outside}/secret.png", "sub/../../outside/secret.png", "./.././outside/secret.png"]
    own += [
        f"{outside}/secret.png\0good.png",
        f"good.png\0/{outside}/secret.png",
        "good.png\0",
        "~/secret.png",
        "~root/x",
    ]
    own += [
        "..\\outside\\secret.png",
        "%2e%2e/outside/secret.png",
        "/etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
    ]
    own += [
        "/proc/self/environ",
        ".",
        "..",
        "",
        "/",
        "a" * 5000,
        "a/" * 3000,
        "$HOME/x",
        "`id`",
        "|id",
        "CON",
        "good.png/",
    ]
    own += [
        "http://127.0.0.1/x.png",
        "https://169.254.169.254/",
        "HTTP://localhost/",
        "ftp://x/y",
        "gopher://x",
        "//x/y.png",
    ]
    return own


def odd(random: Random, outside: Path) -> Any:
    """Something that does not belong where it is put."""
    nested: Any = "x"
    for _ in range(random.choice([5, 200])):
        nested = [nested] if random.random() < 0.5 else {"a": nested}
    return random.choice(
        [
            *paths(outside)[:: random.randint(1, 5)],
            nested,
            *[
                None,
                True,
                False,
                0,
                -1,
                10**400,
                1e308,
                float("nan"),
                float("inf"),
                "",
                " ",
                "\0",
                "\ud800",
                "\u202e",
                "x" * 10**5,
            ],
            *[
                [],
                {},
                [[]],
                [{}],
                [None],
                [1, 2],
                {"bytes": 3},
                {"path": f"{outside}/secret.png"},
                {"path": None, "bytes": None},
            ],
            *[
                {"bytes": "x"},
                {"url": "http://127.0.0.1/"},
                [{"path": "../outside/secret.png"}],
                "<image>" * 50,
                "<image>",
            ],
            *[
                url(png()),
                url(bomb(60_000)),
                url(png())[:-40],
                "data:,x",
                "data:image/png;base64,",
                "data:" + "," * 300,
            ],
            base64.b64encode(bomb(50_000)).decode(),
            [{"role": "user", "content": [{"type": "image", "image": f"{outside}/secret.png"}]}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
            [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}],
            [{"role": "user", "content": {"type": "text"}}, 3, None],
        ]
    )


KEYS = (
    "id image images prompt answer answers type messages conversations question turns references file_name completion"
)


def row(random: Random, outside: Path) -> dict[str, Any]:
    own: dict[str, Any] = dict(GOOD, id=str(random.random()))
    for _ in range(random.randint(1, 3)):
        own[random.choice(KEYS.split())] = odd(random, outside)
    if random.random() < 0.3:
        own.pop(random.choice(list(own)))
    return own


def mangled(random: Random, data: bytes) -> bytes:
    """Some bytes other than they were, cut off, put in twice."""
    own = bytearray(data)
    for _ in range(random.randint(1, 6)):
        at = random.randrange(len(own)) if own else 0
        match random.randrange(5):
            case 0:
                own[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                del own[at : at + random.randint(1, 30)]
            case 2:
                own[at:at] = own[: random.randint(1, 200)]
            case 3:
                own[at:at] = random.randbytes(random.randint(1, 20))
            case 4:
                del own[max(1, at) :]
    return bytes(own)


def lines(found: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(own) + "\n" for own in found).encode()


def parquet(found: list[dict[str, Any]]) -> bytes:
    from pyarrow import Table
    from pyarrow import parquet as files

    buffer = io.BytesIO()
    files.write_table(Table.from_pylist(found), buffer)
    return buffer.getvalue()


Case = Callable[[Random, Path, Path], Path]


def rows_case(random: Random, folder: Path, outside: Path) -> Path:
    found = [GOOD, *(row(random, outside) for _ in range(4))]
    kind = random.choice(["jsonl", "json", "csv", "jsonl.gz"])
    path = folder / f"rows.{kind}"
    if kind == "csv":
        cells = [",".join(f'"{own.get(key, "")!s}"'.replace("\n", " ") for key in GOOD) for own in found]
        path.write_bytes("\n".join([",".join(GOOD), *cells]).encode(errors="replace"))
    else:
        data = lines(found) if kind != "json" else json.dumps(found).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    return path


def bytes_case(random: Random, folder: Path, outside: Path) -> Path:
    found = [GOOD | {"id": str(at)} for at in range(5)]
    kind = random.choice(["jsonl", "json", "csv", "tsv", "jsonl.gz", "parquet"])
    data = {"json": json.dumps(found).encode(), "parquet": b""}.get(kind, lines(found))
    if kind in ("csv", "tsv"):
        data = b"id,image,prompt,answer\n" + b"".join(b'%d,good.png,"what, ?",x\n' % at for at in range(5))
    data = parquet(found) if kind == "parquet" else data
    if kind == "jsonl.gz":
        data = gzip.compress(mangled(random, data) if random.random() < 0.5 else data)
    path = folder / f"rows.{kind}"
    path.write_bytes(mangled(random, data))
    return path


def text_case(random: Random, folder: Path, outside: Path) -> Path:
    """JSON that is an attack by itself."""
    deep = random.choice([b"[", b'{"a":', b'[{"a":']) * random.choice([500, 200_000])
    texts = [
        deep,
        deep + b"1" + b"]" * 500,
        b'{"id": ' + b"9" * 100_000 + b"}",
        b"[1e999999]",
        b"\0" * 5000,
        b"{" * 9,
        b"PK\3\4",
    ]
    texts += [
        b'{"id":1,"id":2,"prompt":"?"}' * 3,
        b"\xef\xbb\xbf" * 3,
        b"\xff\xfe{\0",
        b'"' + b"\\u0000" * 5000,
        b"NaN",
        b"\n" * 50_000,
    ]
    kind = random.choice(["jsonl", "json", "csv"])
    (folder / f"rows.{kind}").write_bytes(random.choice(texts) + b"\n" + lines([GOOD]))
    return folder / f"rows.{kind}"


def image_case(random: Random, folder: Path, outside: Path) -> Path:
    kind = random.choice(
        ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "JPEG2000"]
    )
    data = mangled(random, png(random.randint(1, 64), random.randint(1, 64), kind=kind))
    eps = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({outside}/secret.txt) (r) file\n%%EOF\n".encode()
    data = random.choice(
        [data, data, data, bomb(random.choice([20_000, 60_000, 2**31 - 1])), b"", eps, SECRET.encode()]
    )
    (folder / "bad.png").write_bytes(data)
    if random.random() < 0.1:
        os.remove(folder / "bad.png")
        random.choice([os.mkdir, os.mkfifo])(folder / "bad.png")
    found = [GOOD, GOOD | {"id": "bad", "image": "bad.png"}, GOOD | {"id": "held", "image": url(data)}]
    (folder / "rows.jsonl").write_bytes(lines(found))
    return folder / "rows.jsonl"


def archive_case(random: Random, folder: Path, outside: Path) -> Path:
    data = lines([GOOD])
    zeros = gzip.compress(random.choice([b"\0", b" ", b"\n", b"["]) * 2**24)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(f"../../{outside.name}/x", data)
    own = [zeros, gzip.compress(data) * 3, gzip.compress(gzip.compress(data)), gzip.compress(data)[:-6]]
    own += [gzip.compress(data) + b"rest", packed.getvalue(), b"\x1f\x8b" + random.randbytes(200)]
    path = folder / f"rows.{random.choice(['jsonl.gz', 'jsonl', 'json', 'csv', 'parquet'])}"
    path.write_bytes(random.choice(own))
    return path


def folder_case(random: Random, folder: Path, outside: Path) -> Path:
    match random.randrange(4):
        case 0:
            names = [{"file_name": own, "text": "x"} for own in random.sample(paths(outside), 5)]
            (folder / "metadata.jsonl").write_bytes(lines([{"file_name": "good.png", "text": "x"}, *names]))
        case 1:
            (folder / "good.txt").write_bytes(random.choice([b"", b"\xff", b"x" * 3_000_000, b"\0"]))
        case 2:
            files = random.choice([["../outside/x.arrow"], [f"{outside}/x.arrow"], [None], [], ["x.arrow"], [{}]])
            state = {"_data_files": [{"filename": own} for own in files], "_fingerprint": "x", "_split": None}
            (folder / "state.json").write_text(json.dumps(random.choice([state, [], {"_data_files": 3}])))
            (folder / "dataset_info.json").write_text("{}")
        case 3:
            splits = random.choice([["../outside"], ["train"], [3], "train", None])
            (folder / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return folder


def link_case(random: Random, folder: Path, outside: Path) -> Path:
    """Links to what is no image: they may lead out of the folder, but nothing that they lead to is told."""
    target = random.choice([outside / "secret.txt", outside, Path("/dev/zero"), folder / "bad.png", Path("/nowhere")])
    (folder / "bad.png").symlink_to(target)
    (folder / "rows.jsonl").write_bytes(lines([GOOD, GOOD | {"id": "b", "image": "bad.png"}]))
    return folder / "rows.jsonl"


CASES: tuple[Case, ...] = (
    rows_case,
    rows_case,
    bytes_case,
    text_case,
    image_case,
    archive_case,
    folder_case,
    link_case,
)


def one(case: Case, random: Random, place: Path) -> str:
    """What came of one case: ``read``, or ``told``.

    Raises:
        AssertionError: something was read or said that should not be.
    """
    outside, folder = place / "outside", place / "data"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "good.png").write_bytes(png())
    source = case(random, folder, outside)
    OPENED.clear()
    said: list[str] = []
    result = "read"
    try:
        data = read(source, need_answer=False, on_bad="skip", columns=None)
        said += [own.reason for own in data.skipped]
        for sample in data:
            said += [sample.prompt, sample.answer or "", sample.id]
            try:
                shown = sample.load_images()
            except DataError as error:
                said.append(str(error))
                continue
            assert not any(own.size == (4, 4) and own.getpixel((0, 0)) == COLOUR for own in shown), "an image outside"
    except DataError as error:
        said.append(str(error))
        assert "\n" not in str(error), f"an error of several lines: {error}"
        result = "told"
    read_outside = [own for own in OPENED if str(outside) in os.path.realpath(own) and case is not link_case]
    assert not read_outside, f"opened {read_outside}"
    assert not any(SECRET in own for own in said if case is not image_case), "a secret was told"
    return result


OPENED: list[str] = []


def watch(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(args[0], str):
        OPENED.append(args[0])
    assert event not in ("subprocess.Popen", "os.system", "os.exec", "socket.connect"), event


def late(*_: object) -> None:
    raise Hang


def run(cases: int, seed: int) -> tuple[Counter[str], list[str], float]:
    """How many cases came to what, what went wrong, and the longest case's seconds."""
    found, wrong, longest = Counter[str](), list[str](), 0.0
    texts.UNPACKED = tables.UNPACKED = 2**22
    texts.LONGEST = window.LONGEST = 2**20
    with suppress(ImportError):
        import datasets  # noqa: F401 - which takes long, and is no case's fault
    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "outside").mkdir()
        (place / "outside" / "secret.png").write_bytes(png(colour=COLOUR))
        (place / "outside" / "secret.txt").write_text(SECRET)
        for at in range(cases):
            random = Random(f"{seed}/{at}")
            case, began = random.choice(CASES), time.perf_counter()
            signal.alarm(SECONDS)
            try:
                found[f"{case.__name__} {one(case, random, place)}"] += 1
            except (Exception, Hang) as error:
                wrong.append(f"case {at} ({case.__name__}): {type(error).__name__}: {str(error)[:300]}")
            finally:
                signal.alarm(0)
            longest = max(longest, time.perf_counter() - began)
    return found, wrong, longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    sys.addaudithook(watch)
    found, wrong, longest = run(args.cases, args.seed)
    for name, count in sorted(found.items()):
        print(f"{count:5} {name}")
    print(f"{args.cases} cases, {len(wrong)} went wrong, the longest took {longest:.1f} seconds")
    for own in wrong[:40]:
        print(own)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
