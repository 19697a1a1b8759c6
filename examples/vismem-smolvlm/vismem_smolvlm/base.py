"""What ``vismem train --backbone smolvlm`` works on when no model is named."""

from pathlib import Path

from vismem_core.base.embedded import Base


def tiny() -> Base:
    """A model of two layers in each tower with random weights; ``make_tiny.py`` made it. It knows nothing."""
    return Base(model=Path(__file__).parent / "tiny", dataset="mosaic")
