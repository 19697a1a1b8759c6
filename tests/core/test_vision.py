"""Which images belong to which row, and extra tokens that look at their row's patches."""

import pytest
import torch

from vismem_core.base.vision import VisionStates, attend
from vismem_core.errors import AttachError


@pytest.mark.parametrize(
    ("tokens", "counts", "rows"),
    [
        ([4, 6], [[4, 6]], [[0], [1]]),
        ([4, 6, 2], [[10, 0, 2]], [[0, 1], [], [2]]),
        ([4, 6, 2], [[0, 12, 0]], [[], [0, 1, 2], []]),
        # images come before videos, whatever the order in a row
        ([4, 6, 3, 5], [[4, 6, 0], [3, 0, 5]], [[0, 2], [1], [3]]),
        # copies that share their prompt's images
        ([4, 6], [[4, 4, 4, 6, 6, 6]], [[0], [0], [0], [1], [1], [1]]),
        ([4, 6, 3], [[10, 10, 0, 0], [0, 0, 3, 3]], [[0, 1], [0, 1], [2], [2]]),
        ([4], [[0, 0, 4, 4]], [[], [], [0], [0]]),
        # copies whose images were encoded again for each
        ([4, 4, 6, 6], [[4, 4, 6, 6]], [[0], [1], [2], [3]]),
        ([], [[0, 0]], [[], []]),
        ([], [[3, 0]], [[], []]),
    ],
)
def test_assign(tokens: list[int], counts: list[list[int]], rows: list[list[int]]) -> None:
    states = VisionStates(tokens=tokens, patches=[4 * count for count in tokens])
    states.assign(counts)
    assert states.rows == rows


@pytest.mark.parametrize("counts", [[[5, 5]], [[4, 9]], [[4, 6], [1, 0]]])
def test_tokens_that_do_not_add_up(counts: list[list[int]]) -> None:
    states = VisionStates(tokens=[4, 6], patches=[4, 6])
    with pytest.raises(AttachError, match="which images belong to which prompt"):
        states.assign(counts)


def test_tiles() -> None:
    """The last tile of an image has its tokens; none of the image's tiles goes to the next row."""
    states = VisionStates(tokens=[0, 0, 7, 5, 0, 3], patches=[2] * 6)
    states.assign([[7, 0, 8]])
    assert states.rows == [[0, 1, 2], [], [3, 4, 5]]


def test_gather() -> None:
    states = VisionStates(patches=[2, 3, 1], rows=[[1], [0, 2], []])
    where = states.gather([0, 1])
    assert where.index.tolist() == [[2, 3, 4], [0, 1, 5]]
    assert where.mask is None
    where = states.gather([2, 0])
    assert where.index.shape == (2, 3)
    assert where.mask is not None
    assert where.mask.tolist() == [[False] * 3, [True] * 3]
    assert states.gather([2]).index.shape == (1, 0)


def test_extend() -> None:
    states = VisionStates()
    calls = [[torch.randn(2, count, 2, 4) for _ in range(2)] for count in (3, 5)]
    for call in calls:
        for block, (keys, values) in enumerate(call):
            states.extend(block, keys, values)
    for block in range(2):
        assert states.keys[block].equal(torch.cat([call[block][0] for call in calls]))
        assert states.values[block].equal(torch.cat([call[block][1] for call in calls]))


@pytest.mark.parametrize("rows", [[0], [0, 1, 2], [2], [2, 1]])
def test_attend(rows: list[int]) -> None:
    heads, extras, width = 2, 3, 4
    states = VisionStates(patches=[2, 3, 1], rows=[[1], [0, 2], []])
    states.extend(0, torch.randn(6, heads, width), torch.randn(6, heads, width))
    queries, keys, values = torch.randn(3, len(rows), heads, extras, width)
    got = attend(queries, keys, values, states, 0, states.gather(rows))
    assert got.shape == (len(rows), extras, heads * width)
    patches = {0: [2, 3, 4], 1: [0, 1, 5], 2: []}
    for at, row in enumerate(rows):
        for head in range(heads):
            seen = torch.cat([states.keys[0][patches[row], head], keys[at, head]])
            weights = (queries[at, head] @ seen.T / width**0.5).softmax(-1)
            expected = weights @ torch.cat([states.values[0][patches[row], head], values[at, head]])
            torch.testing.assert_close(got[at, :, head * width : (head + 1) * width], expected)


def test_attend_without_any_image() -> None:
    states = VisionStates(rows=[[], []])
    queries, keys, values = torch.randn(3, 2, 1, 3, 4)
    got = attend(queries, keys, values, states, 0, states.gather([0, 1]))
    weights = (queries[:, 0] @ keys[:, 0].transpose(1, 2) / 2).softmax(-1)
    torch.testing.assert_close(got, weights @ values[:, 0])
