"""Random models and memories that are worth testing: what goes in makes a difference to what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vismem_core.base.backbone import head_of
from vismem_core.memory.memory import Memory


def liven(model: Any) -> None:
    """Make a random model depend on all that it is given, in place.

    As initialised, networks of this size hardly look at their input, and then no wrong answer shows. So what the
    layers write outweighs the embeddings, and the final norm spreads the logits.
    """
    tables = {model.get_input_embeddings().weight, head_of(model).weight}
    norms = [own for name, own in model.get_decoder().named_parameters() if own.ndim == 1 and name.endswith("weight")]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter not in tables:
                parameter.mul_(10.0)
        norms[-1].mul_(16.0)


def awaken(memory: Memory, seed: int = 1, noise: float = 0.2) -> None:
    """Move every trained tensor off its initial value, in place: a fresh LoRA does nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in memory.trained().values():
            tensor.add_((noise * torch.randn(tensor.shape, generator=generator)).to(tensor))


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise of the given size in pixels."""
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def close(got: Tensor, expected: Tensor, otherwise: str = "") -> None:
    """Assert that two roads in fp32 led to the same numbers; ``otherwise`` says what it means if they did not."""
    atol = _rounding(expected)
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-4, msg=lambda told: f"{otherwise}\n{told}".lstrip())


def moved(before: Tensor, after: Tensor) -> bool:
    """Whether two tensors of one shape differ by so much that no :func:`close` takes them for the same."""
    return float((before - after).abs().max()) > 10 * _rounding(after)


def _rounding(numbers: Tensor) -> float:
    # It grows with the largest of the numbers that were added up.
    # What is never to be, some models write as the lowest number there is.
    sizes = numbers[numbers.abs() < torch.finfo(numbers.dtype).max].abs()
    return 1e-4 * max(1.0, float(sizes.max()) if len(sizes) else 0.0)
