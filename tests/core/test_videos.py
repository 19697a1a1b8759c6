"""Videos are shown as some of their frames, each an image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vismem_core.base.images import decode
from vismem_core.base.videos import Frame
from vismem_core.errors import DataError
from vismem_core.files.samples import read

GREYS = [10 * at for at in range(24)]
"""What the frames of the video show; three seconds of it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    with av.open(str(folder / "grey.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        for grey in GREYS:
            file.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48), (grey, grey, grey)))))
        file.mux(stream.encode())
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    (folder / "text.mp4").write_text("no video")
    (folder / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngrey.mp4\n#EXT-X-ENDLIST\n")
    (folder / "cut.mp4").write_bytes((folder / "grey.mp4").read_bytes()[:300])
    return folder


def sample(folder: Path, **row: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"id": "a", "answer": "x", **row}) + "\n")
    return read(path, need_answer=True, frames=4)[0]


def level(image: Image.Image) -> int:
    return int(image.convert("L").getpixel((30, 20)))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 3, 24, 30])
def test_frames_are_evenly_spread(count: int, folder: Path) -> None:
    shown = [level(decode(Frame(folder / "grey.mp4", at, count))) for at in range(count)]
    wanted = [GREYS[int((at + 0.5) * 24 // count)] for at in range(count)]  # shown in the middle of its part
    assert all(abs(one - other) <= 6 for one, other in zip(shown, wanted, strict=True)), (shown, wanted)


def test_rows_with_videos(folder: Path) -> None:
    own = sample(folder, video="grey.mp4", prompt="<video> what happens ?", frames=3)
    assert own.prompt == "<image><image><image> what happens ?"
    assert own.images == tuple(Frame(folder / "grey.mp4", at, 3) for at in range(3))
    assert [image.size for image in own.load_images()] == [(64, 48)] * 3
    assert len(sample(folder, videos=["grey.mp4"], prompt="what happens ?").images) == 4
    both = sample(folder, videos=["grey.mp4"], images=["red.png"], prompt="<video> and <image> ?", frames=2)
    assert [type(image).__name__ for image in both.images] == ["Frame", "Frame", "PosixPath"]
    content = [
        {"type": "video", "video": "grey.mp4"},
        {"type": "text", "text": " ?"},
        {"type": "image", "image": "red.png"},
    ]
    told = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"messages": told}) + "\n")
    (own,) = read(path, need_answer=True, frames=2)
    assert own.prompt == "<image><image> ?<image>" and len(own.images) == 3
    assert own.digest() != sample(folder, videos=["grey.mp4"], images=["red.png"], prompt="?", frames=1).digest()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"video": "gone.mp4"}, "no such video"),
        ({"video": "../x.mp4"}, "the video '../x.mp4' lies outside"),
        ({"video": "text.mp4"}, r"text\.mp4 does not decode as a video"),
        ({"video": "list.mp4"}, r"list\.mp4 does not decode as a video"),
        ({"video": "cut.mp4"}, r"cut\.mp4 does not decode as a video"),
        ({"video": "red.png"}, r"red\.png does not decode as a video"),
        ({"video": "http://x/y.mp4"}, "the video .* is a URL"),
        ({"video": "grey.mp4", "frames": 0}, "'frames' must be a number from 1 to 1024, got 0"),
        ({"video": "grey.mp4", "frames": 10**9}, "'frames' must be"),
        ({"video": 3}, "'video' must be a path"),
        (
            {"video": "grey.mp4", "prompt": "<video><video>"},
            "the prompt has 0 <image> and 2 <video>, images: 0, and videos: 1",
        ),
    ],
)
def test_what_is_wrong_with_a_video(row: dict[str, Any], says: str, folder: Path) -> None:
    with pytest.raises(DataError, match=says):
        sample(folder, **{"prompt": "?", **row})


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.mp4 reading it takes PyAV: pip install 'vismem\[video\]'"):
        sample(tmp_path, video="a.mp4", prompt="?")
