"""Why a checkpoint does not load, in one line of our own: its files are looked at once loading has failed.

What the libraries that read checkpoints say runs to paragraphs, and often names the last thing they tried.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from vismem_core.errors import VismemError, cut

from . import tensor

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
MEANINGS = {
    "ignore_mismatched_sizes": f"weights have other shapes than {CONFIG} says",
    "Unrecognized configuration class": "a model of this type does not answer questions about images",
}
"""What transformers means, by words that it says."""
MISSING = re.compile(r"^(\S.*?) *\| *MISSING\b", re.MULTILINE)
LONGEST = 200
"""Characters of what a library says that a message quotes."""
FEW = 16
"""Tokens that a tokenizer without its file may have: those that the model's settings name."""


def reason(source: str, error: Exception, revision: str | None = None) -> str:
    """Why ``source``, a hub id or a folder, does not load, in one line that begins with it."""
    if isinstance(error, VismemError):
        return str(error)
    if "trust_remote_code" in str(error):
        return f"{source}: brings its own code, which would run on this machine; pass --trust-remote-code to allow it"
    if "no `tp_plan`" in str(error):
        return f"{source}: {tensor.NO_PLAN}; {tensor.INSTEAD}"
    folder = _folder(source, revision)
    if folder is None:
        if not HUB_ID.fullmatch(source):
            return f"{source}: no such folder"
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        why = "the hub is switched off (HF_HUB_OFFLINE)" if offline else "it could not be fetched from the hub"
        return f"{source}: no such folder, and {why}; name a folder that holds the checkpoint"
    return f"{source}: cannot be loaded: {fault(folder) or _said(error)}"


def fault(folder: Path) -> str:
    """What is wrong with the files of a checkpoint; empty if they look right."""
    return next(filter(None, (look(folder) for look in LOOKS)), "")


@contextmanager
def heard(source: str) -> Iterator[None]:
    """Keep what transformers logs while it loads off the terminal; weights that it made up are told in one line."""
    logger = transformers.utils.logging.get_logger()
    said: list[str] = []
    before, level = logger.handlers, logger.level
    logger.handlers = [_Listener(said)]
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers = before
        logger.setLevel(level)
    if made_up := [name for text in said for name in MISSING.findall(text)]:
        more = f" and {len(made_up) - 1} more" if made_up[1:] else ""
        warnings.warn(
            f"{source}: weights that are not in the checkpoint are random now: {made_up[0]}{more}", stacklevel=3
        )


def check_tokenizer(source: str, processor: Any) -> None:
    """Refuse a tokenizer that came without its file: transformers makes an empty one.

    Raises:
        VismemError: it knows no words.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None and len(tokenizer) < FEW:
        folder = _folder(source)
        why = (folder and _tokenizer(folder)) or "its tokenizer knows no words"
        raise VismemError(f"{source}: cannot be loaded: {why}")


class _Listener(logging.Handler):
    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _folder(source: str, revision: str | None = None) -> Path | None:
    """Where the files of a checkpoint are on this machine, if they are."""
    if Path(source).is_dir():
        return Path(source)
    try:
        found = try_to_load_from_cache(source, CONFIG, revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _texts(folder: Path) -> str:
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{path.name} is not valid JSON ({_said(error)})"
    return ""


def _config(folder: Path) -> str:
    if not (folder / CONFIG).is_file():
        return f"it has no {CONFIG}: is this the folder of a model?"
    told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    kind = told.get("model_type") if isinstance(told, dict) else None
    if not kind:
        return f"{CONFIG} names no model_type"
    if "auto_map" not in told and kind not in CONFIG_MAPPING:
        return f"transformers {transformers.__version__} knows no model type {kind!r}; a newer one may"
    return ""


def _weights(folder: Path) -> str:
    names = {path.name for path in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        listed = set(json.loads((folder / INDEX).read_text(encoding="utf-8")).get("weight_map", {}).values())
        if lost := sorted(listed - names):
            return f"{lost[0]} is missing, which {INDEX} names"
    elif not names and not any(folder.glob("*.bin")):
        return "it has no weights (model.safetensors)"
    for name in sorted(names):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{name} is damaged or cut off, {(folder / name).stat().st_size} bytes ({_said(error)})"
    return ""


def _processor(folder: Path) -> str:
    if any((folder / name).is_file() for name in PROCESSORS):
        return ""
    return f"it has no {' or '.join(PROCESSORS)}: save its processor beside the weights"


def _tokenizer(folder: Path) -> str:
    if any((folder / name).is_file() for name in TOKENIZERS):
        return ""
    return "it has no tokenizer (tokenizer.json): save its processor beside the weights"


LOOKS: tuple[Callable[[Path], str], ...] = (_texts, _config, _weights, _processor, _tokenizer)


def _said(error: Exception) -> str:
    """The first sentence of what a library says, or what it means."""
    for words, meaning in MEANINGS.items():
        if words in str(error):
            return meaning
    return cut(re.split(r"(?<=[.!?])\s", " ".join(str(error).split()), maxsplit=1)[0].rstrip("."), LONGEST)
