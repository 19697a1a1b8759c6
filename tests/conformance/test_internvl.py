"""The public suite on InternVL."""

from typing import Any

import pytest
import tiny

from vismem_core.testing import BackboneContract


class TestTied(BackboneContract):
    backbone = "internvl"

    def load(self) -> tuple[Any, Any]:
        return tiny.internvl(tied=True)


@pytest.mark.long
class TestUntied(TestTied):
    def load(self) -> tuple[Any, Any]:
        return tiny.internvl(tied=False)
