"""What reaches the terminal beside results: errors and warnings of one line each."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from vismem_cli import program, sources
from vismem_core.errors import AttachError


def test_warnings_are_one_line_and_the_interpreters_way_comes_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warns(*args: Any, **kwargs: Any) -> Any:
        warnings.warn("short memory sees\n  nothing", stacklevel=1)
        raise AttachError("and that was\nall")

    monkeypatch.setattr(sources, "open_base", warns)
    before = warnings.showwarning
    with pytest.raises(SystemExit) as ended:
        program.run(["infer", "--backbone", "timm_lm"])
    told = capsys.readouterr().err.splitlines()
    assert "warning: short memory sees nothing" in told and told[-1].startswith("error: ")
    assert ended.value.code in (1, 2) and warnings.showwarning is before
