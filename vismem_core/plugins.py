"""Finding what others add: entry points of the group ``vismem``, read by pluggy, one plugin at a time.

Every plugin has a plugin manager of its own, so none can disturb another. A plugin stands or falls as a whole: if it
cannot be imported, was written for another version of the interface, implements an unknown hook, has a wrong
signature, raises, or takes a name that is taken, none of its registrations count, and ``status`` says why. vismem's
own plugins come by the same road, and first, so that their names cannot be taken; the others follow in the order of
their distributions' names.

The environment variable ``VISMEM_PLUGINS`` restricts what is loaded to a comma-separated list of entry points; an
empty one loads nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from vismem_core import API_VERSION, hookspecs
from vismem_core.errors import PluginError, VismemError, nearest

KINDS = tuple(name.removeprefix("register_") for name in vars(hookspecs) if name.startswith("register_"))
TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Entry:
    """One registered name and where it came from."""

    kind: str
    name: str
    target: str
    """``package.module:attribute``."""
    plugin: str
    distribution: str
    version: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """What the target names.

        Raises:
            PluginError: it cannot be imported; the message gives the reason.
        """
        try:
            return resolve(self.target)
        except Exception as error:  # whatever a plugin does wrong
            where = f"{noun(self.kind)} {self.name!r} of {self.distribution} {self.version}"
            raise PluginError(f"{where} does not load: {self.target}: {reason(error)}") from error


@dataclass(frozen=True)
class PluginStatus:
    """How loading one plugin went."""

    name: str
    distribution: str
    version: str
    error: str | None = None
    registers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names by kind."""

    @property
    def ok(self) -> bool:
        return self.error is None


class Registry:
    """All names of one kind, such as ``"formers"``."""

    def __init__(self, kind: str, entries: Iterable[Entry], broken: Iterable[str] = ()) -> None:
        self.kind = kind
        self._entries = {entry.name: entry for entry in entries}
        self._broken = tuple(broken)

    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries.values())

    def get(self, name: str) -> Any:
        """What is registered as ``name``, imported now if it was not yet.

        Raises:
            PluginError: an unknown name, or a target that does not load.
        """
        return self.entry(name).load()

    def entry(self, name: str) -> Entry:
        """How ``name`` was registered.

        Raises:
            PluginError: an unknown name; the message gives the nearest known one.
        """
        if name not in self._entries:
            broken = f"; not loaded: {', '.join(self._broken)} (see: vismem plugins)" if self._broken else ""
            raise PluginError(f"unknown {noun(self.kind)} {name!r}; {nearest(name, self._entries)}{broken}")
        return self._entries[name]


class Plugins:
    """What a set of entry points registers.

    Args:
        points: the entry points, vismem's own first.
        only: names of the entry points to load; None loads all.
    """

    def __init__(self, points: Iterable[EntryPoint], only: Iterable[str] | None = None) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self.status: list[PluginStatus] = []
        points = sorted(points, key=lambda point: (origin(point)[0] != hookspecs.PROJECT, *origin(point), point.name))
        wanted = None if only is None else set(only)
        self.status += [self._load(point) for point in points if wanted is None or point.name in wanted]
        for name in sorted((wanted or set()) - {point.name for point in points}):
            hint = nearest(name, {point.name for point in points})
            self.status.append(PluginStatus(name, "?", "?", f"named in VISMEM_PLUGINS but not installed; {hint}"))

    def registry(self, kind: str) -> Registry:
        """The registry of a kind, one of ``KINDS``."""
        if kind not in KINDS:
            raise PluginError(f"unknown registry {kind!r}; {nearest(kind, KINDS)}")
        entries = [entry for entry in self._entries.values() if entry.kind == kind]
        return Registry(kind, entries, [status.name for status in self.status if not status.ok])

    def _load(self, point: EntryPoint) -> PluginStatus:
        distribution, version = origin(point)
        try:
            entries = self._collect(point)
        except (Exception, SystemExit) as error:  # a broken plugin must not stop the others
            return PluginStatus(point.name, distribution, version, reason(error))
        self._entries |= entries
        registers = {kind: tuple(name for other, name in entries if other == kind) for kind in KINDS}
        return PluginStatus(point.name, distribution, version, None, {k: v for k, v in registers.items() if v})

    def _collect(self, point: EntryPoint) -> dict[tuple[str, str], Entry]:
        """What one plugin registers; raises whatever is wrong with it."""
        plugin = point.load()
        if (written := getattr(plugin, "VISMEM_API", API_VERSION)) != API_VERSION:
            older = "the plugin" if isinstance(written, int) and written < API_VERSION else "vismem"
            raise PluginError(
                f"{point.value} is for version {written!r} of vismem's plugin interface, and this is {API_VERSION}; "
                f"install a newer release of {older}"
            )
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        manager.register(plugin)
        implemented = [caller.name for caller in manager.get_hookcallers(plugin) or ()]
        known = [f"register_{kind}" for kind in KINDS]
        if not implemented:
            raise PluginError(f"{point.value} implements no hook; {nearest('', known)}")
        for name in set(implemented) - set(known):  # pluggy is silent about them
            raise PluginError(f"{point.value} implements an unknown hook {name!r}; {nearest(name, known)}")
        found: dict[tuple[str, str], Entry] = {}
        for kind in KINDS:
            getattr(manager.hook, f"register_{kind}")(register=self._callback(kind, point, found))
        return found

    def _callback(self, kind: str, point: EntryPoint, found: dict[tuple[str, str], Entry]) -> hookspecs.Register:
        def register(name: str, target: str, /, **facts: object) -> None:
            if not TARGET.fullmatch(target):
                raise PluginError(f"{noun(kind)} {name!r}: {target!r} is not of the form package.module:attribute")
            if taken := self._entries.get((kind, name)) or found.get((kind, name)):
                raise PluginError(f"the {noun(kind)} {name!r} is already registered by {taken.distribution}")
            found[kind, name] = Entry(kind, name, target, point.name, *origin(point), facts)

        return register


@cache
def installed() -> Plugins:
    """All plugins of this environment, loaded once; ``installed.cache_clear()`` forgets them."""
    only = os.environ.get("VISMEM_PLUGINS")
    names = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
    return Plugins(entry_points(group=hookspecs.PROJECT), names)


def registry(kind: str) -> Registry:
    """All installed names of a kind, one of ``KINDS``, such as ``"backbones"``."""
    return installed().registry(kind)


def status() -> list[PluginStatus]:
    """How loading went, plugin by plugin."""
    return installed().status


def origin(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that an entry point came with."""
    return (point.dist.name, point.dist.version) if point.dist else ("?", "?")


def resolve(target: str) -> Any:
    """What ``package.module:attribute`` names; raises whatever importing it raises."""
    module, _, attribute = target.partition(":")
    value: Any = import_module(module)
    for part in attribute.split("."):
        value = getattr(value, part)
    return value


def noun(kind: str) -> str:
    """``"query_builders"`` -> ``"query builder"``."""
    return kind.removesuffix("s").replace("_", " ")


def reason(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, VismemError) else f"{type(error).__name__}: {text}"
