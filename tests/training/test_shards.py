"""Runs shards.py as two processes that share a base; one alone is told so."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launch import launch
from typer.testing import CliRunner

from vismem_cli.app import app
from vismem_core.base.loading import load_base
from vismem_core.errors import AttachError


@pytest.mark.long
def test_sharing_a_base_changes_nothing(tmp_path: Path) -> None:
    launch([sys.executable, str(Path(__file__).with_name("shards.py")), str(tmp_path)], 2)


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(AttachError, match=r"one process.*examples/accelerate/fsdp\.yaml"):
        load_base("llava", device="shard")


@pytest.mark.parametrize("command", ["infer", "eval"])
def test_only_training_shares(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--device", "shard"])
    assert done.exit_code == 2
    assert "only training shares" in done.output
