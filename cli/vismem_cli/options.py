"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from . import completion


class OnBadSample(str, Enum):
    fail = "fail"
    skip = "skip"


class CheckRows(str, Enum):
    all = "all"
    lazy = "lazy"


class DType(str, Enum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


DATA, MODEL, MEMORY, TRAINING, OUTPUT, SERVER = "Data", "Model", "Memory", "Training", "Output", "Server"
"""Panels of a command's help; they stand in the order in which its parameters first name them."""

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="A file, a folder, hub:ORG/NAME, or a registered name.",
        autocompletion=completion.datasets,
        rich_help_panel=DATA,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="KEY=NAME,..",
        help="What the data calls prompt, answer, image, id or type.",
        rich_help_panel=DATA,
    ),
]
OnBad = Annotated[
    OnBadSample,
    typer.Option(
        "--on-bad-sample",
        metavar="fail|skip",
        help="Stop at a bad row, or leave it out and list it.",
        rich_help_panel=DATA,
    ),
]
Check = Annotated[
    CheckRows,
    typer.Option(
        "--check", metavar="all|lazy", help="Look for bad rows first, or as they are met.", rich_help_panel=DATA
    ),
]
AllowOutside = Annotated[
    bool,
    typer.Option("--allow-outside", help="Let a data file name images outside its folder.", rich_help_panel=DATA),
]
AllowUrls = Annotated[
    bool,
    typer.Option("--allow-urls", help="Fetch images named by URL, public ones only.", rich_help_panel=DATA),
]
Frames = Annotated[
    int,
    typer.Option("--frames", metavar="N", min=1, help="Frames shown of each video.", rich_help_panel=DATA),
]

Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="DIR|ID", help="A trained one, or shipped:NAME; by default shipped.", rich_help_panel=MEMORY
    ),
]
AnyBase = Annotated[
    bool,
    typer.Option("--any-base", help="Accept other weights than the memory was made for.", rich_help_panel=MEMORY),
]

Backbone = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        metavar="NAME",
        help="Family; found by itself where a model is given.",
        autocompletion=completion.backbones,
        rich_help_panel=MODEL,
    ),
]
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="ID|DIR", help="The base; by default the embedded model.", rich_help_panel=MODEL),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="TEXT", help="Branch, tag or commit on the hub.", rich_help_panel=MODEL),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Let a model's own code run on this machine.", rich_help_panel=MODEL),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1; map or tensor over several.", rich_help_panel=MODEL
    ),
]


def _alone(device: str) -> str:
    if device.partition(":")[0] == "tensor":
        raise typer.BadParameter("only train, infer and eval share a base between processes; map spreads it over GPUs")
    return device


DeviceAlone = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1; map over several.", callback=_alone, rich_help_panel=MODEL
    ),
]
Dtype = Annotated[
    DType,
    typer.Option("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32.", rich_help_panel=MODEL),
]
Batch = Annotated[
    int, typer.Option("--batch", metavar="N", min=1, help="Questions answered together.", rich_help_panel=MODEL)
]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One setting, such as train.seed=1.",
        autocompletion=completion.settings,
        rich_help_panel=TRAINING,
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings.", rich_help_panel=TRAINING)
]

MaxNewTokens = Annotated[
    int,
    typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer, in tokens.", rich_help_panel=OUTPUT),
]
Metric = Annotated[
    str,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="How answers are scored: exact, vqa, f1, ...",
        autocompletion=completion.metrics,
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=OUTPUT)]


def named_columns(told: str | None) -> dict[str, str] | None:
    """What ``--columns`` says."""
    if told is None:
        return None
    found = dict(own.split("=", 1) for own in told.split(",") if "=" in own)
    keys = ("id", "image", "images", "video", "prompt", "answer", "answers", "type")
    if len(found) != len(told.split(",")) or not all(found.values()) or found.keys() - set(keys):
        raise typer.BadParameter(f"expected KEY=NAME,... with keys among {', '.join(keys)}", param_hint="--columns")
    return found
