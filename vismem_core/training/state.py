"""The state of a run on disk: one safetensors file, replaced atomically, from which ``--resume`` goes on.

All randomness of a step comes from the seed, the stage and the step's number, so the trained tensors, the
optimiser's moments and three numbers are the whole state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoint import atomically, fill
from ..errors import TrainingError
from ..memory import Memory

FILE = "state.safetensors"


def save(
    folder: Path,
    memory: Memory,
    optimizer: torch.optim.Optimizer,
    stage: str,
    step: int,
    position: int,
    extra: Mapping[str, Tensor],
) -> None:
    """Write the state after ``step`` steps of ``stage``, with what the stage itself wants kept (``extra``).

    Args:
        position: how many samples the stage has drawn.
    """
    tensors: dict[str, Tensor] = {f"memory.{name}": tensor for name, tensor in memory.trained().items()}
    tensors["sampler.position"] = torch.tensor(position)
    tensors |= {f"stage.{name}": tensor for name, tensor in extra.items()}
    names = {parameter: group["name"] for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, moments in optimizer.state.items():
        for key, value in moments.items():
            tensors[f"optimizer.{names[parameter]}.{key}"] = torch.as_tensor(value)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"stage": stage, "step": str(step)}
    atomically(folder / FILE, lambda path: save_file(tensors, path, metadata=about))


def load(folder: Path, memory: Memory) -> tuple[str, int, dict[str, Tensor]]:
    """Fill ``memory``; give the stage, its steps done and all tensors by the names that :func:`save` wrote.

    Raises:
        TrainingError: a damaged file.
    """
    path = folder / FILE
    try:
        with safe_open(path, framework="pt") as stored:
            about = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: cannot go on from it: {error}") from error
    fill(memory, part(tensors, "memory."), path)
    return about["stage"], int(about["step"]), tensors


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
