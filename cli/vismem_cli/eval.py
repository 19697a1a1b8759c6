"""``vismem eval``: accuracy with memory, without it, and blind, on held-out questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vismem_core.files.reading import FRAMES
from vismem_core.files.samples import open_dataset
from vismem_core.training.folder import basis

from . import options
from .console import print_json, warn
from .report import list_skipped, print_report, tell_skipped, warn_of
from .sources import LoadOptions, check_names, check_rows, default_data, open_memory

EXAMPLE = "Example: vismem eval --memory runs/first --data mosaic --per-type 50"


def eval_(
    data: options.Data = None,
    per_type: Annotated[
        int, typer.Option(metavar="N", min=1, help="Questions of each type.", rich_help_panel=options.DATA)
    ] = 100,
    columns: options.Columns = None,
    on_bad_sample: options.OnBad = options.OnBadSample.fail,
    check: options.Check = options.CheckRows.all,
    allow_outside: options.AllowOutside = False,
    allow_urls: options.AllowUrls = False,
    frames: options.Frames = FRAMES,
    memory: options.Memory = None,
    any_base: options.AnyBase = False,
    backbone: options.Backbone = None,
    model: options.Model = None,
    device: options.Device = "auto",
    dtype: options.Dtype = options.DType.auto,
    batch: options.Batch = 32,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    max_new_tokens: options.MaxNewTokens = 64,
    metric: options.Metric = "exact",
    as_json: options.Json = False,
) -> None:
    """Compare answers with memory, without it, and over another question's image, by type of question.

    Columns: base (memory off), memory (invoked by the policy), noise (in the latents' places), blind_base and blind
    (base and memory over another sample's image), short and long (forced at the answer's start).
    """
    check_names(backbone, metric=metric)
    source = data or default_data(backbone, model)
    samples = open_dataset(
        source,
        "heldout",
        on_bad=on_bad_sample.value,
        allow_outside=allow_outside,
        urls=allow_urls,
        frames=frames,
        columns=options.named_columns(columns),
    )
    load = LoadOptions(memory, backbone, model, any_base, dtype.value, device, trust_remote_code, revision)
    opened = open_memory(load)

    from vismem_core.answers.evaluation import evaluate

    samples = check_rows(opened, samples, on_bad_sample.value, check.value)
    left_out = list(samples.skipped)
    report = evaluate(
        opened,
        samples,
        groups=samples.groups,
        per_type=per_type,
        batch=batch,
        max_new_tokens=max_new_tokens,
        metric=metric,
        left_out=left_out if on_bad_sample.value == "skip" else None,
    )
    stood = basis(Path(memory)) if memory and Path(memory).is_dir() else None
    trained_on = stood is not None and bool(samples.told) and stood.data["digest"] == samples.told
    if trained_on:
        warn(f"this memory was trained on these questions, {source}; name others with --data")
    tell_skipped(left_out)
    if as_json:
        warn_of(report)
        print_json(report | {"skipped": list_skipped(left_out)})
    else:
        print_report(report, "Training questions" if trained_on else "Held-out questions")
