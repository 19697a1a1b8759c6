"""Typed, frozen settings: limits in annotations, values from YAML files and ``key=value`` texts."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from vismem_core.errors import ConfigError, nearest

SectionT = TypeVar("SectionT", bound="Section")
Place = Callable[[str], str]
"""From a dotted key to where it was set, such as ``"run.yaml:7: "``."""

NAMES: dict[object, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Smallest and largest value allowed, both inclusive."""

    low: float
    high: float = math.inf

    def check(self, value: float, label: str) -> None:
        if not self.low <= value <= self.high:
            bound = f"at least {self.low:g}" if self.high == math.inf else f"from {self.low:g} to {self.high:g}"
            raise ConfigError(f"{label} must be {bound}, not {value!r}")


Positive = Annotated[int, Limits(1)]
Count = Annotated[int, Limits(0)]
Amount = Annotated[float, Limits(0)]
Share = Annotated[float, Limits(0, 1)]


@dataclasses.dataclass(frozen=True)
class Section:
    """Base of all settings. The limits in a field's annotation hold however an instance is made."""

    def __post_init__(self) -> None:
        for name, hint in hints(type(self)).items():
            for limits in hint.__metadata__ if get_origin(hint) is Annotated else ():
                limits.check(getattr(self, name), name)


def hints(section: type) -> dict[str, Any]:
    """The annotation of each field, limits included."""
    return get_type_hints(section, include_extras=True)


def keys(section: Section, path: str = "") -> Iterator[str]:
    """Every key below a section, dotted, sections before what they hold."""
    for name in hints(type(section)):
        yield f"{path}{name}"
        if isinstance(value := getattr(section, name), Section):
            yield from keys(value, f"{path}{name}.")


def merge(current: SectionT, data: object, place: Place = lambda key: "") -> SectionT:
    """A copy of ``current`` with the values of ``data``, nested mappings as read from YAML or JSON.

    Raises:
        ConfigError: an unknown key, or a value of another type or outside its limits.
    """
    return _merge(current, data, place, "", tuple(keys(current)))


def _merge(current: SectionT, data: object, place: Place, path: str, known: tuple[str, ...]) -> SectionT:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{place(path)}{path or 'settings'}: expected a section of keys, got {_shown(data)}")
    fields = hints(type(current))
    values: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in fields:
            raise ConfigError(f"{place(name)}unknown key {name!r}; {_suggestion(name, known)}")
        old = getattr(current, key)
        if isinstance(old, Section):
            values[key] = _merge(old, value, place, name, known)
        else:
            values[key] = coerce(fields[key], value, f"{place(name)}{name}")
    return dataclasses.replace(current, **values)


def _suggestion(name: str, known: tuple[str, ...]) -> str:
    """The nearest known key; the same last part elsewhere counts as nearest (``lr`` -> ``train.formation.lr``)."""
    last = name.rpartition(".")[2]
    same = [key for key in known if key.rpartition(".")[2] == last]
    return f"did you mean {same[0]!r}?" if same else nearest(name, known)


def coerce(hint: Any, value: object, label: str) -> Any:
    """``value`` as the type of an annotation: bool, int, float, str, Literal, tuple, optional, with limits.

    Whole numbers pass as floats, and so do texts such as ``5e-5``, which YAML 1.1 does not read as numbers.

    Raises:
        ConfigError: any other type; it starts with ``label`` and says what was expected and what came.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        plain = coerce(args[0], value, label)
        for limits in args[1:]:
            limits.check(plain, label)
        return plain
    if origin in (Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        return None if value is None else coerce(inner[0], value, label)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(coerce(args[0], item, f"{label}[{index}]") for index, item in enumerate(value))
    if origin is Literal and value in args:
        return value
    if hint is float and (number := _number(value)) is not None:
        return number
    if hint is not float and type(value) is hint:
        return value
    raise ConfigError(f"{label}: expected {_expected(hint)}, got {_shown(value)}")


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list, each {_expected(get_args(hint)[0])}"
    return NAMES.get(hint, str(hint))


def _shown(value: object) -> str:
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "nothing"}
    return f"{value!r} ({names.get(type(value), 'list' if isinstance(value, list) else 'section')})"


def read_yaml(path: Path) -> tuple[object, Place]:
    """The content of a YAML file and where each of its keys stands.

    Raises:
        ConfigError: a file that cannot be read, is no YAML, or sets a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    lines: dict[str, int] = {}
    for key, line_number in _lines(node):
        if key in lines:
            raise ConfigError(f"{path}:{line_number}: {key} is set twice, first on line {lines[key]}")
        lines[key] = line_number
    return content, lambda key: f"{path}:{lines[key]}: " if key in lines else f"{path}: "


def _lines(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{path}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{path}{key.value}.")


def read_override(text: str) -> tuple[object, Place]:
    """``"a.b=1"`` as ``{"a": {"b": 1}}``, the value being YAML, and where that stands: the text itself.

    Raises:
        ConfigError: no ``=`` or no key before it, or a value that is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r}: expected key=value, such as train.seed=1")
    try:
        data: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r}: the value is not YAML; put it in quotes") from error
    for part in reversed(key.strip().split(".")):
        data = {part: data}
    return data, lambda key: f"{text!r}: "
