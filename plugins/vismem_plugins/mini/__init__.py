"""`mini`: tiny but real vision-language models, trained on `mosaic`, shipped with the package.

Each is a directory in the published layout of its family, to be loaded like any other checkpoint:

    >>> model = AutoModelForImageTextToText.from_pretrained(path())
    >>> processor = AutoProcessor.from_pretrained(path())
"""

from pathlib import Path

__all__ = ["path"]


def path(family: str = "qwen2_5_vl") -> Path:
    """The directory of the `mini` of a family.

    Raises:
        ValueError: a family that has none.
    """
    directory = Path(__file__).parent / family
    if not (directory / "config.json").is_file():
        have = ", ".join(sorted(config.parent.name for config in directory.parent.glob("*/config.json")))
        raise ValueError(f"there is no mini of {family!r}; there are: {have}")
    return directory
