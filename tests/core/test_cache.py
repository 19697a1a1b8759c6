"""KV caches as transformers keep them: rows of them, and which ones memory works on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import content, filled, same
from transformers.cache_utils import DynamicLayer

from vismem_core.base import cache as kv
from vismem_core.errors import AttachError


@pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1], [0, 1, 2]])
def test_select_and_fork_leave_the_cache_alone(rows: list[int]) -> None:
    cache = filled(4)
    before = content(cache)
    branch = kv.select(cache, rows)
    assert same(content(branch), [(keys[rows], values[rows]) for keys, values in before])
    for layer in branch.layers:
        layer.update(*torch.randn(2, len(rows), 2, 3, 4))
    assert branch.get_seq_length() == 7
    assert branch.layers[1].get_seq_length() == 7
    assert same(content(cache), before)
    assert [layer.get_seq_length() for layer in cache.layers] == [4, 4]


class Odd(DynamicLayer):  # type: ignore[misc]
    """Stands for layers that hold more than keys and values, such as quantised ones."""


@pytest.mark.parametrize("kind", ["tuple", "odd", "offloaded"])
def test_caches_that_cannot_grow_by_rows(kind: str) -> None:
    cache: Any = filled(2)
    if kind == "tuple":
        cache = ((torch.zeros(1), torch.zeros(1)),)
    elif kind == "odd":
        cache.layers[1] = Odd()
    else:
        cache.offloading = True
    with pytest.raises(AttachError, match=r"memory (needs a dynamic KV cache|cannot grow)"):
        kv.check(cache)


def test_dynamic_caches_pass() -> None:
    cache = filled(2)
    assert kv.check(cache) is cache
