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
