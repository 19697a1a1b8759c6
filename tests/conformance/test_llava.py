"""The public suite on the LLaVA families, with the heads that their checkpoints have."""

from typing import Any

import pytest
import tiny

from vismem_core.testing import BackboneContract


class TestLlava(BackboneContract):
    backbone = "llava"

    def load(self) -> tuple[Any, Any]:
        return tiny.llava(tied=False)


@pytest.mark.long
class TestLlavaNext(BackboneContract):
    backbone = "llava_next"

    def load(self) -> tuple[Any, Any]:
        return tiny.llava_next(tied=False)


class TestLlavaOneVision(BackboneContract):
    backbone = "llava_onevision"

    def load(self) -> tuple[Any, Any]:
        return tiny.llava_onevision(tied=True)


@pytest.mark.long
class TestLlavaOneVision15(BackboneContract):
    backbone = "llava_onevision1_5"

    def load(self) -> tuple[Any, Any]:
        return tiny.rice(tied=False)
