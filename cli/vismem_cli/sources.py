"""What the commands work on: a trained memory on its model, and the data by default."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import Progress

from vismem_core.base.embedded import embedded
from vismem_core.base.images import PLACEHOLDER
from vismem_core.config import MemoryConfig
from vismem_core.errors import CheckpointError
from vismem_core.files.samples import Dataset, OnBad
from vismem_core.plugins import registry

from .console import err, warn

if TYPE_CHECKING:
    from vismem_core import Memory


SMALL = 10_000_000
"""Parameters below which a model is one for a single thread."""
SHOWN = 5
"""Words that a warning names."""


@dataclass(frozen=True)
class LoadOptions:
    """Which memory on which model, and how to load it."""

    memory: str | None
    backbone: str | None
    model: str | None
    any_base: bool
    dtype: str
    device: str
    trust_remote_code: bool
    revision: str | None


def check_names(
    backbone: str | None = None,
    memory: MemoryConfig | None = None,
    trigger: str | None = None,
    rewards: Sequence[str] = (),
    metric: str | None = None,
    callbacks: Sequence[str] = (),
) -> None:
    """Tell a misspelt name, or an argument that a trigger, reward or metric does not take, before a model is loaded."""
    from vismem_core.answers import metric as metrics
    from vismem_core.answers import reward
    from vismem_core.memory import trigger as triggers

    if backbone is not None and backbone not in registry("bases").names():
        registry("backbones").entry(backbone)
    if memory is not None:
        registry("query_builders").entry(memory.query.builder)
        for former in (memory.short, memory.long):
            registry("formers").entry(former.name)
    for spec in (trigger, memory and memory.trigger):
        if spec:
            triggers.parse(spec)
    if rewards:
        reward.parse(rewards)
    if metric is not None:
        metrics.parse(metric)
    for spec in callbacks:
        registry("callbacks").entry(spec.partition(":")[0])


def open_memory(options: LoadOptions) -> Memory:
    """The memory of ``--memory``, or the shipped one, attached to the model it was trained on or to ``--model``."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1" and options.device not in ("tensor", f"tensor:{started}"):
        told = f"{started} processes answer only if all hold one base together: tensor"
        raise typer.BadParameter(told, param_hint="--device")
    source, options = memory_source(options), with_base(options)
    with err.status("loading"):
        from vismem_core import attach

        model, processor, name = open_base(options)
        return attach(model, processor, source, backbone=name, any_base=options.any_base)


def with_base(options: LoadOptions) -> LoadOptions:
    """The same options, with the model that the trained memory was made for where none is named."""
    if options.memory is None or options.model is not None:
        return options
    from vismem_core.files.checkpoint import base_of  # brings torch

    recorded, model = base_of(options.memory)
    return replace(options, backbone=options.backbone or recorded, model=model)


def open_base(options: LoadOptions) -> tuple[Any, Any, str]:
    """The model, its processor, and the name of its backbone.

    Small ones run on one thread of a CPU, unless ``OMP_NUM_THREADS`` says otherwise: their operations end before
    several threads have met, and training on two takes longer by two thirds.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    from vismem_core.base.loading import load_base

    disable_progress_bar()  # the command's own says that it loads
    set_verbosity_error()  # advice for those who call transformers themselves
    model, processor, name = load_base(
        options.backbone,
        options.model,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
    )
    parameters = sum(own.numel() for own in model.parameters())
    if model.device.type == "cpu" and parameters < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return model, processor, name


def check_rows(memory: Memory, data: Dataset, on_bad: OnBad, check: str, *, answers: bool = False) -> Dataset:
    """The rows of a file that the model can use, all of them looked at now, unless ``check`` is lazy."""
    from vismem_core.answers.checking import checked

    if check == "lazy" or not data.told:
        return data
    with Progress(console=err, transient=True) as progress:
        task = progress.add_task("checking the data", total=len(data))
        return checked(
            memory.backbone,
            data,
            on_bad,
            answers=answers,
            progress=lambda done, _: progress.update(task, completed=done),
            warn=warn,
        )


def tell_unknown(processor: Any, texts: Sequence[str]) -> None:
    """Warn of words that a tokenizer has no token for; only small models have such."""
    tokenizer = getattr(processor, "tokenizer", processor)
    words = list(dict.fromkeys(word for text in texts for word in text.replace(PLACEHOLDER, " ").split()))
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    lost = [word for word, own in zip(words, ids, strict=True) if tokenizer.unk_token_id in own]
    if lost:
        some = ", ".join(map(repr, lost[:SHOWN]))
        more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        warn(f"this model has no token for {len(lost)} of the {len(words)} words it is given: {some}{more}")


def memory_source(options: LoadOptions) -> str:
    """What ``--memory`` says, or where the shipped memory is."""
    if options.memory is not None:
        return options.memory
    if options.model is not None:
        raise CheckpointError(
            f"no trained memory is named for {options.model}; train one (vismem train --model), then --memory DIR"
        )
    from vismem_core.files.checkpoint import shipped  # brings torch

    return str(shipped(options.backbone))


def default_data(backbone: str | None, model: str | None) -> str:
    """The data set of the embedded model; a model of one's own needs its own data."""
    if model is not None:
        raise typer.BadParameter(
            "a model of your own needs data: a JSONL file or a registered name", param_hint="--data"
        )
    name, base = embedded(backbone)
    if base.dataset is None:
        raise typer.BadParameter(f"no data set goes with the embedded model of {name}", param_hint="--data")
    return base.dataset
