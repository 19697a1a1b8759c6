"""Who may know whom: the packages of this repository, by the imports in every file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "vismem_core": ROOT / "vismem_core",
    "vismem_backbones": ROOT / "backbones" / "vismem_backbones",
    "vismem_plugins": ROOT / "plugins" / "vismem_plugins",
    "vismem_cli": ROOT / "cli" / "vismem_cli",
}


def imports(path: Path) -> Iterator[str]:
    """Top-level names of the packages a file imports, wherever in the file; relative imports stay inside."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_the_core(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    forbidden = set(PACKAGES) - {package, "vismem_core"}
    assert files
    assert {str(path): found for path in files if (found := forbidden & set(imports(path)))} == {}


@pytest.mark.parametrize("folder", ["backbones", "plugins", "cli"])
def test_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def words(path: Path) -> Iterator[str]:
    """Names, attributes and texts in a file's code; docstrings may say what they like."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) not in docstrings:
            fields = (getattr(node, field, None) for field in ("id", "name", "module", "attr", "value"))
            yield from (value.lower() for value in fields if isinstance(value, str))


def test_the_core_names_no_family_of_models() -> None:
    families = ("qwen", "llava", "internvl")
    for path in sorted((ROOT / "vismem_core").rglob("*.py")):
        assert [word for word in words(path) if any(family in word for family in families)] == [], path


ROOMS = (
    "ground",
    "config",
    "base",
    "files",
    "memory",
    "decoding",
    "answers",
    "training",
    "experiments",
    "showing",
    "serving",
    "testing",
)
"""Of the core, from the ground up: a room imports only lower ones."""


def modules() -> dict[str, Path]:
    """The core's modules by dotted name."""
    core = ROOT / "vismem_core"
    found = {}
    for path in sorted(core.rglob("*.py")):
        parts = ("vismem_core", *path.relative_to(core).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "ground"


def known(module: str, known: dict[str, Path]) -> Iterator[str]:
    """The core's modules that one imports, wherever in its file and for whatever."""
    package = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                if (own := f"{source}.{alias.name}") in known:
                    yield own
                elif source in known:
                    yield source


def test_every_room_imports_only_lower_ones() -> None:
    """Imports for types alone, and those inside functions, count too."""
    found = modules()
    assert {room(name) for name in found} == set(ROOMS)
    wrong = [
        f"{name} imports {other}"
        for name in found
        if name != "vismem_core"  # it names what is public, and imports it when it is asked for
        for other in known(name, found)
        if ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    found = modules()
    edges = {name: {own for own in known(name, found) if own not in (name, "vismem_core")} for name in found}
    del edges["vismem_core"]
    while leaves := {name for name, others in edges.items() if not others & edges.keys()}:
        for name in leaves:
            del edges[name]
    assert edges == {}
