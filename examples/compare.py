"""Several runs side by side: means over question types from `report.json`, curves from `metrics.jsonl`."""

import json
from collections.abc import Iterator
from itertools import accumulate, cycle, groupby, product
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

CONDITIONS = ("base", "memory", "noise", "blind_base", "blind", "short", "long")
GROUPS = {"heldout": "new", "seen": "seen"}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}; give directories that `vismem train` finished") from error


def rows(run: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """For each group of question types: its accuracies, and how often answers to them invoke memory."""
    report = json.loads(_text(run / "report.json"))
    for key, group in GROUPS.items():
        if report[key]["base"]:
            asked = mean(sum(report["invocations"][name].values()) for name in report[key]["base"])
            means = {name: mean(report[key][name].values()) for name in CONDITIONS}
            yield group, {**means, "invocations": asked}


def table(runs: list[Path]) -> Table:
    """A line for each run and group."""
    view = Table("run", "types", *CONDITIONS, "invocations")
    for run in runs:
        for group, values in rows(run):
            view.add_row(run.name, group, *(f"{value:.3f}" for value in values.values()))
    return view


def curves(runs: list[Path], figures: list[str], path: Path, window: int) -> None:
    """One plot for each figure over all steps; a point is the mean of up to ``window`` steps of its stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plot, axes = pyplot.subplots(1, len(figures), figsize=(4 * len(figures), 3), squeeze=False)
    for run, colour in zip(runs, cycle(pyplot.rcParams["axes.prop_cycle"].by_key()["color"])):
        lines: list[dict[str, Any]] = [json.loads(line) for line in _text(run / "metrics.jsonl").splitlines()]
        known = sorted({name for line in lines for name, value in line.items() if not isinstance(value, str)})
        if unknown := [name for name in figures if name not in known]:
            raise typer.BadParameter(f"{run} logged no {unknown[0]!r}; it logged {', '.join(known)}")
        for (_, steps), (place, figure) in product(stages(lines), zip(axes[0], figures, strict=True)):
            told = [(step, line[figure]) for step, line in steps if figure in line]
            values = [mean(value for _, value in told[max(0, at - window + 1) : at + 1]) for at in range(len(told))]
            place.plot([step for step, _ in told], values, color=colour, label=run.name if steps[0][0] == 1 else None)
            place.axvline(steps[0][0], color="grey", lw=0.5, ls=":")
            place.set(xlabel=f"step ({' | '.join(name for name, _ in stages(lines))})", title=figure)
    axes[0][0].legend()
    plot.tight_layout()
    plot.savefig(path)


def stages(lines: list[dict[str, Any]]) -> list[tuple[str, list[tuple[int, dict[str, Any]]]]]:
    """The steps of each stage, numbered through from 1; an evaluation has the number of the step before it."""
    numbers = accumulate("finished" not in line for line in lines)
    groups = groupby(zip(numbers, lines, strict=True), key=lambda own: str(own[1]["stage"]))
    return [(name, list(steps)) for name, steps in groups]


def main(
    runs: Annotated[list[Path], typer.Argument(help="Directories that `vismem train` wrote.")],
    plot: Annotated[Path | None, typer.Option(help="A picture of curves to write.")] = None,
    figures: Annotated[str, typer.Option(help="What is plotted, by its names in metrics.jsonl.")] = "loss",
    window: Annotated[int, typer.Option(help="Steps a point is the mean of.", min=1)] = 20,
) -> None:
    """Example: python examples/compare.py runs/a runs/b --plot curves.png --figures reward,kl,short,long"""
    Console(width=max(Console().width, 110)).print(table(runs))  # cut off, its heads look alike
    if plot:
        curves(runs, figures.split(","), plot, window)


if __name__ == "__main__":
    typer.run(main)
