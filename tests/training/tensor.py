"""Memory on bases that processes hold together, against one process that holds all of each.

``python tensor.py FOLDER cpu CASE ...`` makes the bases, and what is expected; ``torchrun --nproc_per_node 2 tensor.py
FOLDER tensor:2 CASE ...`` compares, and ``infer`` for a case answers what is in asked.jsonl. test_tensor.py runs a few
cases, the others are run by hand.

Sums of parts differ from whole sums in their last bits, and with memory a bit grows: a latent is made of states. So
answers are compared in fp32, and again on a base in fp64, from which memory gets the same fp32 numbers whoever has
summed them; and so is training, where a sampled token may hang on one bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bases
import pytest
import torch
import torch.distributed as dist
from bases import QUESTIONS, Base, config
from samples import SAMPLES
from torch import Tensor, nn

import vismem_core as vismem
from vismem_cli import main
from vismem_core.base.loading import load_base
from vismem_core.base.tensor import mesh, whole
from vismem_core.config import (
    Config,
    GrpoConfig,
    MemoryConfig,
    PolicyConfig,
    PolicyStageConfig,
    StageConfig,
    TrainConfig,
)
from vismem_core.errors import RunInterruptedError
from vismem_core.files.checkpoint import fingerprint
from vismem_core.training.processes import Processes
from vismem_core.training.run import train

LORA = config(policy=PolicyConfig("lora", rank=4))


def whole_run(batch: int = 4, lr: float = 1e-3, **more: Any) -> TrainConfig:
    """A warm start and both stages of GRPO, of two steps each."""
    stage = PolicyStageConfig(steps=2, batch=batch, lr=lr)
    grpo = GrpoConfig(stage, stage, rewards=("call:samples:even",), group=4, max_new_tokens=10, **more)
    return TrainConfig(objective="sft+grpo", formation=stage, grpo=grpo, eval_samples=1, max_new_tokens=4)


WHOLE = whole_run()
ONE = StageConfig(steps=1, batch=4, lr=1e-3)
SHORT = TrainConfig(objective="sft", formation=ONE, invocation=ONE, eval_samples=1, max_new_tokens=4)
TOLERANCES = {"fp32": 1e-5, "memory": 1e-4, "fp64": 1e-6, "gradient": 1e-5, "trained": 1e-4}
"""How much may differ, as a share of the greatest entry."""


@dataclass
class Case:
    """A base of bases.py, memory's settings and a run.

    Where several hold the base, a run that ``resumes`` is stopped after so many steps, and their groups run ``parts``.
    """

    base: str
    settings: MemoryConfig
    run: TrainConfig
    resumes: int = 0
    parts: TrainConfig | None = None


def dry(settings: MemoryConfig) -> MemoryConfig:
    """Without dropout, which is another one where a batch is dealt to several."""
    return replace(settings, short=replace(settings.short, dropout=0.0), long=replace(settings.long, dropout=0.0))


CASES = {
    "qwen2_5_vl": Case("untied", LORA, WHOLE, resumes=3),
    "internvl": Case("internvl", config(), SHORT),
    "llava": Case("llava", config(), SHORT),
    "llava_next": Case("llava_next", config(), SHORT),
    "llava_onevision": Case("llava_onevision", config(), SHORT),
    "timm_lm": Case("timm_lm", config(), SHORT),
    # By hand
    "groups": Case("untied", dry(LORA), whole_run(4, 1e-5, settled=1.0), parts=whole_run(2, 1e-5, settled=1.0)),
    "recompute": Case(
        "tied",
        config("transformer", "recompute", "cross", policy=PolicyConfig("lora", rank=4)),
        replace(WHOLE, grpo=replace(WHOLE.grpo, checkpointing=True)),
    ),
    "reread": Case("llava_next", replace(LORA, long=replace(LORA.long, context="recompute")), WHOLE),
    "dropped": Case(
        "untied", replace(LORA, drop_image_after_invocation=True), replace(WHOLE, image_dropout=0.5), resumes=5
    ),
    "places": Case("untied", replace(LORA, places="image"), WHOLE),
    "mini": Case("mini", LORA, WHOLE),
}
CASES |= {f"{name}_grpo": replace(own, settings=LORA, run=WHOLE) for name, own in CASES.items() if own.run is SHORT}


def found(case: Case, folder: Path, device: str) -> dict[str, Any]:
    """All that is compared, by what it is: ``KIND NAME``."""
    told: dict[str, Any] = {}
    model, processor, _ = load_base(model=str(folder / "base"), device=device)
    base = Base(model, processor)
    _asked(told, "fp32 base", base)
    if device == "cpu":
        untrained = base.attach(case.settings)
        untrained.save(folder / "memory")
        untrained.detach()
    else:
        assert model.lm_head.weight.to_local().numel() < model.lm_head.weight.numel()
        torch.manual_seed(dist.get_rank())
    memory = vismem.attach(model, processor, folder / "memory")
    told["fingerprint"] = fingerprint(memory.backbone)
    _asked(told, "memory on", base)
    told["memory latents"] = torch.cat([own.latents for own in memory.trace.invocations])
    with memory.off():
        _asked(told, "fp32 off", base)
    together = mesh(model).get_group() if mesh(model) else None
    _same(base.generate(*QUESTIONS, do_sample=True, temperature=2.0, top_k=0).sequences, together)
    model.double()
    _asked(told, "fp64 on", base)
    before = {name: whole(own.detach()).clone() for name, own in model.named_parameters()}
    _trained(told, case, memory, folder / device.partition(":")[0])
    assert all(whole(own.detach()).equal(before[name]) for name, own in model.named_parameters())
    return told


def _asked(told: dict[str, Any], name: str, base: Base) -> None:
    answer = base.generate(*QUESTIONS)
    told[f"ids, {name}"], told[name] = answer.sequences, torch.stack(answer.logits)


def _trained(told: dict[str, Any], case: Case, memory: vismem.Memory, output: Path) -> None:
    """A run, the gradients of each of its steps, and what it has trained."""
    steps: list[list[Tensor]] = []
    usual = Processes.add_gradients

    def noted(processes: Processes, parameters: Iterable[nn.Parameter]) -> None:
        own = list(parameters)
        usual(processes, own)
        steps.append([parameter.grad.clone() for parameter in own if parameter.grad is not None])
        if stops and len(steps) > stops:
            raise KeyboardInterrupt

    several = output.name == "tensor"
    settings, stops = Config(case.settings, case.parts if several and case.parts else case.run), case.resumes * several
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "add_gradients", noted)
        if resume := bool(stops):
            with pytest.raises(RunInterruptedError):
                train(memory, SAMPLES, SAMPLES[:1], settings, output)
            stops = 0
            del steps[-1]
        train(memory, SAMPLES, SAMPLES[:1], settings, output, resume=resume)
    told |= {f"gradient {at}/{number}": own for at, step in enumerate(steps) for number, own in enumerate(step)}
    told |= {f"trained {name}": _same(own.detach()).clone() for name, own in memory.trained().items()}


def _same(own: Tensor, group: Any = None) -> Tensor:
    """What this process has, which is to the last bit what every other has (of ``group``)."""
    if dist.is_initialized():
        everyones = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyones, own.contiguous(), group=group)
        assert all(other.equal(own) for other in everyones)
    return own


def compare(told: dict[str, Any], expected: dict[str, Any], slack: float) -> dict[str, float]:
    """The greatest difference of each kind; what has none is equal."""
    assert told.keys() == expected.keys()
    worst: dict[str, float] = {}
    for name, own in told.items():
        kind, other = name.partition(" ")[0], expected[name]
        if kind not in TOLERANCES:
            assert own.equal(other) if isinstance(own, Tensor) else own == other, name
            continue
        assert own.shape == other.shape and own.isfinite().equal(other.isfinite()), name
        known = other.isfinite()
        gap = (own - other)[known].abs().max().item() / (other[known].abs().max().item() or 1.0)
        assert gap <= slack * TOLERANCES[kind], f"{name}: {gap}"
        worst[kind] = max(worst.get(kind, 0.0), gap)
    return worst


def answer(folder: Path, device: str) -> None:
    """``vismem infer`` on a file of questions."""
    asked, told = str(folder / "asked.jsonl"), str(folder / "answers.jsonl")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["infer", "--device", device, "--data", asked, "--output", told, "--max-new-tokens", "8", "--json"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, device = Path(sys.argv[1]), sys.argv[2]
    for name in sys.argv[3:]:
        if name == "infer":
            answer(folder, device)
            continue
        case, here = CASES[name], folder / name
        if device == "cpu":
            made = getattr(bases, case.base)()
            made.model.save_pretrained(here / "base")
            made.processor.save_pretrained(here / "base")
            torch.save(found(case, here, device), here / "expected.pt")
        else:
            slack = 10.0 if case.parts else 1.0  # sums over a batch in parts are memory's own, in fp32
            worst = compare(found(case, here, device), torch.load(here / "expected.pt", weights_only=True), slack)
            if dist.get_rank() == 0:
                print(name, worst, file=sys.stderr)  # noqa: T201
