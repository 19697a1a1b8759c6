"""Loading a base model by backbone, hub id or folder; without any of them, the embedded one."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import get_max_memory
from transformers import AutoConfig
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vismem_core.errors import AttachError, nearest
from vismem_core.plugins import registry

from . import damage, tensor
from .embedded import embedded
from .families import find_backbone

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_base(
    backbone: str | None = None,
    model: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[Any, Any, str]:
    """A model, its processor, and the name of the backbone that knows it.

    Args:
        model: hub id or folder; None takes the model embedded for ``backbone``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the checkpoint's on a GPU, fp32 on a CPU.
        device: a torch device, ``auto`` for a GPU where there is one, ``map`` to spread over all GPUs (each of
            several processes on a machine over its share of them), or ``tensor:N`` for a base that N processes hold
            together (:mod:`vismem_core.base.tensor`); ``tensor`` is all those of a machine.

    Raises:
        VismemError: what is missing or does not fit, and what to do.
    """
    if dtype not in DTYPES:
        raise AttachError(f"dtype {dtype!r}: {nearest(dtype, DTYPES)} (one of {', '.join(DTYPES)})")
    source, name, unknown = model or "", backbone or "", ""
    if not source:
        base = embedded(backbone)[1]
        source, name = str(base.model), base.backbone or name
    if not name:
        _, name, unknown = backbone_of(source, trust_remote_code, revision)
    if not name:
        raise AttachError(f"{source}: {unknown}")
    family = registry("backbones").get(name)
    plain, sharers = "cuda" if torch.cuda.is_available() else "cpu", tensor.asked(device)
    place = plain if device == "auto" else device
    precise = (plain if sharers else place) == "cpu"
    if place == "cuda":  # each process that ``accelerate launch`` starts has a GPU of its own
        place = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    options["dtype"] = (torch.float32 if precise else "auto") if dtype == "auto" else getattr(torch, dtype)
    if place == "map":
        options |= {"device_map": "auto"} | _share()
    if sharers:
        tensor.refuse(source, backbone_of(source, trust_remote_code, revision)[0], sharers, family.undivided)
        options["distributed_config"] = DistributedConfig(tp_size=sharers)
    else:
        _check_device(place)
    try:
        with damage.heard(source), tensor.groups(sharers) if sharers else nullcontext():
            loaded, processor = family.load(source, **options)
        damage.check_tokenizer(source, processor)
    except Exception as error:  # damaged files make the libraries that read them raise nearly anything
        raise AttachError(damage.reason(source, error, revision)) from error
    if place != "map" and not sharers:
        try:
            loaded = loaded.to(place)
        except (RuntimeError, AssertionError) as error:  # such as too little memory
            raise AttachError(f"device {place!r}: {str(error).splitlines()[0]}") from error
    if backbone is None and not family.matches(loaded):  # by its parts, which its type does not tell
        name = find_backbone(loaded).name
    elif not family.matches(loaded):
        raise AttachError(f"{source}: backbone {name!r} does not know model type {loaded.config.model_type!r}")
    return loaded, processor, name


def _check_device(place: str) -> None:
    """Tell a device that is none before a model is loaded for it."""
    if place == "map":
        return
    try:
        device = torch.device(place)
    except RuntimeError as error:
        raise AttachError(f"device {place!r}: {str(error).splitlines()[0]}") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise AttachError(f"device {place!r}: torch {torch.__version__} finds no Apple GPU here; use --device cpu")
    if device.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise AttachError(f"device {place!r}: torch {torch.__version__} finds no GPU here; use --device cpu")
    if (device.index or 0) >= count:
        raise AttachError(f"device {place!r}: this machine has {count} GPUs, from cuda:0 to cuda:{count - 1}")


def _share() -> dict[str, Any]:
    """How much of which GPUs this process may fill, if it has neighbours; the first is the one accelerate gives it."""
    rank, processes = (
        int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    free = get_max_memory()
    gpus = sorted(device for device in free if isinstance(device, int))
    if processes == 1 or not gpus:
        return {}
    if len(gpus) < processes:
        raise AttachError(f"{processes} processes on a machine with {len(gpus)} GPUs: start as many, or fewer")
    return {"max_memory": {gpu: free[gpu] for gpu in gpus[rank::processes]}}


def backbone_of(source: str, trust_remote_code: bool = False, revision: str | None = None) -> tuple[Any, str, str]:
    """The configuration of a hub id or a folder, and the backbone for it; or else an empty name, and why.

    Raises:
        AttachError: there is no configuration that can be read.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:  # as above
        raise AttachError(damage.reason(source, error, revision)) from error
    backbones = registry("backbones")
    known: dict[str, str] = {}
    for entry in backbones.entries():
        for model_type in entry.facts.get("model_types", ()):
            known.setdefault(str(model_type), entry.name)
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        for entry in backbones.entries():
            if entry.facts.get("fallback"):
                known.setdefault(config.model_type, entry.name)
    if config.model_type in known:
        hint = ""
    elif config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = "it reads text alone; vismem_backbones.compose puts a vision encoder in front of it"
    elif config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        hint = "transformers has no model of that type that answers questions about images"
    else:
        hint = nearest(config.model_type, known)
    return config, known.get(config.model_type, ""), f"no backbone knows model type {config.model_type!r}; {hint}"
