"""A base of which several processes each hold a part and compute with it: transformers' tensor parallelism.

The processes of a group run the same passes over the same rows together, so all of them must decide alike: what the
first one chose, all do. Memory is whole in each of them, and so is what goes from layer to layer; its gradients then
are whole too. Several groups hold the base once each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from transformers.distributed import mixin, utils

from vismem_core.errors import AttachError, TrainingError

PATIENCE = timedelta(hours=6)
"""How long processes wait for each other. Rollouts of long answers end at very different times, and whoever is gone is
found out otherwise (:mod:`vismem_core.training.peers`)."""
KEYS = ("k_proj", "qkv_proj", "query_key_value")
"""Layers whose split splits attention, by the last part of their names."""
NO_PLAN = "transformers has no plan that splits this model's attention"
INSTEAD = "use --device map, or cuda where a GPU holds all of it"


def everyone() -> Accelerator:
    """The processes that ``accelerate launch`` or ``torchrun`` started; TrainingError if they cannot be reached."""
    # Accelerator reads what ``accelerate launch`` set.
    found = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(found.num_processes):
        told = f"started as one of {started} processes, which do not see each other"
        raise TrainingError(f"{told}: on the CPU, set ACCELERATE_USE_CPU=true")
    return found


def asked(device: str) -> int:
    """How many processes are to hold one base by ``tensor[:N]``, 0 by others; AttachError if those started cannot."""
    name, _, told = device.partition(":")
    if name != "tensor":
        return 0
    if not hasattr(utils, "TransformersDeviceMesh"):
        raise AttachError(f"device {device!r} takes transformers 5.24: pip install -U transformers")
    if told and not told.isdecimal():
        raise AttachError(f"device {device!r}: tensor:N takes the number of processes that hold one base")
    count = everyone().num_processes
    size = int(told or os.environ.get("LOCAL_WORLD_SIZE", count))
    if count == 1 or size < 2:
        start = f"torchrun --nproc_per_node {max(size, 2)} -m vismem_cli ... --device tensor"
        raise AttachError(f"device {device!r}: one process has nobody to share the base with; start several: {start}")
    if count % size:
        raise AttachError(f"device {device!r}: {count} processes are no groups of {size}; start a multiple of it")
    return size


def refuse(source: str, config: Any, size: int, why: str = "") -> None:
    """AttachError where ``size`` processes cannot hold a base of this configuration, or there is a reason already."""
    text = config.get_text_config(decoder=True)
    plan: dict[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        why = f"its weights are quantised ({method})"
    elif not any(name.endswith(KEYS) and style == "colwise" for name, style in plan.items()):
        why = f"{NO_PLAN} ({text.model_type})"
    elif odd := {own.num_key_value_heads for own in text.per_layer_config if own.num_key_value_heads % size}:
        why = f"{size} processes cannot share its {min(odd)} key heads evenly"
    if why:
        raise AttachError(f"{source}: {why}; {INSTEAD}")


@contextmanager
def groups(size: int) -> Iterator[None]:
    """Bases loaded inside the context are held by ``size`` neighbours each; transformers means all processes."""

    def neighbours(distributed_config: Any) -> tuple[torch.device, utils.TransformersDeviceMesh]:
        kind = torch._C._get_accelerator().type
        device = utils._bind_local_device(kind, int(os.environ.get("LOCAL_RANK", 0)))
        shape = (1, dist.get_world_size() // size, 1, size)
        dense = init_device_mesh(kind, shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
        return device, utils.TransformersDeviceMesh(dense, dense)

    before = mixin.initialize_distributed_mesh
    mixin.initialize_distributed_mesh = neighbours
    try:
        yield
    finally:
        mixin.initialize_distributed_mesh = before


def mesh(model: Any) -> Any:
    """The processes that hold ``model`` together, in one dimension; None if each holds all of it."""
    return model._device_mesh["tp"] if (getattr(model, "_tp_size", None) or 1) > 1 else None


def writes(model: Any) -> bool:
    """Whether this process writes what those that hold ``model`` together have come to; true where there is one."""
    return mesh(model) is None or dist.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; those that hold it ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def agreed(model: Any, value: Tensor) -> Tensor:
    """What the first of the processes that hold ``model`` together has, in all of them."""
    if (own := mesh(model)) is not None:
        value = value.contiguous()
        dist.broadcast(value, group=own.get_group(), group_src=0)
    return value


def gathered(part: Tensor, width: int, among: Any) -> Tensor:
    """All (.., width) of what goes into a layer, of which this process may have its part; as of its gradient."""
    return part if part.shape[-1] == width else _moved(part, among, Shard(-1), Replicate())


def parted(whole: Tensor, width: int, among: Any) -> Tensor:
    """This process's part (.., width) of what comes out of a layer, or all of it; its gradient is that of all parts."""
    return whole if whole.shape[-1] == width else _moved(whole, among, Replicate(), Shard(-1))


def _moved(own: Tensor, among: Any, now: Placement, then: Placement) -> Tensor:
    return DTensor.from_local(own, among, [now], run_check=False).redistribute(placements=[then]).to_local()
