import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from vismem_core import API_VERSION, plugins
from vismem_core.errors import PluginError
from vismem_core.plugins import KINDS, Plugins

GOOD = """
from vismem_core.hookspecs import hookimpl

@hookimpl
def register_formers(register):
    register("{name}", "{target}", description="for tests")
"""
BROKEN = {
    "missing_import": ("import not_installed", "ModuleNotFoundError: No module named 'not_installed'"),
    "exits": ("raise SystemExit('bye')", "SystemExit: bye"),
    "raises": (GOOD + "    raise RuntimeError('two\\nlines')\n", "RuntimeError: two lines"),
    "misspelt": (GOOD.replace("register_formers", "register_formerz"), "did you mean 'register_formers'?"),
    "signature": (GOOD.replace("(register)", "(registre)"), "registre"),
    "no_hook": ("", "implements no hook"),
    "bad_target": (GOOD.replace("{target}", "no colon"), "'no colon' is not of the form package.module:attribute"),
    "too_new": (
        "VISMEM_API = 99\n" + GOOD,
        f"for version 99 of vismem's plugin interface, and this is {API_VERSION}; install a newer",
    ),
    "too_old": ("VISMEM_API = 0\n" + GOOD, "install a newer release of the plugin"),
    "no_version": ("VISMEM_API = '1'\n" + GOOD, "for version '1' of vismem's"),
    "taken": (GOOD.replace("{name}", "first"), "the former 'first' is already registered by"),
}
Point = Callable[[str, str], EntryPoint]


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Point]:
    """Writes a plugin module and returns its entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> EntryPoint:
        text = source.replace("{name}", name).replace("{target}", "json:dumps")
        (tmp_path / f"vm_{name}.py").write_text(text)
        return EntryPoint(name, f"vm_{name}", "vismem")

    yield write
    for module in [name for name in sys.modules if name.startswith("vm_")]:
        del sys.modules[module]


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_recorded_and_stops_no_other(point: Point, case: str) -> None:
    source, message = BROKEN[case]
    loaded = Plugins([point("first", GOOD), point(f"m_{case}", source), point("z_last", GOOD)])
    assert [status.ok for status in loaded.status] == [True, False, True]
    error = loaded.status[1].error
    assert error is not None
    assert message in error
    assert "\n" not in error
    assert loaded.registry("formers").names() == ("first", "z_last")


def test_a_plugin_may_say_what_it_was_written_for(point: Point) -> None:
    assert Plugins([point("said", f"VISMEM_API = {API_VERSION}\n{GOOD}")]).registry("formers").names() == ("said",)


def test_a_plugin_falls_as_a_whole(point: Point) -> None:
    half = GOOD + "    register('other', 'json:loads')\n    raise RuntimeError('late')\n"
    loaded = Plugins([point("half", half)])
    assert loaded.registry("formers").names() == ()
    assert loaded.status[0].registers == {}


def test_one_name_twice_in_one_plugin(point: Point) -> None:
    twice = GOOD + "    register('twice', 'json:loads')\n"
    assert "already registered" in str(Plugins([point("twice", twice)]).status[0].error)


def test_facts_and_origin_are_kept(point: Point) -> None:
    entry = Plugins([point("good", GOOD)]).registry("formers").entries()[0]
    assert (entry.name, entry.target, entry.plugin) == ("good", "json:dumps", "good")
    assert entry.facts == {"description": "for tests"}
    assert entry.load() is __import__("json").dumps


def test_targets_are_imported_when_asked_for(point: Point) -> None:
    lost = GOOD.replace("{target}", "not_installed_anywhere:thing")
    gone = GOOD.replace("{target}", "json:dumpz")
    loaded = Plugins([point("lost", lost), point("gone", gone)])
    assert all(status.ok for status in loaded.status)
    for name, why in {"lost": "No module named 'not_installed_anywhere'", "gone": "has no attribute 'dumpz'"}.items():
        with pytest.raises(PluginError, match=f"former '{name}' of .* does not load: .*{why}"):
            loaded.registry("formers").get(name)


def test_unknown_names_give_the_nearest_and_what_failed_to_load(point: Point) -> None:
    loaded = Plugins([point("good", GOOD), point("misspelt", BROKEN["misspelt"][0])])
    with pytest.raises(PluginError, match=r"unknown former 'goood'; did you mean 'good'\?; not loaded: misspelt"):
        loaded.registry("formers").get("goood")
    with pytest.raises(PluginError, match=r"unknown registry 'former'; did you mean 'formers'"):
        loaded.registry("former")


def test_restricted_loading(point: Point) -> None:
    points = [point("one", GOOD), point("two", GOOD)]
    assert Plugins(points, ["two"]).registry("formers").names() == ("two",)
    assert Plugins(points, []).status == []
    assert "did you mean 'two'?" in str(Plugins(points, ["twoo"]).status[0].error)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ["backbones", "plugins"]), ("", []), ("backbones", ["backbones"])]
)
def test_environment_variable(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: list[str]) -> None:
    monkeypatch.delenv("VISMEM_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("VISMEM_PLUGINS", value)
    plugins.installed.cache_clear()
    own = [status.name for status in plugins.status() if status.distribution == "vismem"]
    plugins.installed.cache_clear()
    assert own == expected


@pytest.mark.parametrize("kind", KINDS)
def test_built_ins_load(kind: str) -> None:
    registry = plugins.registry(kind)
    assert kind == "commands" or registry.names()
    for entry in registry.entries():
        assert registry.get(entry.name) is not None
        assert entry.facts["description"]


def test_loading_plugins_imports_nothing_heavy() -> None:
    code = "import sys; from vismem_core import plugins; plugins.status(); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
