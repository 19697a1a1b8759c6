"""The public suite on Qwen3-VL and Qwen3.5, with their experts."""

from typing import Any

from model_types import build

from vismem_core.testing import BackboneContract


class TestQwen3VL(BackboneContract):
    backbone = "qwen3_vl"

    def load(self) -> tuple[Any, Any]:
        return build("qwen3_vl")


class TestQwen35(BackboneContract):
    backbone = "qwen3_5"

    def load(self) -> tuple[Any, Any]:
        return build("qwen3_5")
