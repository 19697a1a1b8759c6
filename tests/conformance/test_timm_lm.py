"""The public suite on a ViT of timm with a language model, with the heads and tokens that such models may have."""

from typing import Any

import pytest
import tiny

from vismem_core.testing import BackboneContract


@pytest.mark.long
class TestTied(BackboneContract):
    """Class and register tokens."""

    backbone = "timm_lm"

    def load(self) -> tuple[Any, Any]:
        return tiny.timm_lm(tied=True, vision={"reg_tokens": 2, "init_values": 1.0})


class TestUntied(BackboneContract):
    """No class token, and squares of visual tokens pooled."""

    backbone = "timm_lm"

    def load(self) -> tuple[Any, Any]:
        return tiny.timm_lm(tied=False, vision={"class_token": False, "global_pool": "map"}, pooling=2)
