"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


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


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Backbone = Annotated[
    str | None,
    typer.Option("--backbone", metavar="NAME", help="Family of the model; found by itself where a model is given."),
]
Model = Annotated[
    str | None, typer.Option("--model", metavar="ID|DIR", help="Hub id or directory; by default the embedded model.")
]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="TEXT", help="Branch, tag or commit of a model on the hub.")
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="DIR|ID", help="Directory or hub id of a trained memory; by default the shipped one."
    ),
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Accept a model of the same shape whose weights differ from the memory's.")
]
Device = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="Such as cpu, cuda or cuda:1; or map or tensor (docs/scaling.md)."),
]


def _alone(device: str) -> str:
    if device.partition(":")[0] == "tensor":
        raise typer.BadParameter("only train, infer and eval share a base between processes; map spreads it over GPUs")
    return device


DeviceAlone = Annotated[
    str,
    typer.Option("--device", metavar="NAME", help="Such as cpu, cuda or cuda:1; or map.", callback=_alone),
]
Dtype = Annotated[DType, typer.Option("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let a model from the hub run its own code on this machine.")
]
OnBad = Annotated[
    OnBadSample, typer.Option("--on-bad-sample", help="Stop at a bad row of the data, or leave it out and list it.")
]
Check = Annotated[
    CheckRows,
    typer.Option(
        "--check", help="Look for rows that this model cannot use in all of a file first, or when they are met."
    ),
]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Let a data file name images outside its own directory.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="JSONL, JSON, CSV or Parquet file, a folder, hub:ORG/NAME, or a registered name.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="KEY=NAME,...",
        help="What the data calls prompt, answer, image, id or type; others are found.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer, in tokens.")]
Batch = Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Questions answered together.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as train.seed=1.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings.")]


def named_columns(told: str | None) -> dict[str, str] | None:
    """What ``--columns`` says."""
    if told is None:
        return None
    found = dict(own.split("=", 1) for own in told.split(",") if "=" in own)
    keys = ("id", "image", "images", "prompt", "answer", "type")
    if len(found) != len(told.split(",")) or not all(found.values()) or found.keys() - set(keys):
        raise typer.BadParameter(f"expected KEY=NAME,... with keys among {', '.join(keys)}", param_hint="--columns")
    return found
