"""docs/plugins has a page for every hook; each page's package is installed as it stands and put to use as it says."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vismem_cli import main
from vismem_core import plugins
from vismem_core.plugins import KINDS, Entry

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "plugins"
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (my_package/\w+\.py)\n")


def blocks(kind: str) -> list[tuple[str, str]]:
    return BLOCK.findall((PAGES / f"{kind}.md").read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where packages can be installed: found from now on, forgotten afterwards."""
    monkeypatch.delenv("VISMEM_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    plugins.installed.cache_clear()
    yield tmp_path
    plugins.installed.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def install(kind: str, place: Path) -> None:
    """The page's files, and what an installer would write beside them."""
    (place / "my_package").mkdir()
    for language, text in blocks(kind):
        if language == "python" and (named := FILE.match(text)):
            (place / named[1]).write_text(text, encoding="utf-8")
    info = place / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vismem]\nmine = my_package.plugin\n")


def use(kind: str) -> None:
    """The page's other blocks, in order."""
    for language, text in blocks(kind):
        if language == "sh":
            for line in text.splitlines():
                program, *words = shlex.split(line)
                assert program == "vismem"
                with pytest.raises(SystemExit) as end:
                    main(words)
                assert not end.value.code, line
        elif not FILE.match(text):
            exec(compile(text, f"{kind}.md", "exec"), {})


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_has_a_page_whose_example_works(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(kind, place)
    (status,) = [own for own in plugins.status() if own.name == "mine"]
    assert status.error is None
    asked: list[tuple[str, str]] = []
    load = Entry.load
    monkeypatch.setattr(Entry, "load", lambda entry: asked.append((entry.plugin, entry.kind)) or load(entry))
    use(kind)
    assert ("mine", kind) in asked, f"the page registers with register_{kind} and puts it to no use"


def test_the_index_lists_every_hook_and_no_other() -> None:
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"\[register_(\w+)\]\((\w+)\.md\)", index)) == sorted((kind, kind) for kind in KINDS)
    assert {path.stem for path in PAGES.glob("*.md")} == {*KINDS, "index"}
