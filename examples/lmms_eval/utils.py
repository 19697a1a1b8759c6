"""How lmms-eval reads rows that LLaVA would train on; images are beside the file that the task names."""

from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path("data")


def visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(FOLDER / doc["image"]).convert("RGB")]


def text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return str(doc["conversations"][0]["value"]).removeprefix("<image>\n")


def target(doc: dict[str, Any]) -> str:
    return str(doc["conversations"][1]["value"])


def results(doc: dict[str, Any], found: list[str]) -> dict[str, float]:
    return {"exact": float(found[0].strip() == target(doc))}
