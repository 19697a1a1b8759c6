"""The public suite on InternVL."""

from typing import Any

import tiny

from vismem_core.testing import BackboneContract


class TestInternVL(BackboneContract):
    backbone = "internvl"

    def load(self) -> tuple[Any, Any]:
        return tiny.internvl(tied=False)
