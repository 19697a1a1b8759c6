"""``vismem experiment``: the paper's experiments, and others, each by one command."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vismem_core.base.embedded import embedded

from . import completion, options
from .console import err, out, print_json, print_table, say, warn

if TYPE_CHECKING:
    from vismem_core.experiments.recipe import Recipe

EXAMPLE = "Example: vismem experiment main --quick"


def experiment(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Names or YAML files, all, list, or show NAME.",
            show_default=False,
            autocompletion=completion.experiments,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="To train on, instead of the recipe's.",
            autocompletion=completion.datasets,
            rich_help_panel=options.DATA,
        ),
    ] = None,
    heldout: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="To ask, instead of the recipe's.",
            autocompletion=completion.datasets,
            rich_help_panel=options.DATA,
        ),
    ] = None,
    backbone: options.Backbone = None,
    model: options.Model = None,
    device: options.DeviceAlone = "auto",
    dtype: options.Dtype = options.DType.auto,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Too small to tell anything; shows that it runs.", rich_help_panel=options.TRAINING
        ),
    ] = False,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Instead of the recipe's.", rich_help_panel=options.TRAINING)
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Processes at a time; by default one per core.", rich_help_panel=options.TRAINING
        ),
    ] = None,
    config: options.ConfigFile = None,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Results, plots, a page, and cells.", rich_help_panel=options.OUTPUT)
    ] = Path("runs/experiments"),
    as_json: options.Json = False,
) -> None:
    """Run experiments: train what they compare, ask it, and write tables, plots and a page.

    What was done is not done again: the same command goes on with a run that was ended.
    """
    from vismem_core.experiments import figures, recipe

    if what == ["list"]:
        _list(as_json)
        return
    if what[0] == "show":
        if not what[1:]:
            raise typer.BadParameter("show what? add a name, such as main", param_hint="NAME")
        for name in what[1:]:
            _show(recipe.find(name), as_json)
        return
    names = recipe.names() if what == ["all"] else what
    recipes = [recipe.find(name) for name in names]
    figures.check()
    if quick:
        recipes = [own.quickly() for own in recipes]
    if seeds is not None:
        if not re.fullmatch(r"\d+(,\d+)*", seeds):
            raise typer.BadParameter("seeds are numbers with commas between them, such as 0,1", param_hint="--seeds")
        recipes = [replace(own, seeds=tuple(map(int, seeds.split(",")))) for own in recipes]

    from vismem_core.experiments import engine, page
    from vismem_core.experiments.cells import Base

    family = backbone or (None if model else embedded()[0])
    base = Base(family or "", model or "", data or "", heldout or data or "", str(config or ""), device, dtype.value)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=err) as progress:
        task = progress.add_task("cells", total=None)
        told = engine.run(
            recipes,
            base,
            output / "cells",
            jobs=jobs,
            progress=lambda text, done, count: progress.update(task, description=text, completed=done, total=count),
        )
    written = page.write(told, output)
    if as_json:
        print_json({"output": str(output), "experiments": told})
        return
    if quick:
        warn(page.TRIAL)
    for own in told:
        few = len(page.columns(own)) + 2  # what fits a terminal; the page has the rest
        rows = [row[:few] for row in page.table(own)]
        print_table(f"\n{own['title']}", page.headings(own)[:few], rows, numbers=True)
        if own["compare"]:
            print_table("", page.COMPARED, page.differences(own), numbers=True)
    say(f"\nwritten to {written[-1]}")


def _list(as_json: bool) -> None:
    from vismem_core.plugins import registry

    known: dict[str, Any] = {own.name: own for own in registry("experiments").entries()}
    if as_json:
        print_json({name: own.facts.get("description", "") for name, own in known.items()})
        return
    rows = [(name, str(own.facts.get("description", "")), own.distribution) for name, own in known.items()]
    print_table("Experiments", ("name", "what it shows", "from"), rows)


def _show(own: Recipe, as_json: bool) -> None:
    """What would be trained and asked."""
    asked = {
        name: (row.of or "the base", row.trigger or ("policy" if row.of else "never")) for name, row in own.rows.items()
    }
    told = {
        "experiment": own.name,
        "title": own.title,
        "asks": own.asks,
        "seeds": list(own.seeds),
        "trained": {name: {"method": part.method, **part.settings} for name, part in own.trained.items()},
        "rows": {name: {"of": of, "trigger": trigger} for name, (of, trigger) in asked.items()},
    }
    if as_json:
        print_json(told)
        return
    out.print(f"{own.title}\n{own.asks}\n")
    rows = [
        (name, part.method, ", ".join(f"{k}={v}" for k, v in part.settings.items()))
        for name, part in own.trained.items()
    ]
    print_table("Trained, under each seed", ("name", "method", "settings"), rows)
    print_table("\nAsked", ("row", "of", "invoked by"), [(name, *row) for name, row in asked.items()])
