"""A training that was interrupted: weights and AdamW's averages as safetensors, with the number of steps done."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

AVERAGES = ("step", "exp_avg", "exp_avg_sq")


def save(path: Path, model: Any, optimizer: torch.optim.Optimizer, done: int) -> None:
    """Writes the state whole or not at all."""
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[name] = weight.detach()
        for average, value in optimizer.state.get(weight, {}).items():
            tensors[f"{average}/{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata={"done": str(done)})
    unfinished.replace(path)


def load(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Puts the state back; returns the number of steps done."""
    with safe_open(path, "pt") as file, torch.no_grad():
        stored = set(file.keys())
        for name, weight in model.named_parameters():
            weight.copy_(file.get_tensor(name))
            averages = {key: file.get_tensor(f"{key}/{name}") for key in AVERAGES if f"{key}/{name}" in stored}
            if averages:
                optimizer.state[weight] = averages
        return int(file.metadata()["done"])
