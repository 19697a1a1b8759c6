"""The suite itself: its sentences, its flags, its models, and that nothing else needs pytest."""

from __future__ import annotations

import ast
import inspect
import re
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import vismem_core
from vismem_core.errors import PluginError
from vismem_core.testing import BackboneContract, liven
from vismem_core.testing.contract import holds
from vismem_core.testing.liveliness import close, moved

TESTS = {name: test for name, test in inspect.getmembers(BackboneContract) if name.startswith("test_")}


def find(path: str) -> Any:
    """What a dotted path names."""
    parts = path.split(".")
    module = next(at for at in range(len(parts), 0, -1) if ".".join(parts[:at]) in MODULES)
    return reduce(getattr, parts[module:], import_module(".".join(parts[:module])))


ROOT = Path(vismem_core.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MODULES = {
    ".".join((ROOT.name, *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__") for file in FILES
}


@pytest.mark.parametrize("name", TESTS)
def test_every_check_says_what_it_holds_and_where_that_is_described(name: str) -> None:
    """In one sentence; places after the first may leave out what they have in common with it."""
    test = TESTS[name]
    assert re.search(r" must | gives? ", test.sentence) and "\n" not in test.sentence
    first, *further = re.split(r", | and ", test.where)
    for place in (first, *(first.rpartition(".")[0] + own if own.startswith(".") else own for own in further)):
        assert inspect.getdoc(find(place)), place


def test_failures_are_told_and_skips_pass() -> None:
    @holds("rows must be rows", "vismem_core.somewhere")
    def check(what: Any) -> None:
        what()

    with pytest.raises(AssertionError, match=r"^rows must be rows; see vismem_core.somewhere\nValueError: .*three"):
        check(lambda: int("three"))
    with pytest.raises(pytest.skip.Exception):
        check(lambda: pytest.skip("not here"))


def imports(file: Path) -> set[str]:
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in tree
             if isinstance(node, ast.Import | ast.ImportFrom)]  # fmt: skip
    return {name.rpartition(".")[2] for name in names}


def test_only_the_suite_needs_pytest() -> None:
    users = {file.parent for file in FILES if imports(file) & {"pytest", "testing"}}
    assert users == {ROOT / "testing"}


class Fresh(BackboneContract):
    """A model whose weights are small, a tenth of the tiny model's if it is as transformers initialises it."""

    backbone = "qwen2_5_vl"
    size = 0.1

    def load(self) -> tuple[Any, Any]:
        model, processor = tiny.qwen()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "embed_tokens" not in name:
                    parameter.mul_(self.size)
            model.get_decoder().norm.weight.fill_(1.0)
        return model, processor


class Lively(Fresh):
    def load(self) -> tuple[Any, Any]:
        model, processor = super().load()
        liven(model)
        return model, processor


class Dull(Fresh):
    size = 0.001


def test_what_counts_as_the_same() -> None:
    lowest = torch.finfo(torch.float32).min
    numbers = torch.tensor([-50.0, 0.5, lowest, float("-inf")])
    close(numbers + 0.004, numbers)
    for other in (numbers + 0.02, numbers.nan_to_num(neginf=-1e9), numbers * float("nan")):
        with pytest.raises(AssertionError, match=r"^it differs\n"):
            close(other, numbers, "it differs")
    assert not moved(numbers[:3], numbers[:3] + 0.01)
    assert moved(numbers[:3], numbers[:3] + 0.1)


def test_dull_models_are_no_test() -> None:
    with pytest.raises(AssertionError, match=r"must depend on its image.*see vismem_core.testing.liven"):
        Dull().test_the_model_looks_at_its_image()
    Lively().test_the_model_looks_at_its_image()


def test_names_that_nobody_registered() -> None:
    class Unknown(Fresh):
        backbone = "qwen2_5_v"

    with pytest.raises(AssertionError, match="PluginError: unknown backbone 'qwen2_5_v'; did you mean 'qwen2_5_vl'"):
        Unknown().test_language_model()
    with pytest.raises(PluginError):
        Unknown().base()


class TestPlain(Lively):
    """A family whose prompts hold one image each."""

    several_images = text_only = False


def test_flags() -> None:
    assert [len(images) for _, images in Lively().questions()] == [1, 1, 2, 0]
    assert [len(images) for _, images in TestPlain().questions()] == [1, 1]
