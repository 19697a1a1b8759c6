"""What is public changes only with a word said about it: ``docs/api.txt`` lists names and signatures.

``python tests/core/test_api.py`` writes it anew. Where a plugin that was right before may be wrong now, API_VERSION
grows too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

LIST = Path(__file__).parents[2] / "docs" / "api.txt"
MODULES = {
    "vismem_core": None,
    "vismem_core.base.embedded": ("Base", "embedded"),
    "vismem_core.files.samples": ("Dataset", "Sample", "open_dataset"),
    "vismem_core.errors": ("AttachError", "CheckpointError", "ConfigError", "DataError", "MetricError", "PluginError",
                           "RewardError", "TrainingError", "nearest"),
    "vismem_core.answers.evaluation": ("evaluate",),
    "vismem_core.memory.former": ("Needs",),
    "vismem_core.hookspecs": None,
    "vismem_core.answers.inference": ("Answer", "answers"),
    "vismem_core.answers.likelihood": ("Likelihood", "likelihoods"),
    "vismem_core.answers.metric": ("Metric", "Scores", "parse"),
    "vismem_core.base.loading": ("load_base",),
    "vismem_core.plugins": ("registry",),
    "vismem_core.answers.reward": ("by_row", "parse", "reference", "score"),
    "vismem_core.testing": None,
    "vismem_core.memory.trigger": ("Row", "parse"),
    "vismem_core.base.vision": ("PatchIndex", "VisionStates", "attend"),
}  # fmt: skip
"""Modules whose names others may use; None stands for all that the module makes public."""


def public(module: Any) -> list[str]:
    own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return sorted(getattr(module, "__all__", None) or (name for name in own if not name.startswith("_")))


def lines(name: str, value: Any) -> Iterator[str]:
    """A name with its signature; for a class, its bases and what it and our classes above it define."""
    if not inspect.isclass(value):
        yield f"{name}{signature(value)}" if callable(value) else f"{name} = {value!r}"
        return
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield f"class {name}({bases})"
    if "__init__" in vars(value) and not getattr(value, "_is_protocol", False):
        yield f"{name}.__init__{signature(value.__init__)}"
    ours = [own for own in value.__mro__ if own.__module__.startswith("vismem_core")]
    fields = getattr(value, "__dataclass_fields__", {})  # they are in __init__
    for member in sorted({member for own in ours for member in vars(own)} - set(fields)):
        if member == "__call__" or not member.startswith("_"):
            yield f"{name}.{described(member, inspect.getattr_static(value, member))}"
    for attribute, hint in sorted(inspect.get_annotations(value).items()):
        if attribute not in vars(value) and attribute not in fields:
            yield f"{name}.{attribute}: {hint}"


def described(name: str, member: Any) -> str:
    abstract = " abstract" if getattr(member, "__isabstractmethod__", False) else ""
    if isinstance(member, property | cached_property):
        getter: Any = member.fget if isinstance(member, property) else member.func
        return f"{name} -> {getter.__annotations__.get('return')}{abstract}"
    inner = getattr(member, "__func__", member)
    return f"{name}{signature(inner)}{abstract}" if callable(inner) else f"{name} = {inner!r}"


def signature(function: Any) -> str:
    """Without quotes, which versions of Python put in different places."""
    return str(inspect.signature(function)).replace("'", "")


def listed() -> str:
    told = []
    for name, names in MODULES.items():
        module = import_module(name)
        told.append(f"# {name}")
        for own in names or public(module):
            told += lines(own, getattr(module, own))
        told.append("")
    return "\n".join(told)


def test_nothing_public_changed_unannounced() -> None:
    before, now = LIST.read_text(encoding="utf-8").splitlines(), listed().splitlines()
    changed = [f"- {own}" for own in before if own not in now] + [f"+ {own}" for own in now if own not in before]
    assert before == now, (
        "the public interface changed; if that is meant: python tests/core/test_api.py, a line in CHANGELOG.md, and "
        "where plugins may break, a higher vismem_core.API_VERSION\n" + "\n".join(changed)
    )


def test_the_list_holds_what_plugins_are_made_of() -> None:
    told = listed()
    for own in ("API_VERSION = ", "class Backbone(ABC)", "Backbone.carry(self, extra: Tensor", "attach(model: Any",
                "MemoryFormer.forward(self, context: MemoryContext) -> Tensor abstract", "register_backbones(register",
                "QueryBuilder.forward(self, states: Tensor", "Reward.__call__(", "MemoryTokens.invocation(",
                "InjectionHook.remove(", "class BackboneContract(", "Trigger.__call__("):  # fmt: skip
        assert own in told, own


if __name__ == "__main__":
    LIST.write_text(listed(), encoding="utf-8")
