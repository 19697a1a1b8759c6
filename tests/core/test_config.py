from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from vismem_core.config import Config, MemoryConfig, from_dict, load, to_dict
from vismem_core.config.settings import Count, Section, Share, coerce, merge
from vismem_core.errors import ConfigError


def test_file_then_overrides_then_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("memory:\n  short: {length: 3}\ntrain:\n  seed: 7\n  formation: {lr: 5e-3, steps: 10}\n")
    config = load(path, ["train.formation.steps=20", "memory.delimiters=[',', ';']"])
    assert config.memory.short.length == 3
    assert config.train.seed == 7
    assert config.train.formation.lr == 5e-3  # YAML 1.1 reads this as text
    assert config.train.formation.steps == 20
    assert config.memory.delimiters == (",", ";")
    assert config.memory.long == Config().memory.long


def test_load_keeps_what_the_base_sets() -> None:
    base = load(None, ["train.seed=5"])
    assert load(None, ["train.save_every=9"], base).train.seed == 5


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load(tmp_path / "run.yaml") == Config()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", "'lr=1': unknown key 'lr'; did you mean 'train.formation.lr'?"),
        ("memory.short.lenght=2", "unknown key 'memory.short.lenght'; did you mean 'memory.short.length'?"),
        ("memory.short.length=0", "memory.short.length must be at least 1, not 0"),
        ("memory.short.dropout=1.5", "memory.short.dropout must be from 0 to 1, not 1.5"),
        ("memory.short.context=all", "memory.short.context: expected one of cache, recompute, got 'all' (text)"),
        ("memory.delimiters=5", "memory.delimiters: expected a list, each text, got 5 (whole number)"),
        ("memory.delimiters=[a, 1]", "memory.delimiters[1]: expected text, got 1 (whole number)"),
        ("memory=3", "memory: expected a section of keys, got 3 (whole number)"),
        ("train.seed=true", "train.seed: expected a whole number, got True (true or false)"),
        ("train.seed=1.5", "train.seed: expected a whole number, got 1.5 (number)"),
        ("train.formation.lr=fast", "train.formation.lr: expected a number, got 'fast' (text)"),
        ("train.formation.lr=true", "train.formation.lr: expected a number, got True (true or false)"),
        ("train.formation.lr=.nan", "train.formation.lr: expected a number, got nan (number)"),
        ("train.seed", "'train.seed': expected key=value"),
        ("train.seed=[", "'train.seed=[': the value is not YAML"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("memory:\n  budgt: 2\n", "run.yaml:2: ", "did you mean 'memory.budget'?"),
        ("train:\n  seed: 1\n  formation:\n    lr: fast\n", "run.yaml:4: ", "expected a number"),
        ("train:\n  seed: 1\n  seed: 2\n", "run.yaml:3: ", "train.seed is set twice, first on line 2"),
        ("train: [\n", "run.yaml:2: ", "not YAML"),
        ("- a\n", "run.yaml: ", "expected a section of keys"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, text: str, place: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value).startswith(f"{tmp_path}/{place}")
    assert message in str(error.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("none.yaml", "binary.yaml"):
        with pytest.raises(ConfigError, match=f"{name}: cannot be read"):
            load(tmp_path / name)


def test_dict_round_trip_names_its_source() -> None:
    config = load(None, ["memory.short.length=3", "memory.delimiters=[x]"]).memory
    assert from_dict(MemoryConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match=r"vismem\.json: unknown key 'budgets'"):
        from_dict(MemoryConfig, {"budgets": 1}, "vismem.json")


def test_limits_hold_without_a_file() -> None:
    with pytest.raises(ConfigError, match="budget must be at least 0, not -1"):
        MemoryConfig(budget=-1)


@dataclass(frozen=True)
class _Inner(Section):
    share: Share = 0.5
    mode: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class _Outer(Section):
    inner: _Inner = field(default_factory=_Inner)
    limit: Count | None = None
    flag: bool = False


def test_merge_is_generic() -> None:
    merged = merge(_Outer(), {"inner": {"share": 1, "mode": "b"}, "limit": 3, "flag": True})
    assert merged == _Outer(_Inner(1.0, "b"), 3, True)
    assert isinstance(merged.inner.share, float)
    assert merge(merged, {"limit": None}).limit is None
    with pytest.raises(ConfigError, match="flag: expected true or false, got 1"):
        merge(_Outer(), {"flag": 1})
    with pytest.raises(ConfigError, match="limit must be at least 0"):
        coerce(Count | None, -1, "limit")
