"""``vismem train``: trains latent vision memory on a frozen model."""

from __future__ import annotations

import os
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from vismem_core.base.embedded import embedded
from vismem_core.config import Config, load
from vismem_core.errors import ConfigError, TrainingError
from vismem_core.files.reading import FRAMES
from vismem_core.files.samples import open_dataset
from vismem_core.training.folder import Basis, basis, refuse
from vismem_core.training.folder import settings as run_settings

from . import completion, options
from .console import print_json, say, warn
from .report import print_report, tell_best, tell_skipped, warn_of
from .sources import LoadOptions, check_names, default_data, open_base, tell_unknown, with_base

EXAMPLE = "Example: vismem train --backbone qwen2_5_vl --set train.formation.steps=200 --output runs/first"


class Stage(str, Enum):
    formation = "formation"
    invocation = "invocation"
    all = "all"


class Policy(str, Enum):
    rows = "rows"
    lora = "lora"


class Objective(str, Enum):
    sft = "sft"
    grpo = "grpo"
    both = "sft+grpo"


def train(
    data: options.Data = None,
    heldout: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="For the report; by default what --data holds out.",
            autocompletion=completion.datasets,
            rich_help_panel=options.DATA,
        ),
    ] = None,
    columns: options.Columns = None,
    on_bad_sample: Annotated[
        options.OnBadSample | None,
        typer.Option(
            metavar="fail|skip", help="Stop at a bad row (default), or list it.", rich_help_panel=options.DATA
        ),
    ] = None,
    check: Annotated[
        options.CheckRows | None,
        typer.Option(
            metavar="all|lazy",
            help="Look for bad rows first (default), or as met.",
            rich_help_panel=options.DATA,
        ),
    ] = None,
    allow_outside: options.AllowOutside = False,
    allow_urls: options.AllowUrls = False,
    frames: options.Frames = FRAMES,
    backbone: options.Backbone = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DType.auto,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|ID", help="Go on from it; by default it begins untrained.", rich_help_panel=options.MEMORY
        ),
    ] = None,
    any_base: options.AnyBase = False,
    stage: Annotated[
        Stage | None,
        typer.Option(metavar="NAME", help="formation, invocation or all.", rich_help_panel=options.TRAINING),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            metavar="NAME", help="sft, grpo, or sft+grpo: one after the other.", rich_help_panel=options.TRAINING
        ),
    ] = None,
    policy: Annotated[
        Policy | None,
        typer.Option(metavar="NAME", help="Trains the tokens' rows, or lora too.", rich_help_panel=options.TRAINING),
    ] = None,
    image_dropout: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            min=0.0,
            max=1.0,
            help="Chance that the image leaves after an invocation.",
            rich_help_panel=options.TRAINING,
        ),
    ] = None,
    config: options.ConfigFile = None,
    settings: options.Settings = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Of initial values, data and sampling.", rich_help_panel=options.TRAINING
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --output, by its settings.", rich_help_panel=options.TRAINING
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Of the run; by default runs/BACKBONE.", rich_help_panel=options.OUTPUT),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How answers are scored: exact, vqa, f1, ...",
            autocompletion=completion.metrics,
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Train latent vision memory on a frozen model, and report what it changed.

    Writes memory.safetensors, vismem.json, metrics.jsonl and report.json. Whatever ends it, the last step is saved.

    Settings come from --config, then --set, then --stage and other flags, each over the ones before.
    """
    flags: dict[str, Any] = {"stage": stage and stage.value, "objective": objective and objective.value, "seed": seed}
    flags |= {"image_dropout": image_dropout, "memory": memory, "metric": metric}
    overrides = [*(settings or []), *(f"train.{key}={value}" for key, value in flags.items() if value is not None)]
    overrides += [f"memory.policy.trains={policy.value}"] if policy else []
    place = output or (Path("runs") / backbone if backbone else None)
    if resume and not (place and place.exists()) and not (data or model or memory or config or settings):
        raise TrainingError(f"{place or 'no --output'}: there is no run to resume; without --resume one begins")
    before = run_settings(place) if resume and place else None
    stood = basis(place) if resume and place else None
    began = load(config, overrides, before).train.memory or None
    base = LoadOptions(began, backbone, model, any_base, dtype.value, device, trust_remote_code, revision)
    base = with_base(_of_run(base, stood) if stood else base)
    run = load(config, overrides, before or _suited(base))
    named: dict[str, Any] = {"metric": run.train.metric, "callbacks": run.train.callbacks}
    check_names(base.backbone, run.memory, rewards=run.train.grpo.rewards, **named)
    told: dict[str, Any] = {"on_bad": "fail", "check": "all"} | (dict(stood.rows) if stood else {})
    told |= {"on_bad": on_bad_sample.value} if on_bad_sample else {}
    told |= {"check": check.value} if check else {}
    source = data or (stood and stood.data["source"]) or default_data(base.backbone, base.model)
    heldout = heldout or (stood and stood.heldout["source"]) or None
    rows: dict[str, Any] = {
        "on_bad": told["on_bad"],
        "allow_outside": allow_outside,
        "urls": allow_urls,
        "frames": frames,
    }
    rows["columns"] = options.named_columns(columns) or (stood and stood.data.get("columns")) or None
    samples = open_dataset(source, "train", **rows)
    asked = open_dataset(heldout or source, "heldout", **rows)
    tell_skipped([*samples.skipped, *asked.skipped])
    title = "Held-out questions"
    if Path(source).exists() and os.path.abspath(heldout or source) == os.path.abspath(source):
        if run.train.evaluation.every:
            raise ConfigError(f"train.evaluation.every needs data that is held out of {source}: name it with --heldout")
        warn(f"the report will be on the training data, {source}; name other data with --heldout")
        title = "Training questions"
    if stage is Stage.invocation and not began:
        warn("Stage II learns when to ask for memory, and this one holds nothing yet: name a trained one with --memory")

    if known := output or (Path("runs") / base.backbone if base.backbone else None):
        refuse(known, resume)

    from vismem_core import attach
    from vismem_core.training.run import train as run_training

    loaded, processor, name = open_base(base)
    attached = attach(
        loaded, processor, began, config=run.memory, backbone=name, seed=run.train.seed, any_base=any_base
    )
    first = [samples[at] for at in range(min(len(samples), 50))]
    tell_unknown(processor, [text for own in first for text in (own.prompt, own.answer or "")])
    place = output or Path("runs") / name
    report = run_training(attached, samples, asked, run, place, resume=resume, groups=asked.groups, **told)
    if not report:
        return  # another process has it
    if as_json:
        warn_of(report)
        print_json(report | {"output": str(place)})
        return
    print_report(report, title)
    tell_best(report, place)
    if report["skipped"]:
        warn(f"bad rows were left out: {len(report['skipped'])}; {place / 'report.json'} lists them")
    say(f"\nwritten to {place}; ask it: vismem infer --memory {place} --image FILE --prompt TEXT")


def _of_run(options: LoadOptions, stood: Basis) -> LoadOptions:
    """The base that a run stands on, where none is named; the run refuses another."""
    base = stood.base
    return replace(
        options,
        backbone=options.backbone or base["backbone"],
        model=options.model or base["name"],
        revision=options.revision or (None if options.model else base["revision"]),
        dtype=base["dtype"] if options.dtype == "auto" else options.dtype,
    )


def _suited(base: LoadOptions) -> Config:
    """What settings begin from: those that suit an embedded model, and those that a trained memory was saved with."""
    suited = load(embedded(base.backbone)[1].settings if base.model is None else None)
    if base.memory is None:
        return suited
    from vismem_core.files.checkpoint import settings  # brings torch

    return replace(suited, memory=settings(base.memory))
