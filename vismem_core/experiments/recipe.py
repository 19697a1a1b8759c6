"""What an experiment is: things that are trained, and rows of a table that say how each of them answers.

A recipe is a YAML file (those that ship are in ``vismem_plugins/recipes``), such as

    title: Memory beside its rivals
    asks: Does memory add what a prompt of as many vectors does not?
    data: mosaic
    seeds: [0, 1, 2]
    trained:
      memory: {settings: {train.objective: sft}}
      "{n} vectors":
        for: {n: [2, 8]}
        settings: {memory.short.name: constant, memory.short.length: "{n}"}
    rows:
      base: {}
      memory: {of: memory}
      "at half of the delimiters": {of: memory, trigger: "random:0.5"}
    compare: [[memory, base]]
    quick: {seeds: [0], per_type: 2, settings: {train.formation.steps: 4}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vismem_core.errors import ConfigError, nearest
from vismem_core.plugins import registry

Part = TypeVar("Part", "Trained", "Row")
METHODS = ("memory", "lora")
FIGURES = ("bars", "lines", "stages", "invocations", "costs")


@dataclass(frozen=True)
class Data:
    """A registered data set or a file, and what a registered one is called with beside its split."""

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """One thing to train, once for each seed.

    Attributes:
        method: ``memory``, or its rival ``lora``: adapters on all linear layers of the base.
        settings: by dotted key, over those that suit the base.
        data: what it learns from; without a name the recipe's.
        after: another one, with whose end it begins.
        backbone: another than the one that the experiment is run on.
    """

    name: str
    method: str = "memory"
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    after: str = ""
    backbone: str = ""


@dataclass(frozen=True)
class Row:
    """How questions are answered: a row of the table.

    Attributes:
        of: what was trained; the base alone without.
        trigger: who invokes memory; by default the policy.
        replaced: what stands in the latents' places, see :mod:`vismem_core.memory.controls`.
        blind: another sample's image.
        drop_images: images leave the cache once memory was formed.
        data: what is asked; without a name the recipe's.
        x, series: where it stands in a plot of lines.
        backbone: as that of what it is of.
    """

    name: str
    of: str = ""
    trigger: str = ""
    replaced: str = ""
    blind: bool = False
    drop_images: bool = False
    data: Data = field(default_factory=Data)
    x: float | None = None
    series: str = ""
    backbone: str = ""


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
        asks: the question it answers, in a sentence.
        group: the group of question types that plots are about, or "" for the first.
        also: another group, or a type, that plots of stages show beside it.
        compare: pairs of rows whose difference is told with an interval.
        figure: how it is drawn: ``bars``, ``lines`` (over ``x``), ``stages`` (over ``x``, the base at 0), where
            memory is invoked (``invocations``), or accuracy against cost (``costs``).
        axis: what ``x`` is.
        quick: what a trial run has instead: ``seeds``, ``per_type``, and ``settings`` for all that is trained.
        trial: whether this is one.
    """

    name: str
    title: str
    asks: str
    trained: Mapping[str, Trained]
    rows: Mapping[str, Row]
    data: Data
    seeds: Sequence[int] = (0, 1, 2)
    per_type: int = 100
    max_new_tokens: int = 32
    metric: str = "exact"
    group: str = ""
    also: str = ""
    compare: Sequence[tuple[str, str]] = ()
    figure: str = "bars"
    axis: str = ""
    quick: Mapping[str, Any] = field(default_factory=dict)
    trial: bool = False

    def quickly(self) -> Recipe:
        """The same, too small to tell anything, to see that all of it runs."""
        settings = self.quick.get("settings", {})
        trained = {name: replace(own, settings={**own.settings, **settings}) for name, own in self.trained.items()}
        few = {key: self.quick[key] for key in ("seeds", "per_type", "max_new_tokens") if key in self.quick}
        return replace(self, trained=trained, trial=True, **few)

    def lineage(self, name: str) -> list[Trained]:
        """What is trained before it and goes into it, the first first, itself last."""
        own = self.trained[name]
        return [*(self.lineage(own.after) if own.after else []), own]


def names() -> tuple[str, ...]:
    """All registered experiments."""
    return registry("experiments").names()


def find(name: str) -> Recipe:
    """A registered experiment, or that of a YAML file.

    Raises:
        PluginError: neither a registered name nor a file.
        ConfigError: what is wrong with it, and where.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return read(path)
    told = registry("experiments").get(name)
    told = told() if callable(told) else told
    if not isinstance(told, Mapping):
        return read(told, name)
    try:
        return _recipe(name, told)
    except ConfigError as error:
        raise ConfigError(f"experiment {name!r}: {error}") from error


def read(path: Path, name: str = "") -> Recipe:
    """The recipe of a YAML file.

    Raises:
        ConfigError: what is wrong with it, and where.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    try:
        return _recipe(name or path.stem, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def digest(told: Any) -> str:
    """A name for what ``told`` says, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=vars).encode()).hexdigest()[:16]


def _recipe(name: str, content: Any) -> Recipe:
    told = dict(_known(Recipe, content, "the recipe"))
    for key in ("title", "asks", "rows"):
        if key not in told:
            raise ConfigError(f"{key!r} is missing")
    told["data"] = _data(told.get("data", {}), "data")
    trained = {own.name: own for own in _parts(Trained, told.pop("trained", None) or {}, "trained")}
    rows = {own.name: own for own in _parts(Row, told.pop("rows"), "rows")}
    for own in trained.values():
        if own.method not in METHODS:
            raise ConfigError(f"trained: {own.name}: method {own.method!r}; {nearest(own.method, METHODS)}")
        _there(own.after, trained, f"trained: {own.name}: after")
    for row in rows.values():
        _there(row.of, trained, f"rows: {row.name}: of")
    told["compare"] = [tuple(pair) for pair in told.get("compare", ())]
    for pair in told["compare"]:
        for own in pair:
            _there(own, rows, "compare")
    if (figure := told.get("figure", "bars")) not in FIGURES:
        raise ConfigError(f"figure {figure!r}; {nearest(figure, FIGURES)}")
    return Recipe(name=name, trained=trained, rows=rows, **{k: own for k, own in told.items() if k != "name"})


def _there(name: str, known: Mapping[str, Any], where: str) -> None:
    if name and name not in known:
        raise ConfigError(f"{where}: there is no {name!r}; {nearest(name, known)}")


def _known(kind: type, content: Any, where: str) -> Mapping[str, Any]:
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected keys and values, got {content!r}")
    keys = [own.name for own in fields(kind)]
    for key in content:
        if key not in keys:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), keys)}")
    return content


def _data(content: Any, where: str) -> Data:
    if isinstance(content, str):
        return Data(content)
    return Data(**_known(Data, content, where))


def _parts(kind: type[Part], content: Any, where: str) -> Iterator[Part]:
    """Named parts; one with ``for: {n: [2, 4]}`` stands for as many, with ``{n}`` in its texts."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"{where}: expected names, got {content!r}")
    for name, told in content.items():
        told = dict(told or {})
        over = told.pop("for", {})
        for values in product(*over.values()):
            filled = _filled({"name": str(name), **told}, dict(zip(over, values, strict=True)))
            own = dict(_known(kind, filled, f"{where}: {name}"))
            own["data"] = _data(own.get("data", {}), f"{where}: {name}: data")
            yield kind(**own)


def _filled(told: Any, values: Mapping[str, Any]) -> Any:
    """``told`` with values in place of their names in braces; a text that is nothing else becomes the value itself."""
    if isinstance(told, Mapping):
        return {key: _filled(own, values) for key, own in told.items()}
    if isinstance(told, list):
        return [_filled(own, values) for own in told]
    if not isinstance(told, str):
        return told
    for key, value in values.items():
        if told == f"{{{key}}}":
            return value
        told = told.replace(f"{{{key}}}", str(value))
    return told
