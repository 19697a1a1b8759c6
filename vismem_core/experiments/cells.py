"""Cells: one thing trained, or one row's questions answered, under one seed; each in a process of its own.

What a cell found lies in a folder that is named by all that it depends on, so that it is never done twice, and a run
that was killed goes on with what is left.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vismem_core import plugins
from vismem_core.answers.evaluation import pick, swapped
from vismem_core.answers.inference import Answer, answers
from vismem_core.answers.metric import parse
from vismem_core.base.embedded import embedded
from vismem_core.base.loading import backbone_of, load_base
from vismem_core.config import Config, load
from vismem_core.decoding.attach import attach
from vismem_core.errors import DataError
from vismem_core.files.checkpoint import ABOUT, atomically
from vismem_core.files.samples import Dataset, Sample, open_dataset
from vismem_core.memory.memory import Memory
from vismem_core.training.run import train

from . import rivals
from .recipe import Data, Recipe, Row, Trained, digest

RESULT = "result.json"


@dataclass(frozen=True)
class Base:
    """What an experiment is run on.

    Attributes:
        model: hub id or folder; "" for the model embedded for the backbone.
        train, heldout: data in place of the recipe's, for a model of one's own.
        config: a YAML file with settings that suit it; "" takes those of the embedded model.
    """

    backbone: str
    model: str = ""
    train: str = ""
    heldout: str = ""
    config: str = ""
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        chain: what is trained for it, in order; the last is its own.
        row: the row that is asked, or None where the cell only trains.
    """

    base: Base
    recipe: Recipe
    chain: tuple[Trained, ...]
    row: Row | None
    seed: int

    @cached_property
    def key(self) -> str:
        """A digest of all that the result depends on; names of rows and of what is trained are none of it."""
        base = replace(self.base, backbone=self.backbone)
        seed = self.seed if self.chain else 0  # the base alone has none
        told: dict[str, Any] = {"base": asdict(base), "seed": seed, "vismem": version("vismem")}
        told["chain"] = [asdict(replace(own, name="", after="", data=self._data(own.data))) for own in self.chain]
        if self.row is not None:
            row = replace(self.row, name="", of="", x=None, series="", data=self._data(self.row.data))
            asked = self.recipe
            told |= {"row": asdict(row), "asked": [asked.per_type, asked.max_new_tokens, asked.metric]}
        if self.base.model == "":
            told["model"] = _weights(self.backbone)
        named = (self.base.model, self.base.train, self.base.heldout, self.base.config)
        if held := [stamp(Path(own)) for own in named if own and Path(own).exists()]:
            told["files"] = held
        return digest(told)

    @property
    def backbone(self) -> str:
        """The family that the cell is about."""
        own = self.row.backbone if self.row else ""
        return own or next((part.backbone for part in self.chain if part.backbone), "") or self.base.backbone

    @property
    def title(self) -> str:
        """For people: what is done."""
        what = f"ask {self.row.name}" if self.row else f"train {self.chain[-1].name}"
        return f"{what}, seed {self.seed}"

    @property
    def needs(self) -> Cell | None:
        """The cell that must be done before it."""
        if self.row is not None:
            return replace(self, row=None) if self.chain else None
        return replace(self, chain=self.chain[:-1]) if len(self.chain) > 1 else None

    def _data(self, own: Data) -> Data:
        return own if own.name else self.recipe.data

    def samples(self, own: Data, split: Any) -> Dataset:
        """The data that a part names, or the recipe's, or what it is replaced by."""
        instead = self.base.train if split == "train" else self.base.heldout
        if instead and not own.name:
            return open_dataset(instead, split)
        data = self._data(own)
        if not data.arguments:
            return open_dataset(data.name, split)
        made = plugins.registry("datasets").get(data.name)(split, **data.arguments)
        return Dataset(made, groups=getattr(made, "groups", None), source=data.name)

    def config(self, own: Trained) -> Config:
        """The settings of a training."""
        suited = self.base.config or (None if self.base.model else embedded(self.backbone)[1].settings)
        told = [f"{key}={value}" for key, value in own.settings.items()]
        return load(Path(suited) if suited else None, [*told, f"train.seed={self.seed}", "train.eval_samples=1"])


def cells(recipe: Recipe, base: Base) -> list[Cell]:
    """All cells of a recipe, each after the one that it needs; what does not hang on a seed is done once."""
    found: dict[str, Cell] = {}
    for seed in recipe.seeds:
        for row in recipe.rows.values():
            cell: Cell | None = Cell(base, recipe, tuple(recipe.lineage(row.of)) if row.of else (), row, seed)
            line = []
            while cell is not None:
                line.append(cell)
                cell = cell.needs
            found |= {own.key: own for own in reversed(line) if own.key not in found}
    return list(found.values())


def of(recipe: Recipe, base: Base, row: Row, seed: int) -> Cell:
    """The cell of a row."""
    return Cell(base, recipe, tuple(recipe.lineage(row.of)) if row.of else (), row, seed)


def check(cells: Sequence[Cell]) -> None:
    """Open what cells are about, before hours are spent on the first ones.

    Raises:
        VismemError: a model that is not there, data or settings that are of no use.
    """
    for model, backbone in {(cell.base.model, cell.backbone) for cell in cells}:
        if model:
            backbone_of(model)
        else:
            embedded(backbone)
    asked: dict[str, tuple[Cell, Data, str]] = {}
    for cell in cells:
        parts = [(own.data, "train") for own in cell.chain] + ([(cell.row.data, "heldout")] if cell.row else [])
        asked |= {repr((cell._data(data), split)): (cell, data, split) for data, split in parts}
    for cell, data, split in asked.values():
        cell.samples(data, split)
    trained = {(one.backbone, repr(own.settings)): (one, own) for one in cells for own in one.chain}
    for cell, own in trained.values():
        cell.config(own)


def kept(cell: Cell, place: Path) -> bool:
    """Whether what a cell trained is there; its result alone tells what that took."""
    trained = "lora/adapter_config.json" if cell.chain[-1].method == "lora" else f"memory/{ABOUT}"
    return result(cell, place) is not None and (place / cell.key / trained).exists()


def run(cell: Cell, place: Path) -> None:
    """Do a cell; what it found is in ``place / key``, its ``result.json`` last.

    Args:
        place: where the cells of all experiments are.
    """
    folder, before = place / cell.key, cell.needs
    folder.mkdir(parents=True, exist_ok=True)
    began, clock = time.perf_counter(), time.process_time()
    stood = place / before.key if before else None
    told = _train(cell, folder, stood) if cell.row is None else _ask(cell, cell.row, stood)
    told |= {"title": cell.title, "seconds": time.perf_counter() - began, "cpu": time.process_time() - clock}
    text = json.dumps(told, sort_keys=True) + "\n"
    atomically(folder / RESULT, lambda path: path.write_text(text, encoding="utf-8"))


def _train(cell: Cell, folder: Path, before: Path | None) -> dict[str, Any]:
    own = cell.chain[-1]
    config, data = cell.config(own), cell.samples(own.data, "train")
    model, processor, name = _open(cell)
    if own.method == "lora":
        return rivals.train(model, processor, name, config, data, folder, before)
    source = before / "memory" if before else None
    memory = attach(model, processor, source, config=config.memory, backbone=name, seed=cell.seed)
    try:
        trained = folder / "memory"
        resume = (trained / "config.json").exists()
        heldout = cell.samples(own.data, "heldout")
        train(memory, data, heldout, config, trained, resume=resume, console=Console(quiet=True))
        return {"parameters": sum(tensor.numel() for tensor in memory.trained().values()), "resumed": resume}
    finally:
        memory.detach()


def _ask(cell: Cell, row: Row, stood: Path | None) -> dict[str, Any]:
    data = cell.samples(row.data, "heldout")
    chosen = pick(data, cell.recipe.per_type)
    asked = swapped(chosen) if row.blind else chosen
    model, processor, name = _open(cell)
    adapted = bool(cell.chain) and cell.chain[-1].method == "lora"
    if adapted and stood is not None:
        model = rivals.load(model, stood)
    source = None if stood is None or adapted else stood / "memory"
    memory = attach(model, processor, source, backbone=name)
    try:
        return _answers(cell, row, memory, asked, off=source is None) | {"groups": data.groups or {}}
    finally:
        memory.detach()
        if adapted:
            _opened.cache_clear()


def _answers(cell: Cell, row: Row, memory: Memory, asked: dict[str, list[Sample]], off: bool) -> dict[str, Any]:
    """Scores by type of question, with where and how much was written."""
    if row.drop_images:
        memory.config = replace(memory.config, drop_image_after_invocation=True)
    flat = [sample for own in asked.values() for sample in own]
    if not flat:
        raise DataError("there is nothing to ask")
    ask: dict[str, Any] = {
        "max_new_tokens": cell.recipe.max_new_tokens,
        "batch": 50,
        "trigger": None if off else row.trigger or None,
    }
    with ExitStack() as stack:
        if off:
            stack.enter_context(memory.off())
        if row.replaced:
            stack.enter_context(memory.replaced(row.replaced))
        clock = time.process_time()
        told = list(answers(memory, flat, **ask))
        spent = time.process_time() - clock
    scores = parse(cell.recipe.metric)([own.text for own in told], flat)
    by_type: dict[str, list[float]] = {}
    for sample, score in zip(flat, scores, strict=True):
        by_type.setdefault(sample.type or "all", []).append(float(score))
    return {
        "scores": {kind: packed(own) for kind, own in by_type.items()},
        "tokens": [own.tokens for own in told],
        "invocations": _places(told, [sample.type or "all" for sample in flat]),
        "answering": spent,
    }


def _places(told: Sequence[Answer], types: Sequence[str]) -> list[list[Any]]:
    """Every invocation: its question's number and type, its kind, and where in the answer it stands, from 0 to 1."""
    return [
        [number, kind, place.kind, round(place.position / max(1, answer.tokens), 3)]
        for number, (answer, kind) in enumerate(zip(told, types, strict=True))
        for place in answer.invocations
    ]


def packed(scores: Sequence[float]) -> str | list[float]:
    """Scores as a text of zeros and ones where they are no more than that."""
    if all(own in (0.0, 1.0) for own in scores):
        return "".join(str(int(own)) for own in scores)
    return [round(own, 4) for own in scores]


def unpacked(scores: str | Sequence[float]) -> list[float]:
    """What :func:`packed` was given."""
    return [float(own) for own in scores]


def result(cell: Cell, place: Path) -> dict[str, Any] | None:
    """What a cell found, if it is done."""
    path = place / cell.key / RESULT
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return told
    except (OSError, ValueError):
        return None


def _open(cell: Cell) -> tuple[Any, Any, str]:
    base = cell.base
    return _opened(cell.backbone, base.model, base.dtype, base.device)


@lru_cache(maxsize=1)  # a process does one cell after the other, mostly of one base; what is attached is taken off
def _opened(backbone: str, model: str, dtype: str, device: str) -> tuple[Any, Any, str]:
    torch.manual_seed(0)
    return load_base(backbone or None, model or None, dtype=dtype, device=device)


def stamp(path: Path) -> str:
    """What tells a file from one of the same name: what it holds; of a folder, the names and sizes of its files."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return digest([(own.name, own.stat().st_size) for own in sorted(path.iterdir()) if own.is_file()])


@lru_cache
def _weights(backbone: str) -> str:
    return stamp(embedded(backbone)[1].model)
