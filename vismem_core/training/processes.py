"""Several processes as one: accelerate is the engine, and all a stage needs of it is here.

Every process holds the whole memory, and the whole base unless several hold one together
(:mod:`vismem_core.base.tensor`). These count as one here: they have the same part of each batch, and the same sums.
A step on two counts is the step of one on both parts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import gather, gather_object, reduce
from einops import rearrange
from torch import Tensor, nn

from vismem_core.base import tensor
from vismem_core.errors import TrainingError, cut

ENGINES = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "FSDP": "FSDP"}
"""Engines of accelerate that expect the model to be handed to them, by the name in the variable that asks for them."""

Item = TypeVar("Item")


class Processes:
    """The processes that train together; one, unless ``accelerate launch`` or ``torchrun`` started more.

    Args:
        model: the base, which several of them may hold together.

    Raises:
        TrainingError: the configuration asks for an engine that cannot train memory, or there are others that cannot
            be reached.
    """

    _holders = 1

    def __init__(self, model: nn.Module | None = None) -> None:
        for variable, name in ENGINES.items():
            if os.environ.get(f"ACCELERATE_USE_{variable}", "").lower() in ("1", "true"):
                raise TrainingError(
                    f"{name} is not supported: it would run every layer in all processes together, which memory does "
                    "not; use --device tensor to hold the base together, or examples/accelerate/ddp.yaml where a GPU "
                    "holds it"
                )
        self._state, self._model = tensor.everyone(), model
        if (among := tensor.mesh(model)) is not None:
            self._holders = int(among.size())

    @property
    def count(self) -> int:
        """How many there are; those that hold one base together count as one."""
        return int(self._state.num_processes) // self._holders

    @property
    def number(self) -> int:
        """Which of them this one is, from 0."""
        return int(self._state.process_index) // self._holders

    @property
    def first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return bool(self._state.is_main_process)

    @property
    def leads(self) -> bool:
        """Whether this one does what is done once: it is the first, or holds the base together with it."""
        return self.number == 0

    @property
    def rank(self) -> tuple[int, int]:
        """This one's number among all, and how many there are, each counted."""
        return int(self._state.process_index), int(self._state.num_processes)

    def part(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a batch; neighbours go to different processes.

        So if items come sorted by length, no part is longer than another by more than the longest item is than the
        shortest, and each has one of the longest.
        """
        return list(items[self.number :: self.count])

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        return self._sum(value) if self.count > 1 else value

    def joined(self, value: Tensor) -> Tensor:
        """The rows of all processes, which hold equally many, in the order of :meth:`part`."""
        if self.count == 1:
            return value
        everyone: Tensor = gather(value.to(self._state.device).contiguous())
        told = {"process": self.count, "holder": self._holders}
        in_order: Tensor = rearrange(everyone, "(process holder row) ... -> holder (row process) ...", **told)[0]
        return in_order.to(value.device)

    def told(self, device: torch.device) -> str:
        """How many processes take part and on what, for people.

        Args:
            device: this one's.
        """
        devices = gather_object([str(device)]) if self._state.num_processes > 1 else [str(device)]
        names = ", ".join(f"{devices.count(name)} on {name}" for name in dict.fromkeys(devices))
        held = f", {self._holders} to a base" if self._holders > 1 else ""
        return f"{len(devices)} process{'es' if len(devices) > 1 else ''}: {names}{held}"

    def everyones(self, items: Sequence[Item]) -> list[Item]:
        """The items of all processes, one process's after the other's; of those that hold a base, each one's."""
        return list(gather_object(list(items))) if self.count > 1 else list(items)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Each gradient becomes the sum of all processes'; what no process used gets zeros in all of them."""
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self._sum(grad)  # the same bits in those that hold a base together

    def agreed(self, values: Sequence[float]) -> list[float]:
        """What the first of those that hold this one's base has: a reward may say something else to each."""
        if self._holders == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=self._state.device)
        return tensor.agreed(self._model, told).tolist()

    def anyone(self, says: bool) -> bool:
        """Whether it is true of any process; all have to ask."""
        return bool(self._sum(torch.tensor(float(says))).item())

    def same(self, told: Mapping[str, Any], advice: str) -> None:
        """See that all processes have the same; all have to ask.

        Raises:
            TrainingError: in all of them, naming the first that has something else, and what that is.
        """
        everyones = gather_object([dict(told)]) if self._state.num_processes > 1 else [told]
        first = everyones[0]
        for number, own in enumerate(everyones):
            for key in first | own:
                if (here := first.get(key)) != (there := own.get(key)):
                    found = f"process {number} has {key} {cut(repr(there))}, and process 0 {cut(repr(here))}"
                    raise TrainingError(f"{found}; {advice}")

    def wait(self) -> None:
        """Until all are here."""
        self._state.wait_for_everyone()

    def _sum(self, value: Tensor) -> Tensor:
        """Over all processes; those that hold a base together have the same, and it counts once."""
        if self._state.num_processes == 1:
            return value
        everyone: Tensor = reduce(value.to(self._state.device), "sum") / self._holders
        return everyone.to(value)
