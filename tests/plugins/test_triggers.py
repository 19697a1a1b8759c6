"""Trigger specs, and draws that depend on a row's own seed and step alone."""

import pytest

from vismem_core.config import Kind
from vismem_core.errors import ConfigError, PluginError
from vismem_core.memory.trigger import Row, Trigger, parse


def decisions(spec: str, rows: list[Row]) -> list[str]:
    trigger = parse(spec)
    return [trigger(row) for row in rows]


STEPS = [Row(seed=9, step=step, boundary=step % 3 == 0) for step in range(600)]


@pytest.mark.parametrize(
    ("spec", "kinds", "active"),
    [
        ("policy", ("short", "long"), True),
        ("policy@short", ("short",), True),
        ("never", ("short", "long"), False),
        ("random:0.5@long", ("long",), True),
        ("anywhere:1", ("short", "long"), True),
        ("schedule:0=long,24=short", ("short", "long"), True),
    ],
)
def test_specs(spec: str, kinds: tuple[Kind, ...], active: bool) -> None:
    trigger = parse(spec)
    assert (trigger.kinds, trigger.active, trigger.spec) == (kinds, active, spec)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("polcy", PluginError, "policy"),
        ("policy:1", ConfigError, "takes no argument, not '1'"),
        ("never:x", ConfigError, "takes no argument"),
        ("policy@both", ConfigError, "memory kinds are short and long, not 'both'"),
        ("random", ConfigError, "takes a probability, as in random:0.5"),
        ("random:1.5", ConfigError, "not '1.5'"),
        ("anywhere:nan", ConfigError, "not 'nan'"),
        ("schedule", ConfigError, "expected STEP=short or STEP=long"),
        ("schedule:3", ConfigError, "not '3'"),
        ("schedule:3=medium", ConfigError, "not '3=medium'"),
        ("schedule:-1=short", ConfigError, "not '-1=short'"),
    ],
)
def test_bad_specs(spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(spec)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("policy", ["policy"] * 3),
        ("never", ["none"] * 3),
        ("schedule:0=long,2=short", ["long", "none", "short"]),
        ("schedule:0=long,2=short@short", ["none", "none", "short"]),
        ("random:0", ["none"] * 3),
        ("anywhere:1@short", ["short"] * 3),
        ("random:1@long", ["long", "none", "none"]),
    ],
)
def test_decisions(spec: str, expected: list[str]) -> None:
    assert decisions(spec, STEPS[:3]) == expected


@pytest.mark.parametrize(("spec", "places"), [("random:0.5", 200), ("anywhere:0.5", 600)])
def test_frequencies(spec: str, places: int) -> None:
    found = decisions(spec, STEPS)
    assert found.count("short") + found.count("long") == pytest.approx(places / 2, abs=places * 0.1)
    assert found.count("short") == pytest.approx(places / 4, abs=places * 0.1)
    places_found = [row for row, own in zip(STEPS, found, strict=True) if own != "none"]
    assert spec.startswith("anywhere") or all(row.boundary for row in places_found)


def test_draws_belong_to_the_row() -> None:
    alone = decisions("anywhere:0.5", STEPS)
    trigger = parse("anywhere:0.5")
    among = [[trigger(Row(seed=seed, step=row.step)) for seed in (1, 9, 2)][1] for row in STEPS]
    assert among == alone
    assert decisions("anywhere:0.5", [Row(seed=10, step=row.step) for row in STEPS]) != alone


def test_a_rule_of_ones_own() -> None:
    trigger = Trigger(lambda row: "long" if row.invocations else "short", kinds=("long",))
    assert [trigger(Row()), trigger(Row(invocations=1))] == ["none", "long"]
