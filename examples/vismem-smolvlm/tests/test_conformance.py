"""The promises of vismem, held on the model that ships with this package."""

from typing import Any

from vismem_core.base.loading import load_base
from vismem_core.testing import BackboneContract


class TestSmolVLM(BackboneContract):
    backbone = "smolvlm"

    def load(self) -> tuple[Any, Any]:
        model, processor, _ = load_base("smolvlm", dtype="float32", device="cpu")
        return model, processor
