"""Videos enter as the model's own video input, prompts are those of transformers, and memory sees them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bases import Base, config, internvl, llava, llava_onevision, tied
from reference import one_pass, query, short_latents
from transformers.video_utils import load_video

from vismem_core.answers.checking import checked
from vismem_core.base.families import find_backbone
from vismem_core.base.images import Picture, decode
from vismem_core.base.loading import load_base
from vismem_core.base.media import Media
from vismem_core.base.videos import Frame
from vismem_core.errors import DataError
from vismem_core.files.samples import asked, read

COUNT = 4
FAMILIES = [tied, llava_onevision, internvl]
MARKS = {"tied": "<|vision_start|><|{}_pad|><|vision_end|>", "llava_onevision": "<{}>", "internvl": "<{}>"}
ABOUT = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second of four different pictures, and of their mirror images beside it."""
    av = pytest.importorskip("av")
    folder: Path = tmp_path_factory.mktemp("clips")
    for name, seed in (("clip", 0), ("other", 20)):
        with av.open(str(folder / f"{name}.mp4"), "w") as file:
            stream = file.add_stream("mpeg4", rate=COUNT)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 32, 16, "yuv420p", 2_000_000
            for at in range(COUNT):
                file.mux(stream.encode(av.VideoFrame.from_image(tiny.picture(32, 16, seed + at))))
            file.mux(stream.encode())
    return folder / "clip.mp4"


def frames(path: Path, count: int = COUNT) -> list[Picture]:
    return [Frame(path, at, count) for at in range(count)]


def backbone(base: Base) -> Any:
    return find_backbone(base.model)(base.model, base.processor)


def qwen3() -> Base:
    return Base(*load_base("qwen3_vl")[:2])


@pytest.mark.parametrize("make", [*FAMILIES, pytest.param(qwen3, marks=pytest.mark.long)])
def test_prompts_are_those_of_transformers(make: Any, clip: Path) -> None:
    """Ids, pixels and times equal what the processor makes of the file, which transformers itself decodes."""
    base = make()
    video, metadata = load_video(str(clip), backend="pyav", num_frames=COUNT)
    parts = [{"type": "video", "video": video}, {"type": "text", "text": "what falls ?"}]
    expected = base.processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"video_metadata": [metadata], "do_sample_frames": False},
    )
    for text in ("what falls ?", "<image>" * COUNT + " what falls ?"):
        got = backbone(base).inputs([text], [frames(clip)])
        assert got.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(got[name]), torch.as_tensor(expected[name])) for name in expected)


@pytest.mark.parametrize("make", FAMILIES)
def test_media_stand_where_they_are_marked(make: Any, clip: Path) -> None:
    base, red = make(), tiny.picture(16, 16, 3)
    own, marks = backbone(base), "<image>" * COUNT
    got = own.inputs([f"so <image> or {marks} ?", f"{marks}<image> ?"], [[red, *frames(clip)], [*frames(clip), red]])
    first = base.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "so IMAGE or VIDEO ?"}]}], add_generation_prompt=True
    )
    image, video = (MARKS[make.__name__].format(kind) for kind in ("image", "video"))
    image = "<IMG_CONTEXT>" if make is internvl else image
    texts = [first.replace("IMAGE", image).replace("VIDEO", video)]
    texts.append(texts[0].replace(f"so {image} or {video}", f"{video}\n{image}" if make is not tied else video + image))
    told = [video for _ in range(2) for video in [list(map(decode, frames(clip)))]]
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    about = [{"total_num_frames": COUNT, "fps": COUNT, "duration": 1.0, "frames_indices": list(range(COUNT))}] * 2
    expected = base.processor(
        text=texts,
        images=[[red], [red]],
        videos=told,
        videos_kwargs={"do_sample_frames": False, "video_metadata": about},
        **options,
    )
    assert got["input_ids"].equal(expected["input_ids"])
    assert all(torch.equal(got[name], expected[name]) for name in ABOUT if isinstance(got.get(name), torch.Tensor))


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("make", FAMILIES)
def test_memory_of_a_video_equals_one_pass(make: Any, dropped: bool, clip: Path) -> None:
    """Through plain ``generate`` on the processor's inputs; dropped, nothing after memory sees the video."""
    base = make()
    pristine = copy.deepcopy(base.model)
    settings = config(trigger="schedule:1=short,4=long", drop_image_after_invocation=dropped)
    memory = base.attach(settings)
    assert not memory.backbone.no_videos
    for name in ("clip", "other"):
        inputs = memory.backbone.inputs(["what falls ?"], [frames(clip.with_stem(name))])
        output = base.model.generate(
            **inputs, max_new_tokens=8, eos_token_id=None, output_logits=True, return_dict_in_generate=True
        )
        answer = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        expected = one_pass(memory, inputs, answer, hidden=dropped)
        got = torch.cat(output.logits)[:, : expected.logits.shape[1]]
        torch.testing.assert_close(got, expected.logits, atol=1e-4, rtol=1e-4)
        if dropped:
            seen = one_pass(memory, inputs, answer).logits
            assert not torch.allclose(got, seen, atol=1e-2), "whether the video is seen makes no difference"
        asks = query(memory, expected, expected.places[0], expected.places[1])
        told = short_latents(pristine, memory, inputs, asks, "cache")
        torch.testing.assert_close(memory.trace.row(0)[0].latents, told, atol=1e-4, rtol=1e-3)
        blind = short_latents(pristine, memory, {"input_ids": inputs["input_ids"]}, asks, "cache")
        assert not torch.allclose(told, blind, atol=1e-2), "the patches make no difference"


def test_rows_alone_and_together(clip: Path) -> None:
    base = llava_onevision()
    memory = base.attach(config(trigger="schedule:1=short,4=long"))
    rows = [("what ?", frames(clip)), ("is it a bag ?", [tiny.picture(16, 16, 1)]), ("what is it ?", [])]
    together = memory.backbone.inputs([text for text, _ in rows], [images for _, images in rows])
    answers = base.model.generate(**together, max_new_tokens=8, eos_token_id=None)
    for row, (text, images) in enumerate(rows):
        alone = memory.backbone.inputs([text], [images])
        answer = base.model.generate(**alone, max_new_tokens=8, eos_token_id=None)[0, alone["input_ids"].shape[1] :]
        assert answers[row, together["input_ids"].shape[1] :].equal(answer)


def test_models_without_videos_take_frames_as_images(clip: Path) -> None:
    own = backbone(llava())
    with pytest.warns(
        UserWarning, match=r"^videos enter this model as images, a frame each: its processor takes none$"
    ):
        got = own.inputs(["what ?"], [frames(clip)])
    pictures = [decode(frame) for frame in frames(clip)]
    for picture in pictures:
        picture.info.clear()
    with warnings.catch_warnings(action="error"):
        expected = own.inputs(["what ?"], [pictures])
    assert got["input_ids"].equal(expected["input_ids"]) and len(got["pixel_values"]) == COUNT


def test_what_is_no_whole_video_is_images(clip: Path) -> None:
    """Some frames alone, another order, text between marks, frames of two videos."""
    pictures = [decode(frame) for frame in frames(clip)]
    other = [decode(frame) for frame in frames(clip.with_stem("other"))]
    marks = "<image>" * COUNT
    for texts, shown in (
        (["?"], pictures[:3]),
        (["?"], pictures[::-1]),
        (["?"], [*pictures[:2], *other[2:]]),
        ([f"<image> then {'<image>' * (COUNT - 1)}"], pictures),
        (["<image>", marks[: -len("<image>")]], pictures),
    ):
        assert Media.of(texts, shown) == Media(texts, shown)
    red = tiny.picture(8, 8, 0)
    for texts, left in ((["?"], ["?"]), ([f"<image> a {marks}", f" b{marks}"], ["<image> a <image>", " b<image>"])):
        told = Media.of(texts, [red, *pictures, *other])
        assert (told.texts, told.kinds) == (left, ["image", "video", "video"])
        assert told.videos == [pictures, other] and told.images == [red]


def test_videos_of_several_lengths(clip: Path) -> None:
    """Where one batch cannot hold both, the file's check says so, and what to do."""
    path = clip.with_name("rows.jsonl")
    told = [{"id": str(at), "video": "clip.mp4", "frames": at, "prompt": "?", "answer": "x"} for at in (3, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    data = read(path)
    assert len(checked(backbone(tied()), data, "fail")) == 2
    assert backbone(tied()).inputs(*asked(data))["video_grid_thw"].tolist() == [[2, 4, 8]] * 2
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*videos of 3 and 4 frames in one batch; give all rows the"):
        checked(backbone(internvl()), data, "fail")
