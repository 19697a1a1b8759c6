"""Query builders by hand: Q looks at H and Q, H never looks at Q (Eq. 9-11)."""

from typing import Any

import pytest
import torch
from reference import plain_block

from vismem_core.config import QueryConfig
from vismem_core.plugins import registry

WIDTH = 24


def build(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = QueryConfig(name, **({"length": 5, "layers": 3, "heads": 4} | settings))
    builder = registry("query_builders").get(name)(WIDTH, config)
    with torch.no_grad():
        for parameter in builder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return builder


@pytest.mark.parametrize("name", ["encoder", "cross"])
@torch.no_grad()
def test_by_hand(name: str) -> None:
    builder = build(name)
    rows = [torch.randn(length, WIDTH) * scale for length, scale in ((7, 1.0), (1, 30.0), (12, 0.1))]
    states = torch.full((len(rows), 12, WIDTH), 50.0)  # what stands in the padding must not matter
    mask = torch.zeros(len(rows), 12, dtype=torch.bool)
    for row, (own, left) in enumerate(zip(rows, (True, False, True), strict=True)):
        here = slice(12 - len(own), None) if left else slice(0, len(own))
        states[row, here], mask[row, here] = own, True
    got = builder(states, mask)
    assert got.shape == (len(rows), 5, WIDTH)
    for row, own in enumerate(rows):
        entered, asked = builder.enter(own), builder.initial
        for depth, block in enumerate(builder.blocks):
            looked = plain_block(block, asked, torch.cat([entered, asked]))
            if name == "encoder" and depth < 2:
                entered = plain_block(block, entered, entered)
            asked = looked
        torch.testing.assert_close(got[row], builder.leave(asked), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["encoder", "cross"])
def test_every_weight_and_state_counts(name: str) -> None:
    builder = build(name)
    states = torch.randn(2, 6, WIDTH, requires_grad=True)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    builder(states, mask).square().sum().backward()
    assert [name for name, tensor in builder.named_parameters() if not tensor.grad.any()] == []
    assert states.grad is not None
    assert (states.grad.abs().sum(-1) > 0).equal(mask)


def test_a_row_without_states() -> None:
    out = build("encoder")(torch.zeros(2, 3, WIDTH), torch.tensor([[True] * 3, [False] * 3]))
    assert out.isfinite().all()


@pytest.mark.parametrize(("width", "inner"), [(0, 24), (16, 16), (18, 16)])
def test_inner_width(width: int, inner: int) -> None:
    builder = build("encoder", width=width)
    assert builder.initial.shape == (5, inner)
    assert builder(torch.randn(1, 2, WIDTH), torch.ones(1, 2, dtype=torch.bool)).shape == (1, 5, WIDTH)


@pytest.mark.parametrize("visual", [0, 9])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("name", ["encoder", "cross"])
@torch.no_grad()
def test_what_is_computed_ahead_changes_nothing(name: str, layers: int, visual: int) -> None:
    builder = build(name, layers=layers)
    states, mask = torch.randn(3, visual + 4, WIDTH), torch.ones(3, visual + 4, dtype=torch.bool)
    mask[0, 5:visual], mask[1, :visual], mask[2, visual : visual + 2] = False, False, False
    expected = builder(states, mask)
    ahead = builder.ahead(states[:, :visual], mask[:, :visual])
    states[:, :visual] = 50.0  # they are not read again
    torch.testing.assert_close(builder(states, mask, ahead), expected, atol=1e-5, rtol=1e-5)
