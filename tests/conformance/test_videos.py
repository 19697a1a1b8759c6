"""The public suite where prompts show videos: insertion, generation and training, with replay and GRPO's rollouts.

Frames of no file stand in for decoded ones.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL.Image import Image

from vismem_core.base.videos import STILL, Frame, Still
from vismem_core.testing.base import Question
from vismem_core.testing.generation import Generation
from vismem_core.testing.insertion import Insertion
from vismem_core.testing.training import Training

COUNT = 4


def video(seed: int, width: int, height: int) -> list[Image]:
    """What decoding all frames of a video gives."""
    frames = []
    for at in range(COUNT):
        image = tiny.picture(width, height, seed + at)
        image.info[STILL] = Still(Frame(Path(f"{seed}.mp4"), at, COUNT), 2 * at, 2.0, 2 * COUNT)
        frames.append(image)
    return frames


@pytest.mark.long
class TestQwen(Insertion, Generation, Training):
    backbone = "qwen2_5_vl"
    test_static_caches: Any = None  # what is compiled sees no prompt

    def load(self) -> tuple[Any, Any]:
        return tiny.qwen(tied=True)

    def questions(self) -> list[Question]:
        marks = "<image>" * COUNT
        return [
            ("what is on the left ?", [tiny.picture(24, 56, 5)]),
            ("what falls ?", video(0, 32, 16)),
            (f"is {marks} a boot , or is <image> ?", [*video(10, 16, 24), tiny.picture(24, 16, 9)]),
            ("what is it ?", []),
        ]

    def test_there_are_videos(self) -> None:
        base = self.base()
        told, token = base.inputs(*self.questions()), base.backbone.placeholders["video"]
        assert [bool((row == token).any()) for row in told["input_ids"]] == [False, True, True, False]


@pytest.mark.long
class TestLlavaOneVision(TestQwen):
    backbone = "llava_onevision"

    def load(self) -> tuple[Any, Any]:
        return tiny.llava_onevision(tied=True)
