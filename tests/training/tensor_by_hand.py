"""Every model type that two processes may hold together, against one that holds all of it.

``torchrun --nproc_per_node 2 tests/training/tensor_by_hand.py FOLDER [TYPE ...]``, with ``ACCELERATE_USE_CPU=true`` and
tests and tests/conformance on ``PYTHONPATH``, tells of each type (by default, of all that the conformance suite passes)
whether tokens with memory and without are the same, and how far the gradients of Stage I are apart, as a share of the
greatest entry. Bases are in fp64, or in fp32 where a model knows nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from bases import Base, Question, config
from model_types import TYPES, build
from samples import SAMPLES
from survey import recorded
from torch import Tensor
from transformers.distributed import DistributedConfig

import vismem_core as vismem
from vismem_core.base import tensor
from vismem_core.config import StageConfig
from vismem_core.errors import VismemError
from vismem_core.plugins import reason
from vismem_core.training.batches import make_batch
from vismem_core.training.formation import Formation

QUESTIONS: list[Question] = [
    ("what is on the left ?", [tiny.picture(32, 32, 0)]),
    ("is it a boot or a coat ?", [tiny.picture(24, 56, 3)]),
]


def told(base: Base, source: Path, dtype: torch.dtype, *, make: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens with memory and without it, and the gradients."""
    if make:
        memory = base.attach(config())
        memory.save(source)
    else:
        memory = vismem.attach(base.model, base.processor, source)
    base.model.to(dtype)
    ids = [base.generate(*QUESTIONS).sequences]
    with memory.off():
        ids.append(base.generate(*QUESTIONS).sequences)
    torch.manual_seed(0)
    stage = Formation(memory, StageConfig())
    stage.accumulate(make_batch(memory.backbone, [SAMPLES[0], SAMPLES[3]]), "key", 0.0)
    graded = [own for own in memory.trained().values() if own.grad is not None]
    stage.processes.add_gradients(graded)  # those of two bases are of half a batch each
    return ids, [own.grad for own in graded if own.grad is not None]


def compare(model_type: str, folder: Path) -> str:
    """What differs, in words."""
    made, processor = build(model_type)
    tensor.refuse(model_type, made.config, 2)
    if dist.get_rank() == 0:
        made.save_pretrained(folder / "base")
    dist.barrier()
    for dtype in (torch.float64, torch.float32):
        try:
            whole = Base(_loaded(made, folder), processor)
            expected = told(whole, folder / str(dist.get_rank()), dtype, make=True)
            break
        except (RuntimeError, VismemError):
            if dtype is torch.float32:
                raise
    shared = Base(_loaded(made, folder, distributed_config=DistributedConfig(tp_size=2)), processor)
    found = told(shared, folder / "0", dtype, make=False)
    same = all(own.equal(other) for own, other in zip(found[0], expected[0], strict=True))
    pairs = zip(found[1], expected[1], strict=True)
    gap = max(((own - other).abs().max() / (other.abs().max() or 1)).item() for own, other in pairs)
    return f"{dtype}: tokens {'equal' if same else 'DIFFER'}, gradients {gap:.1e} apart"


def _loaded(made: Any, folder: Path, **options: Any) -> Any:
    return type(made).from_pretrained(folder / "base", dtype=torch.float32, **options).eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    tensor.everyone()
    folder = Path(sys.argv[1])
    for name in sys.argv[2:] or [own for own in TYPES if recorded()[own]["outcome"] == "passes"]:
        try:
            line = compare(name, folder / name)
        except VismemError as error:
            line = f"refused: {error}"
        except Exception as error:  # any model's code
            line = f"FAILS: {reason(error)}"
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{name}: {line}", flush=True)  # noqa: T201
