"""How the commands load a base."""

from __future__ import annotations

import pytest
import torch

from vismem_cli import sources
from vismem_cli.sources import LoadOptions, open_base

OPTIONS = LoadOptions(
    memory=None,
    backbone="timm_lm",
    model=None,
    any_base=False,
    dtype="auto",
    device="cpu",
    trust_remote_code=False,
    revision=None,
)


@pytest.mark.parametrize(
    ("asked", "small", "expected"), [(None, 10**7, [1]), ("4", 10**7, []), (None, 10**5, [])], ids=["", "told", "large"]
)
def test_small_models_run_on_one_thread(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, small: int, expected: list[int]
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(sources, "SMALL", small)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    model, _, name = open_base(OPTIONS)
    assert name == "timm_lm" and sum(own.numel() for own in model.parameters()) < 10**7
    assert threads == expected
