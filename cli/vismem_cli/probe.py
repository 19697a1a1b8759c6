"""``vismem probe``: what answers owe to the latents of a trained memory, and what these hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from vismem_core.files.samples import open_dataset

from . import options
from .console import err, out, print_json, print_table, say
from .sources import LoadOptions, check_names, check_rows, default_data, open_memory

EXAMPLE = "Example: vismem probe --per-type 20"
FEW = 100
"""Questions below which intervals are wide."""


def probe(
    data: options.Data = None,
    types: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Types of question, or groups such as new.", rich_help_panel=options.DATA),
    ] = None,
    per_type: Annotated[
        int, typer.Option(metavar="N", min=2, help="Questions of each type.", rich_help_panel=options.DATA)
    ] = 100,
    columns: options.Columns = None,
    check: options.Check = options.CheckRows.all,
    allow_outside: options.AllowOutside = False,
    memory: options.Memory = None,
    any_base: options.AnyBase = False,
    backbone: options.Backbone = None,
    model: options.Model = None,
    device: options.DeviceAlone = "auto",
    dtype: options.Dtype = options.DType.auto,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all figures there, as JSON.", rich_help_panel=options.OUTPUT),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 16,
    metric: options.Metric = "exact",
    as_json: options.Json = False,
) -> None:
    """Put other things in the latents' places, all else held fixed, and see what answers lose.

    Memory is invoked once, at the answer's start. Differences are from its own latents, with intervals of 95%.

    In the latents' places: zeros; noise of their size, or of their mean and covariance; the first one repeated; the
    mean over all questions; a word that means nothing (pause tokens); nothing (markers only); the memory of another
    image or question, or of the other kind.
    """
    check_names(backbone, metric=metric)
    samples = open_dataset(
        data or default_data(backbone, model),
        "heldout",
        allow_outside=allow_outside,
        columns=options.named_columns(columns),
    )
    load = LoadOptions(memory, backbone, model, any_base, dtype.value, device, trust_remote_code, revision)
    opened = open_memory(load)

    from vismem_core.experiments import probe as probing

    samples = check_rows(opened, samples, "fail", check.value, answers=True)
    wanted = None
    if types is not None:
        groups = samples.groups or {}
        wanted = [kind for name in types.split(",") for kind in groups.get(name, (name,))]
    with Progress(console=err, transient=True) as progress:
        task = progress.add_task("probing", total=None)
        told = probing.probe(
            opened,
            samples,
            types=wanted,
            per_type=per_type,
            max_new_tokens=max_new_tokens,
            metric=metric,
            progress=lambda text, done, count: progress.update(task, description=text, completed=done, total=count),
        )
    if output is not None:
        import json

        from vismem_core.files.checkpoint import atomically

        text = json.dumps(told, sort_keys=True) + "\n"
        atomically(output, lambda place: place.write_text(text, encoding="utf-8"))
    if as_json:
        print_json(told)
        return
    say(f"{told['questions']} questions{'; too few to tell much' if told['questions'] < FEW else ''}")
    measured = "accuracy" if metric == "exact" else told["metric"]
    for kind, own in told["kinds"].items():
        head = ("in the latents' places", measured, "difference", "log-likelihood, nats a token")
        print_table(f"\n{kind}-term memory", head, _rows(own["conditions"]), numbers=True)
        if "hidden" in own:
            print_table(f"\n{kind}-term memory, images out of sight after it", head, _rows(own["hidden"]), numbers=True)
        cosines = ", ".join(f"{name} {value:.2f}" for name, value in own["alike"].items())
        out.print(f"cosine of memories: {cosines}", soft_wrap=True)
        costs = ", ".join(f"{-one['mean']:.3f}" for one in own["left_out"])
        out.print(f"nats a token that each latent is worth: {costs}", soft_wrap=True)
    if "content" in told:
        shares = ", ".join(f"{name} {value:.2f}" for name, value in told["content"].items() if isinstance(value, float))
        out.print(f"\nimage content read by a linear probe: {shares}", soft_wrap=True)
    out.print()
    for own in told["kinds"].values():
        out.print(own["verdict"], soft_wrap=True)


def _rows(table: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, f"{own['accuracy']:.3f}", "", f"{own['log-likelihood']:.2f}")
        if name == "own"
        else (name, f"{own['accuracy']:.3f}", _told(own["score"]), _told(own["likelihood"]))
        for name, own in table.items()
    ]


def _told(gap: dict[str, float]) -> str:
    return f"{gap['mean']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})"
