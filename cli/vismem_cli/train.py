"""``vismem train``: trains latent vision memory on a frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from vismem_core.bases import embedded
from vismem_core.config import load
from vismem_core.data import Dataset, open_dataset

from . import options
from .console import print_json, print_table, say, warn

EXAMPLE = "Example: vismem train --backbone qwen2_5_vl --set train.formation.steps=200 --output runs/first"


class Stage(str, Enum):
    formation = "formation"
    invocation = "invocation"
    all = "all"


class Objective(str, Enum):
    sft = "sft"
    grpo = "grpo"


def train(
    backbone: options.Backbone = None,
    model: options.Model = None,
    data: options.Data = None,
    heldout: Annotated[str | None, typer.Option(help="Data for the report; by default held-out samples of --data.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory of the run; by default runs/BACKBONE.")] = None,
    stage: Annotated[Stage | None, typer.Option(help="What to train.")] = None,
    objective: Annotated[Objective | None, typer.Option(help="How the formation of memory is trained.")] = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the initial values, the data and the sampling.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    on_bad_sample: options.OnBad = options.OnBadSample.fail,
    allow_outside: options.AllowOutside = False,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DType.auto,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Train latent vision memory on a frozen model, and report what it changed on held-out questions.

    Writes memory.safetensors, vismem.json, metrics.jsonl and report.json to the output directory. Settings count in
    this order: --config, --set, then --stage, --objective and --seed.
    """
    flags = {"stage": stage and stage.value, "objective": objective and objective.value, "seed": seed}
    overrides = [f"train.{key}={value}" for key, value in flags.items() if value is not None]
    run = load(config, [*(settings or []), *overrides])
    source = data or _embedded_data(backbone, model)
    rows: dict[str, Any] = {"on_bad": on_bad_sample.value, "allow_outside": allow_outside}
    samples = open_dataset(source, "train", **rows)
    asked = open_dataset(heldout or source, "heldout", **rows)
    if heldout is None and Path(source).is_file():
        warn(f"the report will be on the training data, {source}; name other data with --heldout")

    from vismem_core import attach
    from vismem_core.loading import load_base
    from vismem_core.training.run import train as run_training

    base, processor, name = load_base(
        backbone, model, dtype=dtype.value, device=device, trust_remote_code=trust_remote_code, revision=revision
    )
    memory = attach(base, processor, config=run.memory, backbone=name, seed=run.train.seed)
    place = output or Path("runs") / name
    report = run_training(memory, samples, asked, run, place, resume=resume, groups=asked.groups)
    if as_json:
        print_json(report | {"output": str(place), "skipped": list_skipped(samples)})
        return
    print_report(report)
    tell_skipped(samples)
    say(f"\nwritten to {place}; ask it: vismem infer --memory {place} --image FILE --prompt TEXT")


def _embedded_data(backbone: str | None, model: str | None) -> str:
    """The data set of the embedded model; a model of one's own needs its own data."""
    if model is not None:
        raise typer.BadParameter("a model of your own needs data: a JSONL file or a registered name", param_hint="--data")
    name, base = embedded(backbone)
    if base.dataset is None:
        raise typer.BadParameter(f"the embedded model of {name} names no data set", param_hint="--data")
    return base.dataset


def print_report(report: Mapping[str, Any]) -> None:
    """Accuracies by question type, a column per way of answering."""
    for part, title in (("heldout", "Held-out questions"), ("seen", "\nQuestion types the base was trained on")):
        ways: Mapping[str, Mapping[str, float]] = report.get(part) or {}
        if not ways:
            continue
        types = list(dict.fromkeys(name for scores in ways.values() for name in scores))
        rows = [(name, *(_share(scores.get(name)) for scores in ways.values())) for name in types]
        if len(types) > 1:
            means = (sum(scores.values()) / len(scores) if scores else None for scores in ways.values())
            rows.append(("mean", *map(_share, means)))
        print_table(title, ("accuracy", *ways), rows, numbers=True)
    if (count := report.get("invocations_per_answer")) is not None:
        say(f"\n{count:.2f} invocations per answer, {report.get('seconds', 0):.0f} seconds")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def list_skipped(data: Dataset) -> list[dict[str, Any]]:
    """The bad rows that were left out, for JSON."""
    return [{"line": skipped.line, "reason": skipped.reason} for skipped in data.skipped]


def tell_skipped(data: Dataset) -> None:
    """The bad rows that were left out, on stderr."""
    if data.skipped:
        warn(f"{len(data.skipped)} bad rows were left out:")
        for skipped in data.skipped:
            say(f"  line {skipped.line}: {skipped.reason}")
