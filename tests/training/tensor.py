"""Memory on bases that processes hold together, against one process that holds all of each. Run by test_tensor.py.

    python tensor.py FOLDER cpu FAMILY ...         # makes the bases, and what is expected
    torchrun ... tensor.py FOLDER tensor:2 FAMILY ...
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bases
import pytest
import tiny
import torch
import torch.distributed as dist
from bases import QUESTIONS, Base, config
from samples import SAMPLES
from torch import Tensor, nn

import vismem_core as vismem
from vismem_core.base.loading import load_base
from vismem_core.base.tensor import whole
from vismem_core.config import Config, GrpoConfig, PolicyConfig, PolicyStageConfig, TrainConfig
from vismem_core.files.checkpoint import fingerprint
from vismem_core.training.processes import Processes
from vismem_core.training.run import train

SETTINGS = config(policy=PolicyConfig("lora", rank=4))
STAGE = PolicyStageConfig(steps=2, batch=4, lr=1e-3)
GRPO = GrpoConfig(STAGE, STAGE, rewards=("call:samples:even",), group=4, max_new_tokens=10)
RUN = TrainConfig(objective="sft+grpo", formation=STAGE, grpo=GRPO, eval_samples=1, max_new_tokens=4)


def found(folder: Path, device: str, output: Path) -> dict[str, Any]:
    """All that is compared, by name."""
    told: dict[str, Any] = {}
    model, processor, _ = load_base(model=str(folder / "base"), device=device)
    base, weights = Base(model, processor), {name: whole(own.detach()).clone() for name, own in model.named_parameters()}
    _asked(told, "base", base)
    if device == "cpu":
        base.attach(SETTINGS).save(folder / "memory")
        model, processor, _ = load_base(model=str(folder / "base"), device=device)
        base = Base(model, processor)
    random.seed(str(dist.get_rank() if dist.is_initialized() else 0))
    torch.manual_seed(random.getrandbits(32))
    memory = vismem.attach(model, processor, folder / "memory")
    told["fingerprint"] = fingerprint(memory.backbone)
    _asked(told, "on", base)
    told["latents"] = torch.cat([own.latents for own in memory.trace.invocations])
    with memory.off():
        _asked(told, "off", base)
    told["seen"] = _same(base.generate(*QUESTIONS, do_sample=True).sequences) is not None
    with pytest.MonkeyPatch.context() as patch:
        _trained(told, memory, output, patch)
    after = {name: whole(own.detach()) for name, own in model.named_parameters()}
    assert all(after[name].equal(own) for name, own in weights.items())
    memory.detach()
    _asked(told, "detached", base)
    return told


def _asked(told: dict[str, Any], name: str, base: Base) -> None:
    answer = base.generate(*QUESTIONS)
    told[f"{name}.ids"], told[f"{name}.logits"] = answer.sequences, torch.stack(answer.logits)


def _trained(told: dict[str, Any], memory: vismem.Memory, output: Path, patch: pytest.MonkeyPatch) -> None:
    """A run of three stages, and the gradients of each step."""
    steps: list[list[Tensor]] = []

    def noted(processes: Processes, parameters: Iterable[nn.Parameter]) -> None:
        own = list(parameters)
        usual(processes, own)
        steps.append([parameter.grad.clone() for parameter in own if parameter.grad is not None])

    usual = Processes.add_gradients
    patch.setattr(Processes, "add_gradients", noted)
    train(memory, SAMPLES, SAMPLES[:1], Config(SETTINGS, RUN), output)
    told |= {f"gradient {at}.{number}": own for at, step in enumerate(steps) for number, own in enumerate(step)}
    told |= {f"trained {name}": _same(own.detach()) for name, own in memory.trained().items()}


def _same(own: Tensor) -> Tensor:
    """What this process has, which is to the last bit what every other has."""
    if dist.is_initialized():
        everyones = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, own.contiguous())
        assert all(other.equal(own) for other in everyones)
    return own.clone()


def compare(told: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The greatest difference of each kind of tensor; everything else is equal."""
    assert told.keys() == expected.keys()
    worst: dict[str, float] = {}
    for name, own in told.items():
        if isinstance(own, Tensor) and own.is_floating_point():
            kind, known = name.partition(" ")[0], expected[name].isfinite()
            assert own.isfinite().equal(known), name
            gap = (own - expected[name])[known].abs().max().item()
            worst[kind] = max(worst.get(kind, 0.0), gap)
        else:
            assert torch.equal(own, expected[name]) if isinstance(own, Tensor) else own == expected[name], name
    return worst


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, device = Path(sys.argv[1]), sys.argv[2]
    for name in sys.argv[3:]:
        here = folder / name
        if device == "cpu":
            made = getattr(bases, name)()
            made.model.save_pretrained(here / "base")
            made.processor.save_pretrained(here / "base")
            torch.save(found(here, device, here / "one"), here / "expected.pt")
        else:
            worst = compare(found(here, device, here / "shared"), torch.load(here / "expected.pt"))
            print(name, worst, flush=True)
