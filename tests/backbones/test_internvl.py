"""InternVL: how memory tokens meet the pixel shuffle, and videos, whose frames are images."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import towers
from bases import Base, config, internvl

from vismem_backbones.internvl import InternVL
from vismem_core.base.vision import VisionStates


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_four_tokens_in_a_row_are_a_square_of_patches(tied: bool) -> None:
    """Patches put in the order of memory tokens, square by square, are projected as the model projects its image."""
    base = Base(*tiny.internvl(tied=tied))
    backbone = InternVL(base.model, base.processor)
    inputs = base.inputs(("?", [tiny.picture(16, 16, 0)]))
    out = base.model.model.get_image_features(inputs["pixel_values"])
    grid = out.last_hidden_state[:, 1:].unflatten(1, (4, 4))
    squares = torch.stack(
        [grid[:, i + a, j + b] for i in (0, 2) for j in (0, 2) for a in (0, 1) for b in (0, 1)], dim=1
    )
    torch.testing.assert_close(backbone.project(squares), out.pooler_output, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(backbone.project(grid.flatten(1, 2)), out.pooler_output, atol=1e-2)


def test_no_spare_rows() -> None:
    """The four tokens' ids lie beyond the vocabulary, which is as long as the tokenizer's."""
    base = internvl()
    rows = base.model.get_input_embeddings().weight.shape[0]
    assert len(base.processor.tokenizer) == rows
    memory = base.attach(config(trigger="schedule:0=short"))
    assert memory.tokens.first == rows
    answer = base.generate(("what ?", [tiny.picture(40, 20, 0)]), max_new_tokens=4).answers[0]
    assert answer[:2].tolist() == [rows, rows + 2]


@torch.no_grad()
def test_frames_of_a_video() -> None:
    base = internvl()
    backbone = InternVL(base.model, base.processor)
    frames = np.stack([np.asarray(tiny.picture(16, 16, seed)) for seed in range(3)])
    inputs = base.processor(
        text=["<IMG_CONTEXT> ?", "<video> ?"],
        images=[[tiny.picture(40, 20, 5)]],
        videos=[frames],
        padding=True,
        return_tensors="pt",
        do_sample_frames=False,
    )
    states = VisionStates()
    with backbone.record(states, keep=True, inputs=False):
        towers.features(base.model.model, inputs)
    states.assign([(inputs["input_ids"] == token).sum(-1).tolist() for token in backbone.placeholders.values()])
    tiles = len(states.patches) - 3
    assert states.rows == [list(range(tiles)), [tiles, tiles + 1, tiles + 2]]
