"""Several processes as one: accelerate is the engine, and all a stage needs of it is here.

Every process holds the whole memory and a part of each batch, and the whole base unless its layers are shared
(:mod:`vismem_core.base.shards`). Sums run over all of them, so that a step on two processes is the step of one process
on both parts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate.utils import gather, gather_object, reduce
from einops import rearrange
from torch import Tensor, nn

from vismem_core.base import shards
from vismem_core.errors import TrainingError

ENGINES = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
"""Engines of accelerate that expect the model to be handed to them, by the name in the variable that asks for them."""

Item = TypeVar("Item")


class Processes:
    """The processes that train together; one, unless ``accelerate launch`` or ``torchrun`` started more.

    Args:
        model: the base, whose layers they may share.

    Raises:
        TrainingError: the configuration asks for an engine that cannot train memory, or for a base to be shared that
            was loaded whole, or there are others that cannot be reached.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        for variable, name in ENGINES.items():
            if os.environ.get(f"ACCELERATE_USE_{variable}", "").lower() in ("1", "true"):
                raise TrainingError(
                    f"{name} is not supported: it would run every layer in all processes together, which memory does "
                    "not; launch with examples/accelerate/fsdp.yaml to share the base, or ddp.yaml where a GPU holds it"
                )
        self._shards = shards.of(model) if model is not None else None
        if shards.asked() and not self._shards:
            raise TrainingError("the base was loaded whole, and FSDP is to share it: load_base(..., device='shard')")
        self._state = shards.everyone()

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self._state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return bool(self._state.is_main_process)

    def part(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a batch; neighbours go to different processes.

        So if items come sorted by length, no part is longer than another by more than the longest item is than the
        shortest, and each has one of the longest.
        """
        return list(items[self._state.process_index :: self.count])

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count == 1:
            return value
        self._meet()
        everyone: Tensor = reduce(value.to(self._state.device), "sum")
        return everyone.to(value.device)

    def joined(self, value: Tensor) -> Tensor:
        """The rows of all processes, which hold equally many, in the order of :meth:`part`."""
        if self.count == 1:
            return value
        self._meet()
        everyone: Tensor = gather(value.to(self._state.device).contiguous())
        in_order: Tensor = rearrange(everyone, "(process row) ... -> (row process) ...", process=self.count)
        return in_order.to(value.device)

    def told(self, device: torch.device) -> str:
        """How many processes take part and on what, for people.

        Args:
            device: this one's.
        """
        devices = self.everyones([str(device)])
        names = ", ".join(f"{devices.count(name)} on {name}" for name in dict.fromkeys(devices))
        return f"{self.count} process{'es' if self.count > 1 else ''}: {names}"

    def everyones(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, one process's after the other's."""
        if self.count == 1:
            return list(items)
        self._meet()
        return list(gather_object(list(items)))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Each gradient becomes the sum of all processes'; what no process used gets zeros in all of them."""
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.total(grad)

    def wait(self) -> None:
        """Until all are here."""
        self._meet()
        self._state.wait_for_everyone()

    def graphs(self) -> AbstractContextManager[Any]:
        """A context for what is to be differentiated."""
        return self._shards.saving() if self._shards else nullcontext()

    def _meet(self) -> None:
        if self._shards:
            self._shards.meet()
