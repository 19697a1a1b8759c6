"""Which checks of the suite take many seconds."""

from __future__ import annotations

import pytest

COMPILED = "test_static_caches[compiled]"
"""Dynamo reads the whole model for it, some times over."""
BY_DEFAULT = ("test_qwen2_5_vl.py::TestUntied", "test_suite.py::TestPlain")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name == COMPILED and not any(name in item.nodeid for name in BY_DEFAULT):
            item.add_marker(pytest.mark.long)
