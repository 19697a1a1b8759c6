"""Plots of what experiments found (needs the extra ``plots``): axes named, errors shown, told apart without colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

from vismem_core.errors import VismemError

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which people with any colour vision tell apart."""
MARKERS = "osD^vPX"
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++")
KINDS = {"short": 0, "long": 1}
SMOOTH = 0.05
"""Width of the kernel along an answer from 0 to 1."""
BINS = 50


def check() -> None:
    """Whether plots can be made.

    Raises:
        VismemError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise VismemError("plots need matplotlib: pip install 'vismem[plots]'") from error


def draw(told: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write the plot of an experiment as PNG and SVG; gives their paths.

    Args:
        told: of :func:`vismem_core.experiments.engine.told`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {"svg.hashsalt": "vismem", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
        DRAWN[told["figure"]](told, figure.add_subplot())
        paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
        for path in paths:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    return paths


def _bars(told: Mapping[str, Any], axes: Any) -> None:
    """A bar for every row, side by side for each group of types."""
    rows, groups = told["rows"], [name for name in told["groups"] if len(told["groups"]) < 4 or name == told["group"]]
    height = 0.8 / len(groups)
    for number, group in enumerate(groups):
        places = [at + (number - (len(groups) - 1) / 2) * height for at in range(len(rows))]
        means = [row["accuracy"].get(group) for row in rows.values()]
        axes.barh(
            places,
            [own["mean"] if own else 0 for own in means],
            height,
            xerr=[(own or {}).get("error") or 0 for own in means],
            color=COLOURS[number % len(COLOURS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white",
            label=f"{group} types",
            error_kw={"capsize": 2, "lw": 1},
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    seeds = len(told["seeds"])
    spread = f"; bars: standard error over {seeds} seeds" if seeds > 1 else ""
    axes.set_xlabel(f"accuracy (mean over types{spread})")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(groups))


def _lines(told: Mapping[str, Any], axes: Any) -> None:
    """Accuracy over ``x``, a line for each series; rows without ``x`` are levels."""
    group = told["group"]
    series: dict[str, list[tuple[float, Any]]] = {}
    styles = cycle(zip(COLOURS, MARKERS, strict=True))
    for row in told["rows"].values():
        if row["x"] is not None and group in row["accuracy"]:
            series.setdefault(row["series"] or told["axis"], []).append((row["x"], row["accuracy"][group]))
    for name, points in series.items():
        colour, marker = next(styles)
        points = sorted(points, key=lambda own: float(own[0]))
        means, errors = [own["mean"] for _, own in points], [own["error"] or 0 for _, own in points]
        axes.errorbar([x for x, _ in points], means, errors, color=colour, marker=marker, capsize=2, label=name)
    for name, row in told["rows"].items():
        if row["x"] is None and group in row["accuracy"]:
            axes.axhline(row["accuracy"][group]["mean"], color=next(styles)[0], linestyle="--", lw=1, label=name)
    ticks = sorted({x for points in series.values() for x, _ in points})
    if ticks and ticks[0] > 0 and ticks[-1] / ticks[0] > 4:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel(told["axis"])
    axes.set_ylabel(f"accuracy, {group} types")
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _stages(told: Mapping[str, Any], axes: Any) -> None:
    """Accuracy over stages of training, a colour for each series: of the group, and dashed of what was learnt first."""
    parts = {told["group"]: "-", told["also"]: "--"}
    base = next((row for row in told["rows"].values() if row["x"] is None), None)
    for name, (colour, marker) in zip(_series(told), cycle(zip(COLOURS, MARKERS, strict=True)), strict=False):
        rows = [row for row in told["rows"].values() if row["series"] == name]
        for part, style in parts.items():
            points = [(row["x"], row["accuracy"][part]) for row in rows if part in row["accuracy"]]
            if base is not None and part in base["accuracy"]:
                points = [(0, base["accuracy"][part]), *points]
            means, errors = [own["mean"] for _, own in points], [own["error"] or 0 for _, own in points]
            xs, label = [x for x, _ in points], f"{name}, {part}"
            axes.errorbar(xs, means, errors, ls=style, color=colour, marker=marker, capsize=2, label=label)
    axes.set_ylim(0, 1)
    axes.set_xticks(sorted({0, *(row["x"] for row in told["rows"].values() if row["x"] is not None)}))
    axes.set_xlabel(told["axis"])
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _series(told: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["series"] for row in told["rows"].values() if row["series"]))


def _invocations(told: Mapping[str, Any], axes: Any) -> None:
    """Share of answers that invoke each kind of memory along the answer, smoothed."""
    from math import exp

    grid = [at / (BINS - 1) for at in range(BINS)]
    for (name, row), style in zip(_invoking(told).items(), cycle(("-", "--", ":", "-."))):
        questions = sum(len(own) for own in row["scores"][0].values())
        for kind, number in KINDS.items():
            places = [[at[3] for at in one if at[2] == kind] for one in row["invocations"]]
            weight = [
                fmean(sum(exp(-(((x - at) / SMOOTH) ** 2) / 2) for at in own) / questions for own in places)
                for x in grid
            ]
            label = f"{kind}-term, {name}"
            axes.plot(grid, weight, style, color=COLOURS[number], label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("place in the answer, from its start to its end")
    axes.set_ylabel(f"invocations per answer near there\n(Gaussian kernel, sd {SMOOTH:g})")
    axes.legend(frameon=False, fontsize=7)


def _invoking(told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in told["rows"].items() if any(row["invocations"])}


def _costs(told: Mapping[str, Any], axes: Any) -> None:
    """Accuracy against what an answer takes, in core seconds of the first row's."""
    rows, group = told["rows"], told["group"]
    first = next(iter(rows.values()))["answering"] or 1.0
    for (name, row), (colour, marker) in zip(rows.items(), cycle(zip(COLOURS, MARKERS, strict=True))):
        if own := row["accuracy"].get(group):
            x = row["answering"] / first
            axes.errorbar([x], [own["mean"]], [own["error"] or 0], color=colour, marker=marker, capsize=2, label=name)
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"time of an answer, in those of '{next(iter(rows))}' (processor time)")
    axes.set_ylabel(f"accuracy, {group} types")
    axes.legend(frameon=False, fontsize=7)


DRAWN: Mapping[str, Callable[[Mapping[str, Any], Any], None]] = {
    "bars": _bars,
    "lines": _lines,
    "stages": _stages,
    "invocations": _invocations,
    "costs": _costs,
}
