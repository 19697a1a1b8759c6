"""The public suite on Qwen2.5-VL."""

from typing import Any

import pytest
import tiny

from vismem_core.testing import BackboneContract


class TestTied(BackboneContract):
    backbone = "qwen2_5_vl"

    def load(self) -> tuple[Any, Any]:
        return tiny.qwen(tied=True)


class TestUntied(TestTied):
    def load(self) -> tuple[Any, Any]:
        return tiny.qwen(tied=False)


@pytest.mark.long
class TestWindow(TestTied):
    """Half of the layers look back 12 tokens: prompts and answers cross that."""

    def load(self) -> tuple[Any, Any]:
        return tiny.qwen(tied=False, window=12)
