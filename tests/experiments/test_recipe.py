"""Recipes: what they say, what is wrong with them, and what a cell's name depends on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from vismem_core.errors import ConfigError, PluginError
from vismem_core.experiments import cells, recipe
from vismem_core.experiments.cells import Base

BASE = Base("qwen2_5_vl")
TOLD: dict[str, Any] = {
    "title": "A title",
    "asks": "What?",
    "data": "mosaic",
    "seeds": [3, 4],
    "trained": {
        "{n} {m}": {"for": {"n": [2, 8], "m": ["a", "b"]}, "settings": {"memory.short.length": "{n}", "x": "<{m}>"}},
        "later": {"after": "2 a", "data": {"name": "mosaic", "arguments": {"types": ["right"]}}},
    },
    "rows": {"base": {}, "later": {"of": "later", "trigger": "random:0.5"}, "2 a": {"of": "2 a", "x": 2}},
    "compare": [["later", "base"]],
    "quick": {"seeds": [0], "per_type": 1, "settings": {"memory.short.length": 1}},
}


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**TOLD, **changes}, sort_keys=False), encoding="utf-8")
    return path


def test_one_part_stands_for_many(tmp_path: Path) -> None:
    told = recipe.find(str(written(tmp_path)))
    assert list(told.trained) == ["2 a", "2 b", "8 a", "8 b", "later"]
    assert told.trained["8 b"].settings == {"memory.short.length": 8, "x": "<b>"}
    assert [own.name for own in told.lineage("later")] == ["2 a", "later"]
    assert (told.name, told.seeds, told.compare) == ("mine", [3, 4], [("later", "base")])
    quick = told.quickly()
    assert (quick.seeds, quick.per_type, quick.metric) == ([0], 1, "exact")
    assert quick.trained["8 b"].settings == {"memory.short.length": 1, "x": "<b>"}


def test_cells_come_after_what_they_need_and_once(tmp_path: Path) -> None:
    told = recipe.find(str(written(tmp_path)))
    found = cells.cells(told, BASE)
    titles = [own.title for own in found]
    assert titles.count("ask base, seed 3") == 1
    assert "ask base, seed 4" not in titles  # nothing of it hangs on a seed
    assert sorted(titles[1:]) == sorted(
        f"{what}, seed {seed}" for what in ("train 2 a", "train later", "ask later", "ask 2 a") for seed in (3, 4)
    )
    for place, own in enumerate(found):
        assert own.needs is None or own.needs.key in {other.key for other in found[:place]}


def test_a_cell_is_named_by_all_that_it_depends_on(tmp_path: Path) -> None:
    told = recipe.find(str(written(tmp_path)))
    row = told.rows["later"]
    cell = cells.of(told, BASE, row, 3)

    def key(row: Any = row, seed: int = 3, base: Base = BASE, **changes: Any) -> str:
        return cells.of(replace(told, **changes), base, row, seed).key

    assert key() == cell.key
    assert key(title="another", asks="else") == cell.key
    assert key(replace(row, name="renamed", x=4.0, series="s")) == cell.key
    first, last = told.trained["2 a"], told.trained["later"]
    others = [
        key(seed=4),
        key(base=Base("llava")),
        key(base=replace(BASE, train="mine.jsonl")),
        key(replace(row, trigger="policy")),
        key(replace(row, blind=True)),
        key(replace(row, replaced="noise")),
        key(per_type=7),
        key(metric="ending"),
        key(trained={**told.trained, "2 a": replace(first, settings={"memory.short.length": 4})}),
        key(trained={**told.trained, "later": replace(last, method="lora")}),
        key(trained={**told.trained, "later": replace(last, after="8 a")}),
        key(data=recipe.Data("mosaic", {"types": ["below"]})),
    ]
    assert len({cell.key, *others}) == 1 + len(others)


def test_a_file_that_has_changed_is_another(tmp_path: Path) -> None:
    told, data = recipe.find(str(written(tmp_path))), tmp_path / "rows.jsonl"
    data.write_text("one", encoding="utf-8")
    base = replace(BASE, train=str(data))
    before = cells.of(told, base, told.rows["later"], 3).key
    assert cells.of(told, base, told.rows["later"], 3).key == before
    data.write_text("two", encoding="utf-8")
    assert cells.of(told, base, told.rows["later"], 3).key != before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": {"base": {"off": "later"}}}, "rows: base: unknown key 'off'; did you mean 'of'?"),
        ({"rows": {"base": {"of": "latter"}}}, "rows: base: of: there is no 'latter'; did you mean 'later'?"),
        ({"compare": [["later", "bass"]]}, "compare: there is no 'bass'; did you mean 'base'?"),
        ({"trained": {"later": {"method": "lore"}, "2 a": {}}}, "trained: later: method 'lore'; did you mean 'lora'?"),
        ({"figure": "bar"}, "figure 'bar'; did you mean 'bars'?"),
        ({"titel": "A"}, "unknown key 'titel'; did you mean 'title'?"),
        ({"rows": ["base"]}, "rows: expected names"),
    ],
)
def test_what_is_wrong_is_told_with_the_file(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        recipe.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_are_told_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="did you mean 'main'"):
        recipe.find("mainn")
    path = tmp_path / "odd.yaml"
    path.write_text("title: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        recipe.find(str(path))


@pytest.mark.parametrize("name", recipe.names())
def test_recipes_that_ship(name: str) -> None:
    """Settings are known, kinds of data too, and the quick form has everything that the whole one has."""
    told = recipe.find(name)
    quick = told.quickly()
    assert told.seeds == (0, 1, 2)
    assert (list(quick.trained), list(quick.rows), quick.seeds) == (list(told.trained), list(told.rows), [0])
    for own in cells.cells(told, BASE):
        if own.row is None:
            own.config(own.chain[-1])
    for part in (*told.trained.values(), *told.rows.values()):
        if part.data.name:
            assert len(
                cells.of(
                    told, BASE, told.rows["base"] if "base" in told.rows else next(iter(told.rows.values())), 0
                ).samples(part.data, "heldout")
            )
