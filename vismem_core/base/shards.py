"""A base whose layers several processes share: each holds a part of every layer, and gathers a layer to run it.

FSDP and DeepSpeed's ZeRO gather layers too, but want all processes to run the same layers in the same order, forward
and backward. With memory they do not: rollouts end at different steps, memory is formed where it is invoked, replay is
cut into as many parts as it takes. So a process that needs a layer says which, and the lowest that anyone needs is
gathered next, by all of them; who asked for another asks again. Those ahead thus wait for those behind, and processes
that run the same layers soon run them together. Whoever comes to a sum over all processes serves the others until all
are there (:meth:`Shards.meet`).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.modeling_layers import GradientCheckpointingLayer

from vismem_core.errors import AttachError, TrainingError

ALIGNED = 256
"""Bytes; every tensor of a gathered layer begins at a multiple of it, as it would on its own."""


@dataclass
class _Saved:
    """What autograd keeps of a gathered weight: where it is, to be gathered again in the backward pass."""

    layer: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Layer:
    """The matrices of a layer; vectors (norms, biases) stay whole, they are small.

    Args:
        parameters: whole, on the CPU; left empty, on ``state``'s device.
    """

    def __init__(self, parameters: list[nn.Parameter], state: Accelerator) -> None:
        self.places: list[tuple[nn.Parameter, torch.Size, int]] = []
        pieces, at = list[Tensor](), 0
        for parameter in parameters:
            piece = parameter.data.contiguous().flatten().view(torch.uint8)
            room = ALIGNED * math.ceil(len(piece) / ALIGNED)
            pieces.append(nn.functional.pad(piece, (0, room - len(piece))))
            self.places.append((parameter, parameter.shape, at))
            at += room
        whole = nn.functional.pad(torch.cat(pieces), (0, -at % (ALIGNED * state.num_processes)))
        own = whole.view(state.num_processes, -1)[state.process_index]
        self.part = own.to(state.device, copy=True)
        self.nothing = [parameter.data.new_empty(0, device=state.device) for parameter in parameters]
        self.let_go()

    def gather(self) -> Tensor:
        """The whole layer, as bytes, of which every process holds a part."""
        return gather(self.part)  # type: ignore[no-any-return]

    def take(self, whole: Tensor) -> None:
        """Point the parameters into ``whole``."""
        for parameter, shape, at in self.places:
            size = shape.numel() * parameter.dtype.itemsize
            parameter.data = whole[at : at + size].view(parameter.dtype).view(shape)

    def let_go(self) -> None:
        """Leave the parameters empty."""
        for (parameter, _, _), nothing in zip(self.places, self.nothing, strict=True):
            parameter.data = nothing


class Shards:
    """The layers of ``model`` shared by all processes; a process holds its parts, and one layer whole.

    The rest of the model (embeddings, head, projector, vectors) is whole in every process, on its device.

    Args:
        model: on the CPU, the same in every process.

    Raises:
        AttachError: there is one process only, no layer that could be shared, or parts are to be kept elsewhere.
        TrainingError: there are others that cannot be reached.
    """

    def __init__(self, model: nn.Module) -> None:
        state = everyone()
        if state.num_processes == 1:
            raise AttachError(
                "one process has nobody to share the base with; start several: accelerate launch --config_file "
                "examples/accelerate/fsdp.yaml -m vismem_cli train"
            )
        if _set("FSDP_OFFLOAD_PARAMS"):
            raise AttachError("fsdp_offload_params: a shared base stays where it is computed; leave this setting out")
        self.layers: list[_Layer] = []
        self._held, self._whole = -1, torch.empty(0)
        self._wishes: Any = dist.new_group(backend="gloo")  # numbers that the CPU decides on
        owners = Counter(id(own) for module in model.modules() for own in module.parameters(recurse=False))
        for block in _blocks(model):
            parameters = [own for own in block.parameters() if own.dim() > 1 and owners[id(own)] == 1]
            if not parameters:
                continue
            chosen = set(parameters)
            for module in block.modules():  # parts of a block are run without the block, too
                if module is block or not chosen.isdisjoint(module.parameters(recurse=False)):
                    module.register_forward_pre_hook(self._before(len(self.layers)))
            self.layers.append(_Layer(parameters, state))
        if not self.layers:
            raise AttachError(f"{type(model).__name__} has no layers of transformers' that processes could share")
        model.to(state.device)
        _SHARED[model] = self

    def meet(self) -> None:
        """Serve the other processes until all of them are here."""
        self._until(len(self.layers))

    def saving(self) -> saved_tensors_hooks:
        """A context for graphs: they keep a layer's number instead of its weights."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _before(self, layer: int) -> Callable[..., None]:
        def hold(*_: Any) -> None:
            self._hold(layer)

        return hold

    def _hold(self, layer: int) -> Tensor:
        """The whole layer, in the places of its parameters, until another is held."""
        if layer != self._held:
            if self._held >= 0:
                self.layers[self._held].let_go()
            self._held, self._whole = -1, torch.empty(0)
            self._until(layer)
            self._whole = self.layers[layer].gather()
            self.layers[layer].take(self._whole)
            self._held = layer
        return self._whole

    def _until(self, wish: int) -> None:
        """Gather what others need until it is ``wish`` that is gathered next."""
        while (lowest := self._lowest(wish)) != wish:
            self.layers[lowest].gather()

    def _lowest(self, wish: int) -> int:
        wishes = torch.tensor(wish)
        dist.all_reduce(wishes, dist.ReduceOp.MIN, group=self._wishes)
        return int(wishes)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        whole = self._whole
        if not len(whole) or tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return tensor
        return _Saved(self._held, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return self._hold(saved.layer).view(saved.dtype).as_strided(saved.size, saved.stride, saved.offset)


_SHARED: WeakKeyDictionary[nn.Module, Shards] = WeakKeyDictionary()


def of(model: nn.Module) -> Shards | None:
    """How a model is shared, if it is."""
    return _SHARED.get(model)


def asked() -> bool:
    """Whether ``accelerate launch`` was told to share the base (its FSDP)."""
    return _set("ACCELERATE_USE_FSDP")


def everyone() -> Accelerator:
    """The processes that ``accelerate launch`` or ``torchrun`` started, and this one's place among them.

    Raises:
        TrainingError: there are others that cannot be reached.
    """
    found = Accelerator()  # reads what ``accelerate launch`` set
    started = os.environ.get("WORLD_SIZE", "1")
    if started != str(found.num_processes):
        raise TrainingError(
            f"started as one of {started} processes, which do not see each other: on the CPU, set "
            "ACCELERATE_USE_CPU=true"
        )
    return found


def _set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The outermost layers."""
    if isinstance(module, GradientCheckpointingLayer):
        return [module]
    return [block for child in module.children() for block in _blocks(child)]
