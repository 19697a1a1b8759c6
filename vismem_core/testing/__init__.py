"""A conformance suite for backbones: subclass :class:`BackboneContract` in a test file of your own and run pytest.

    from vismem_core.testing import BackboneContract, liven

    class TestMine(BackboneContract):
        backbone = "mine"

        def load(self):
            torch.manual_seed(0)
            model = MyModel(MyConfig(...)).eval()  # two layers in each tower, fp32
            liven(model)
            return model, my_processor()

Each test holds one contract; its failure begins with that contract and says where it is described. The suite needs
pytest, which the rest of :mod:`vismem_core` does not.
"""

import pytest

PARTS = ("anatomy", "encoder", "unchanged", "insertion", "generation", "company", "training")
pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in PARTS))

from .anatomy import Anatomy  # noqa: E402
from .company import Company  # noqa: E402
from .encoder import Encoder  # noqa: E402
from .generation import Generation  # noqa: E402
from .insertion import Insertion  # noqa: E402
from .liveliness import liven, picture  # noqa: E402
from .training import Training  # noqa: E402
from .unchanged import Unchanged  # noqa: E402

__all__ = ["BackboneContract", "liven", "picture"]


class BackboneContract(Anatomy, Encoder, Unchanged, Insertion, Generation, Company, Training):
    """What memory needs of a backbone, and what it promises on it; subclass it with ``backbone`` and ``load``.

    ``several_images`` and ``text_only`` say what the family's prompts may hold; :meth:`questions` may be overridden
    where its processor wants other images.
    """
