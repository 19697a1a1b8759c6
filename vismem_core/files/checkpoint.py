"""Trained memory on disk: ``memory.safetensors`` and ``vismem.json``, written atomically, and a card for people."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vismem_core.base.adapters import foreign
from vismem_core.base.backbone import Backbone
from vismem_core.base.embedded import embedded
from vismem_core.base.tensor import whole, writes
from vismem_core.config import MemoryConfig, from_dict, to_dict
from vismem_core.errors import CheckpointError, VismemError
from vismem_core.plugins import registry

from . import card, hub

WEIGHTS, ABOUT = "memory.safetensors", "vismem.json"
FORMAT = 1
SHIPPED = "shipped:"
"""How the name of a shipped memory begins, as in ``shipped:qwen2_5_vl``."""
STAGED = re.compile(r"\..+\.\d+")
"""Names of files that are not in their place yet."""


def save(
    folder: Path, trained: Mapping[str, Tensor], backbone: Backbone, config: MemoryConfig, about: Mapping[str, Any]
) -> None:
    """Write a memory's trained tensors and its description. Processes that hold its base together all call it; the
    first writes.

    Args:
        trained: its tensors, by name.
        backbone, config: the base it belongs to, and its settings.
        about: more entries for ``vismem.json``, such as how it was trained.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    written: dict[str, Any] = {
        "format": FORMAT,
        "base": describe(backbone),
        "memory": to_dict(config),
        **about,
    }
    if not writes(backbone.model):
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Both are on disk before either replaces its predecessor; the description goes last and names its weights.
    with _staged(folder / ABOUT) as description, _staged(folder / WEIGHTS) as weights:
        save_file(tensors, weights)
        written["weights"] = _digest(weights)
        description.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    write_card(folder)


def write_card(folder: Path, report: Mapping[str, Any] | None = None) -> None:
    """Write or update the card of the memory in a folder. One that cannot be read stays.

    Args:
        report: on the memory; by default what lies beside it.
    """
    path = folder / card.CARD
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    try:
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        new = card.text(about, card.reported(folder) if report is None else report, old=old)
    except (CheckpointError, UnicodeDecodeError):
        return
    atomically(path, lambda place: place.write_text(new, encoding="utf-8"))


def atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside ``path`` and move it into place; what was there stays until all is on disk.

    Raises:
        OSError: the disk is full or not writable; it names ``path``.
    """
    with _staged(path) as place:
        write(place)


def sweep(folder: Path) -> None:
    """Remove what a killed program had begun to write there; nobody else may be writing."""
    for path in folder.glob(".*.*"):
        if STAGED.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    place = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        place.touch()
        mode = place.stat().st_mode  # what the user's umask allows; safetensors writes files for their owner alone
        try:
            yield place
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(errno.EIO, str(error), str(path)) from error
        with open(place, "rb") as written:
            os.fsync(written.fileno())
        place.chmod(mode)
        os.replace(place, path)
    finally:
        place.unlink(missing_ok=True)


def describe(backbone: Backbone) -> dict[str, Any]:
    """What a memory must know of its base: family, name (None for the embedded one), shape, weights' fingerprint."""
    config = backbone.model.config
    shipped = backbone.name in registry("bases").names() and str(embedded(backbone.name)[1].model)
    return {
        "backbone": backbone.name,
        "name": None if config.name_or_path == shipped else config.name_or_path,
        "revision": getattr(config, "_commit_hash", None),
        "width": backbone.width,
        "vision_width": backbone.vision_width,
        "vocabulary": int(backbone.embeddings.weight.shape[0]),
        "fingerprint": fingerprint(backbone),
    }


def fingerprint(backbone: Backbone) -> str:
    """A digest of what quantising leaves alone: norms, biases, the first rows of the embedding table.

    Weights published in bf16 have the same one in any precision: fp32 and fp16 hold their values exactly, but for the
    tiny ones that fp16 rounds, which count as zero.
    """
    own = ((name, tensor) for name, tensor in backbone.model.named_parameters() if not foreign(name))
    tensors = {name.replace(".base_layer", ""): tensor for name, tensor in own if tensor.ndim == 1}
    tensors["embeddings"] = whole(backbone.embeddings.weight)[:64]
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        rounded = whole(tensor.detach()).to("cpu", torch.bfloat16)
        rounded = rounded.where(rounded.abs() >= 2.0**-16, 0)
        digest.update(rounded.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Stored:
    """A checkpoint that fits its base, ready to be filled in."""

    config: MemoryConfig
    about: dict[str, Any]
    weights: Path

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Copy the stored tensors into a memory's. A LoRA on the policy that was not stored stays as it began.

        Raises:
            CheckpointError: if names or shapes differ.
        """
        tensors = _load(self.weights)
        if self.config.policy.trains == "rows":
            tensors |= {name: own for name, own in targets.items() if name.startswith("policy.")}
        fill(targets, tensors, self.weights)


def fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy tensors into a memory's trained ones; all of them fit, or none is copied."""
    if odd := sorted(targets.keys() ^ tensors.keys()):
        raise CheckpointError(f"{where}: does not fit this memory: {odd[0]} is only in one of the two")
    for name, target in targets.items():
        if target.shape != tensors[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}, this memory {tuple(target.shape)}"
            )
        if not tensors[name].is_floating_point() or not tensors[name].float().isfinite().all():
            raise CheckpointError(f"{where}: {name} holds NaN, infinity or no real numbers")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def read(source: str | Path, backbone: Backbone, *, any_base: bool = False, revision: str | None = None) -> Stored:
    """Find a checkpoint and check that it belongs to this base.

    Args:
        source: a folder, or a hub id.
        any_base: accept other weights of the same family and shape.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: missing, damaged, or made for another base.
    """
    folder = locate(source, revision)
    about = description(folder)
    _compare(folder, about["base"], describe(backbone), any_base=any_base)
    return Stored(_settings(folder, about), about, folder / WEIGHTS)


def settings(source: str | Path) -> MemoryConfig:
    """The settings that a memory was saved with.

    Raises:
        CheckpointError: missing or damaged.
    """
    folder = locate(source)
    return _settings(folder, description(folder))


def _settings(folder: Path, about: Mapping[str, Any]) -> MemoryConfig:
    try:
        return from_dict(MemoryConfig, about["memory"])
    except (VismemError, KeyError) as error:
        raise CheckpointError(f"{folder / ABOUT}: {error}") from error


def locate(source: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint; of a hub id, ``user/name`` or ``user/name@revision``, weights and description are
    downloaded.

    Raises:
        CheckpointError: there is none.
    """
    if str(source).startswith(SHIPPED):
        return shipped(str(source).removeprefix(SHIPPED))
    folder = Path(source)
    if folder.is_dir():
        return folder
    repo, _, own = str(source).partition("@")
    if isinstance(source, Path) or repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such folder")
    return hub.fetch(repo, (WEIGHTS, ABOUT), revision or own or None)


def shipped(backbone: str | None = None) -> Path:
    """The folder of the memory that ships with a backbone's embedded model, by default the first one's.

    Raises:
        CheckpointError: none does.
        PluginError: there is no such backbone, or it has no embedded model.
    """
    name, base = embedded(backbone or None)
    if base.memory is None:
        raise CheckpointError(f"no trained memory ships with {name}; train one (vismem train), then --memory DIR")
    return base.memory


def description(folder: Path) -> dict[str, Any]:
    """What ``vismem.json`` says, after a check that it belongs to the weights beside it.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    for name in (ABOUT, WEIGHTS):
        if not (folder / name).is_file():
            unfinished = (folder / "config.json").is_file() and (folder / "run.json").is_file()
            why = "the run in it is not finished: --resume it" if unfinished else f"{name} is missing"
            raise CheckpointError(f"{folder}: holds no memory ({why})")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / ABOUT}: not valid JSON ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        raise CheckpointError(f"{folder / ABOUT}: format {found!r}, this version reads {FORMAT}")
    base = about.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("backbone"), str) or _strange(base.get("name")):
        raise CheckpointError(f"{folder / ABOUT}: does not say which base it is for: damaged")
    if not isinstance(about.get("memory"), dict):
        raise CheckpointError(f"{folder / ABOUT}: does not say its memory's settings: damaged")
    if about.get("weights") != _digest(folder / WEIGHTS):
        raise CheckpointError(f"{folder}: {WEIGHTS} is not the file that {ABOUT} describes: damaged or mixed up")
    return about


def _strange(name: object) -> bool:
    return name is not None and not isinstance(name, str)


def _compare(folder: Path, stored: Mapping[str, Any], found: Mapping[str, Any], *, any_base: bool) -> None:
    name = stored.get("name") or "the embedded base"
    for key, what in (
        ("backbone", "backbone"),
        ("width", "language model width"),
        ("vision_width", "vision encoder width"),
        ("vocabulary", "vocabulary"),
    ):
        if stored.get(key) != found[key]:
            raise CheckpointError(f"{folder}: made for {what} {stored.get(key)} ({name}), this model has {found[key]}")
    if stored.get("fingerprint") != found["fingerprint"] and not any_base:
        raise CheckpointError(
            f"{folder}: made for {name}, whose weights differ from this model's; "
            "pass any_base=True (--any-base) to load it all the same"
        )


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def base_of(source: str | Path) -> tuple[str, str | None]:
    """The backbone and the model that a trained memory was made for; None is the backbone's embedded model.

    A model recorded as a directory that this machine does not have is taken to be the embedded one: whether the
    memory fits it is checked when it is attached.

    Raises:
        CheckpointError: ``source`` is no folder or hub id of a memory.
    """
    recorded = description(locate(source))["base"]
    name = recorded.get("name")
    lost = not name or (Path(name).is_absolute() and not Path(name).is_dir())
    return recorded["backbone"], None if lost else name
