"""The state of a run on disk: one safetensors file, replaced atomically, from which ``--resume`` goes on.

All randomness of a step comes from the seed, the stage and the step's number, so the trained tensors, the
optimiser's moments and three numbers are the whole state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vismem_core.errors import TrainingError
from vismem_core.files.checkpoint import atomically, fill
from vismem_core.files.samples import Skipped
from vismem_core.memory.memory import Memory

from .stage import Stage

FILE = "state.safetensors"


@dataclass(frozen=True)
class State:
    """What was on disk.

    Attributes:
        step: how many steps of ``stage`` are done.
        finished: whether the stage was finished after its last step.
        rank: what was evaluated there; see :data:`vismem_core.training.metrics.Mark`.
        callbacks: what they must know, as JSON.
        tensors: by the names that :class:`Saver` wrote.
        left_out: bad samples that were met so far.
    """

    stage: str
    step: int
    finished: bool
    rank: int
    callbacks: str
    tensors: dict[str, Tensor]
    left_out: tuple[Skipped, ...]


class Saver:
    """Writes the state after the last whole step of a stage, whatever has happened to the run since.

    Nothing is copied: between whole steps, only the optimiser's step changes what is saved.

    Args:
        left_out: bad samples so far; the list may grow.
    """

    def __init__(
        self,
        folder: Path,
        memory: Memory,
        optimizer: torch.optim.Optimizer,
        stage: Stage,
        name: str,
        left_out: Sequence[Skipped],
    ) -> None:
        self.folder, self.memory, self.optimizer, self.stage, self.name = folder, memory, optimizer, stage, name
        self.left_out = left_out
        self._last: tuple[dict[str, Tensor], dict[str, str]] | None = None
        self._torn = self._written = False

    @contextmanager
    def torn(self) -> Iterator[None]:
        """What is inside changes what is saved, and must call :meth:`whole` at its end."""
        self._torn = True
        yield
        self._torn = False

    def whole(self, step: int, position: int, rank: int, callbacks: str, *, finished: bool = False) -> None:
        """``step`` steps are done, for which ``position`` samples were drawn; and all of the stage, if finished.

        Args:
            rank, callbacks: as in :class:`State`.
        """
        tensors = {f"stage.{name}": tensor for name, tensor in self.stage.state().items()}
        tensors["sampler.position"] = torch.tensor(position)
        about = {"stage": self.name, "step": str(step), "finished": str(int(finished))}
        about |= {"rank": str(rank), "callbacks": callbacks}
        self._last, self._written = (tensors, about), False

    def write(self) -> str | None:
        """Write the last whole step, unless it is written or there is none; say which it is.

        A step after which something trained is not finite is not worth to go on from, and not written.
        """
        if self._last is None or self.where is None:
            return None
        tensors, about = self._last
        if not self._written:
            about["left_out"] = json.dumps([asdict(own) for own in self.left_out])
            tensors = tensors | self._trained()
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            atomically(self.folder / FILE, lambda path: save_file(tensors, path, metadata=about))
            self._written = True
        return self.where

    @property
    def where(self) -> str | None:
        """The last whole step, for people; None if there is none that is worth to go on from."""
        if self._last is None or self._torn or not_finite(self.memory):
            return None
        about = self._last[1]
        return f"the end of {self.name}" if int(about["finished"]) else f"{self.name}, step {about['step']}"

    def _trained(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"memory.{name}": tensor for name, tensor in self.memory.trained().items()}
        names = {own: group["name"] for group in self.optimizer.param_groups for own in group["params"]}
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():
                tensors[f"optimizer.{names[parameter]}.{key}"] = torch.as_tensor(value)
        return tensors


def not_finite(memory: Memory) -> str | None:
    """The name of a trained tensor that holds NaN or infinity, if there is one."""
    return next((name for name, own in memory.trained().items() if not own.isfinite().all()), None)


def load(folder: Path, memory: Memory) -> State:
    """Fill ``memory``, and give the rest.

    Raises:
        TrainingError: a damaged file.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as stored:
            about = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        lost = tuple(Skipped(**own) for own in json.loads(about["left_out"]))
        done = bool(int(about["finished"]))
        told = State(about["stage"], int(about["step"]), done, int(about["rank"]), about["callbacks"], tensors, lost)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path}: cannot go on from it: {error}") from error
    fill(memory.trained(), part(tensors, "memory."), path)
    return told


def restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the moments back that :func:`save` wrote."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if moments := part(tensors, f"optimizer.{group['name']}."):
                optimizer.state[parameter] = {
                    key: own if own.ndim == 0 else own.to(parameter.device) for key, own in moments.items()
                }


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): own for name, own in tensors.items() if name.startswith(prefix)}
