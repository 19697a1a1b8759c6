"""What the README, the site's pages and mkdocs.yml say of each other and of the program is so; nothing is run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

from vismem_cli.app import OWN, own_command
from vismem_cli.program import USAGE
from vismem_core.config import Config, to_dict

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
TOLD = [README, ROOT / "CONTRIBUTING.md", *PAGES]
COMMANDS: dict[str, Any] = {name: own_command(name) for name in OWN}
BLOCK = re.compile(r"^```(?:sh|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`(vismem [a-z]+[^`]*)`")


def hooks() -> Any:
    spec = spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = hooks()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", TOLD, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    places = {link: (page.parent / link).resolve() for link in links if "://" not in link}
    assert [link for link, place in places.items() if not place.exists()] == []
    if page in PAGES:  # on the site nothing else is there
        assert [link for link, place in places.items() if not (place.is_file() and place.is_relative_to(DOCS))] == []


def test_every_page_is_in_the_nav() -> None:
    def listed(nav: Any) -> Iterator[str]:
        if isinstance(nav, str):
            yield nav
        for own in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
            yield from listed(own)

    nav = list(listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(nav) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def shown(page: Path) -> Iterator[list[str]]:
    """The arguments of ``vismem`` in each command of a page's blocks."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"vismem |.* -m vismem_cli ", line):
                words = shlex.split(line, comments=True)
                yield words[1 if words[0] == "vismem" else words.index("vismem_cli") + 1 :]


def command(words: list[str], page: Path) -> Any:
    """The command that words begin with; None for one that is a page's own plugin's."""
    found = COMMANDS.get(words[0])
    assert found or page.parent.name == "plugins", f"there is no command {words[0]!r}"
    return found


@pytest.mark.parametrize("page", TOLD, ids=name)
def test_commands_take_the_options_that_pages_show(page: Path) -> None:
    for words in shown(page):
        if own := command(words, page):
            try:
                own.make_context(words[0], words[1:]).close()
            except USAGE as error:
                pytest.fail(f"vismem {shlex.join(words)}: {error}")
    for text in INLINE.findall(page.read_text(encoding="utf-8")):
        words = text.split()[1:]
        if own := command(words, page):
            known = {"--help", *(option for parameter in own.params for option in parameter.opts)}
            options = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert options <= known, text


def test_pages_get_what_they_ask_for() -> None:
    told = "\n".join(HOOKS.generated(page.read_text(encoding="utf-8")) for page in PAGES)
    assert "<!-- generated" not in told

    def keys(settings: Any, path: str = "") -> Iterator[str]:
        for key, value in settings.items():
            yield from keys(value, f"{path}{key}.") if isinstance(value, dict) else [path + key]

    wanted = [f"| <code>{key}</code> | " for key in keys(to_dict(Config()))]
    wanted += [f"## vismem {own}\n" for own in COMMANDS]
    wanted += [f"<code>{option}" for own in COMMANDS.values() for one in own.params for option in one.opts[-1:]
               if one.param_type_name == "option"]  # fmt: skip
    wanted += [f"::: {own}\n" for names in HOOKS.public().values() for own in names]
    assert [own for own in wanted if own not in told + "\n"] == []
    assert "<code>--model ID&#124;DIR</code>" in told
    assert "| <code>train.grpo.alpha</code> | <code>0.3</code> | Stage II: weight of p_type + p_neg (Eq. 8). |" in told


def test_pages_that_load_from_other_hosts_are_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "fine.html").write_text('<a href="https://a.org">x</a><img src="../b.png"><script src="c.js"></script>')
    assert list(HOOKS.loaded_from_abroad(tmp_path)) == []
    (tmp_path / "in" / "bad.html").write_text('<script src="//cdn.org/d.js"></script><link href="https://e.org/f.css">')
    (tmp_path / "in" / "bad.css").write_text("@import url('https://g.org/h.css')")
    found = list(HOOKS.loaded_from_abroad(tmp_path))
    assert found == ["in/bad.html: //cdn.org/d.js", "in/bad.html: https://e.org/f.css", "in/bad.css: a style sheet"]


def test_the_pages_count_the_model_types_alike() -> None:
    told = (DOCS / "model_types.md").read_text(encoding="utf-8")
    (passing,) = re.findall(r"types: (\d+) passes", told)
    generic = sum("| generic | passes |" in line for line in told.splitlines())
    assert f"[{passing} types of model](model_types.md)" in (DOCS / "index.md").read_text(encoding="utf-8")
    for page in (README, DOCS / "attach.md"):
        assert f" {generic} further" in " ".join(page.read_text(encoding="utf-8").split())


def test_notebooks_hold_no_outputs() -> None:
    found = sorted(DOCS.rglob("*.ipynb"))
    assert found
    for path in found:
        assert not any(own.get("outputs") for own in json.loads(path.read_text(encoding="utf-8"))["cells"]), path.name


def test_ci_builds_the_site() -> None:
    assert "mkdocs build --strict" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
