"""What the site's pages hold beyond what is written in them: commands, settings, public names and notebooks.

A page asks with a line ``<!-- generated: KIND ARGUMENT... -->``, of which a code host shows nothing; mkdocs calls the
functions named ``on_...``. Everything comes from where it is kept, so a page cannot fall behind the code.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from html import escape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

from vismem_cli.app import OWN, own_command
from vismem_core.config import Config, schema

DOCS = Path(__file__).parent
GENERATED = re.compile(r"^<!-- generated: (\w+)((?: \S+)*) -->$", re.MULTILINE)
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<)")
LOADING = ("src", "href", "srcset", "poster", "data")
"""Attributes by which a page loads something; of a link to follow, ``<a href>``, that is not so."""
ABROAD = re.compile(r"(?:https?:)?//", re.IGNORECASE)
ABROAD_IN_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", re.IGNORECASE)


def on_page_markdown(markdown: str, **told: Any) -> str:
    """The page with what it asks for in its place."""
    return generated(markdown)


def on_page_content(html: str, **told: Any) -> str:
    """The page without the roles of docstrings, whose names in backticks say enough."""
    return ROLE.sub("", html)


def on_post_build(config: Any, **told: Any) -> None:
    """See that no page asks another host for anything."""
    from mkdocs.exceptions import PluginError

    if abroad := list(loaded_from_abroad(Path(config["site_dir"]))):
        raise PluginError("pages load from other hosts: " + "; ".join(abroad))


def generated(markdown: str) -> str:
    """A page's text with each line that asks for something replaced by that."""
    return GENERATED.sub(lambda found: KINDS[found[1]](*found[2].split()), markdown)


def commands() -> str:
    """Every command of the program: what it does, its arguments, its options and their defaults."""
    return "\n\n".join(_command(name, own_command(name)) for name in OWN)


def _command(name: str, command: Any) -> str:
    arguments = [own for own in command.params if own.param_type_name == "argument"]
    words = ["vismem", name, *(_spelt(own) for own in arguments), "[OPTIONS]"]
    rows = [f"| {_code(_spelt(own))} | {_cell(_plain(own.help or ''))} | {_default(own)} |" for own in command.params]
    table = "\n".join(["| argument or option | what it says | by default |", "|---|---|---|", *rows])
    about = _plain(inspect.cleandoc(command.help or ""))
    usage, example = f"```text\n{' '.join(words)}\n```", _plain(command.epilog or "")
    return "\n\n".join([f"## vismem {name}", about, usage, example, table])


def _spelt(parameter: Any) -> str:
    """A parameter as one types it."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    names = "/".join([*parameter.opts, *parameter.secondary_opts])
    return names if parameter.is_flag else f"{names} {parameter.metavar or parameter.name.upper()}"


def _default(parameter: Any) -> str:
    value = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    if parameter.required or callable(value) or value is None or value is False or value in ((), [], ""):
        return ""
    return _code(str(value))


def settings() -> str:
    """Every setting by the key that ``--set`` takes, with its default."""
    return "\n\n".join(f"## {name}\n\n{_section(name, getattr(Config(), name))}" for name in ("memory", "train"))


def _section(path: str, section: Any) -> str:
    """A table of a section's own settings, then those of the sections in it."""
    told, rows, inner = _documented(type(section)), [], []
    for own in fields(section):
        value, key = getattr(section, own.name), f"{path}.{own.name}"
        if is_dataclass(value):
            inner.append(f"### {key}\n\n{_section(key, value)}")
            continue
        about = " ".join(told.get(own.name, "").split())
        if choices := re.match(r"Literal\[(.*)\]$", str(own.type)):
            about = f"One of {choices[1].replace(chr(39), '`')}. {about}"
        rows.append(f"| {_code(key)} | {_code(_shown(value))} | {_cell(about.replace('``', '`'))} |")
    table = "\n".join(["| key | by default | what it says |", "|---|---|---|", *rows])
    return "\n\n".join([inspect.cleandoc(section.__doc__).replace("``", "`"), table, *inner])


def _shown(value: Any) -> str:
    """A default as YAML would have it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _documented(section: type) -> dict[str, str]:
    """The texts that stand below the fields of a class and of those it extends."""
    found: dict[str, str] = {}
    for own in reversed(section.__mro__):
        if own.__module__ != schema.__name__:
            continue
        body = ast.parse(inspect.cleandoc(inspect.getsource(own))).body[0].body  # type: ignore[attr-defined]
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = str(text.value.value)
    return found


def api(*modules: str) -> str:
    """The docstrings of all that docs/api.txt says is public in some modules."""
    names = public()
    parts = [(f"## {own}\n\n" if len(modules) > 1 else "") + "\n\n".join(map(_asked, names[own])) for own in modules]
    return "\n\n".join(parts)


def _asked(name: str) -> str:
    return f"::: {name}"


def public() -> dict[str, list[str]]:
    """The public names of each module, with their module in front."""
    found: dict[str, list[str]] = {}
    for line in (DOCS / "api.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            module = line[2:]
            found[module] = []
        elif own := re.match(r"(?:class )?(\w+)(?:\(| = )", line):
            found[module].append(f"{module}.{own[1]}")
    return found


def notebook(name: str) -> str:
    """A notebook's texts and code, without what it printed."""
    cells = json.loads((DOCS / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    texts = [("".join(own["source"]), own["cell_type"]) for own in cells]
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for text, kind in texts)


def loaded_from_abroad(site: Path) -> Iterator[str]:
    """What built pages and style sheets load from other hosts, with the file that does."""
    for path in sorted(site.rglob("*.html")):
        reader = _Loads()
        reader.feed(path.read_text(encoding="utf-8"))
        yield from (f"{path.relative_to(site)}: {own}" for own in reader.abroad)
    for path in sorted(site.rglob("*.css")):
        if ABROAD_IN_STYLE.search(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: a style sheet"


class _Loads(HTMLParser):
    """Addresses on other hosts that a page loads from."""

    def __init__(self) -> None:
        super().__init__()
        self.abroad: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = [value or "" for key, value in attrs if key in LOADING and tag != "a"]
        styles = [value or "" for key, value in attrs if key == "style"]
        self.abroad += [value for value in own if ABROAD.match(value.strip())]
        self.abroad += [value for value in styles if ABROAD_IN_STYLE.search(value)]


def _plain(text: str) -> str:
    """Text in which nothing is Markdown."""
    return re.sub(r"([\\`*_<\[])", r"\\\1", text)


def _code(text: str) -> str:
    """Code for a cell of a table, where backticks would show what escapes a bar."""
    return f"<code>{escape(text).replace('|', '&#124;')}</code>"


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


KINDS: dict[str, Callable[..., str]] = {"commands": commands, "settings": settings, "api": api, "notebook": notebook}
