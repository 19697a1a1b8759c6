"""``vismem doctor``: what is installed here, what loads and what does not, for reports of faults."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import typer
from rich.text import Text

from vismem_core import plugins
from vismem_core.errors import VismemError
from vismem_core.plugins import reason

from .console import err, print_json, print_table
from .options import Json

EXAMPLE = "Example: vismem doctor --json > report.json"
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "pyarrow": "pyarrow"}
"""Packages whose modules have other names."""
OPTIONAL = (
    "bitsandbytes",
    "datasets",
    "gradio",
    "math-verify",
    "matplotlib",
    "pycocoevalcap",
    "rouge-score",
    "sacrebleu",
    "trl",
)
SETTINGS = ("CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "VISMEM_PLUGINS")
"""Of the environment; none of them is a secret."""


def doctor(as_json: Json = False) -> None:
    """Say what is installed here, what loads and what does not. Exits with 1 if something that is needed is broken."""
    with err.status("looking"):
        packages = list(_packages())
        registered = list(_registered())
        told = {
            "vismem": version("vismem"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "executable": sys.executable,
            "devices": _devices(),
            "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
            "packages": packages,
            "plugins": registered,
        }
    broken = [own["name"] for own in packages if own["needed"] and own["error"]]
    broken += [own["name"] for own in registered if own["error"]]
    if as_json:
        print_json(told | {"broken": broken})
    else:
        _show(told)
    if broken:
        raise typer.Exit(1)


def _packages() -> Iterator[dict[str, Any]]:
    """Every package that vismem needs, then those it can do without, each with what importing it brings."""
    needed = [line.split(";")[0] for line in requires("vismem") or () if "extra ==" not in line]
    names = [line[: next((at for at, char in enumerate(line) if char in "<>=!~ ["), len(line))] for line in needed]
    for name in [*names, *OPTIONAL]:
        found, error = "", ""
        try:
            found = version(name)
            importlib.import_module(MODULES.get(name, name.replace("-", "_")))
        except PackageNotFoundError:
            error = "not installed"
        except Exception as broken:  # whatever a package's import may raise
            error = reason(broken)
        yield {"name": name, "version": found, "needed": name in names, "error": error}


def _registered() -> Iterator[dict[str, Any]]:
    """Plugins that did not load, and registered names that cannot be imported; then how many of each kind can."""
    for one in plugins.status():
        if not one.ok:
            yield {"name": one.name, "kind": "plugin", "error": str(one.error)}
    for kind in plugins.KINDS:
        good = 0
        for entry in plugins.registry(kind).entries():
            try:
                entry.load()
                good += 1
            except VismemError as error:
                yield {"name": entry.name, "kind": plugins.noun(kind), "error": str(error)}
        yield {"name": kind.replace("_", " "), "kind": "loaded", "error": "", "count": good}


def _devices() -> list[str]:
    import torch

    threads = torch.get_num_threads()
    found = [f"cpu: {os.cpu_count()} cores, {threads} {'thread' if threads == 1 else 'threads'}"]
    for at in range(torch.cuda.device_count()):
        own = torch.cuda.get_device_properties(at)
        found.append(f"cuda:{at}: {own.name}, {own.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _show(told: dict[str, Any]) -> None:
    rows = [(name, told[name]) for name in ("vismem", "python", "platform", "executable")]
    rows += [("device", own) for own in told["devices"]]
    rows += [("setting", f"{name}={value}") for name, value in told["settings"].items()]
    print_table("Here", ("", ""), rows)
    print_table("\nPackages", ("package", "version", ""), [_package(own) for own in told["packages"]])
    rows = []
    for own in told["plugins"]:
        state = Text(own["error"], style="red") if own["error"] else Text(f"{own['count']} load", style="green")
        rows.append((own["name"] if own["error"] == "" else f"{own['kind']} {own['name']}", state))
    print_table("\nPlugins", ("what", ""), rows)


def _package(own: dict[str, Any]) -> tuple[str, str, Text]:
    if not own["error"]:
        return own["name"], own["version"], Text("")
    if own["needed"]:
        return own["name"], own["version"], Text(own["error"], style="red")
    return own["name"], own["version"], Text(f"{own['error']} (optional)", style="dim")
