"""A base whose layers two processes share: memory trains to the same numbers as where each process holds all of it.

Run by test_shards.py, as each of the two.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from bases import QUESTIONS, Base, config, llava_next, timm_lm, untied
from samples import SAMPLES
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from vismem_core.base import shards
from vismem_core.base.loading import load_base
from vismem_core.base.shards import Shards
from vismem_core.config import Config, GrpoConfig, MemoryConfig, PolicyConfig, PolicyStageConfig, TrainConfig
from vismem_core.config.schema import EvaluationConfig
from vismem_core.errors import AttachError
from vismem_core.training.run import train

STAGE = PolicyStageConfig(steps=2, batch=2, lr=1e-3)
GRPO = GrpoConfig(STAGE, STAGE, rewards=("call:samples:even",), group=4, max_new_tokens=10)


def trained(base: Base, settings: MemoryConfig, grpo: GrpoConfig, output: Path) -> dict[str, Tensor]:
    """Memory after a warm start and both stages of GRPO, evaluated after each step."""
    memory = base.attach(settings)
    often = EvaluationConfig(every=1, samples=1, keep="best")  # of one question, which one process has
    run = TrainConfig("all", "sft+grpo", formation=STAGE, grpo=grpo, evaluation=often, eval_samples=1, max_new_tokens=4)
    train(memory, SAMPLES, SAMPLES[:1], Config(settings, run), output)
    return {name: tensor.detach().clone() for name, tensor in memory.trained().items()}


def check(make: Callable[[], Base], settings: MemoryConfig, grpo: GrpoConfig, output: Path) -> None:
    """Nothing that is trained or written differs, nor the base afterwards; and each process holds half of a layer."""
    untrained = {name: tensor.detach().clone() for name, tensor in make().attach(settings).trained().items()}
    expected = trained(make(), settings, grpo, output / "whole")
    assert any(not expected[name].equal(tensor) for name, tensor in untrained.items())

    base = make()
    weights = {name: tensor.detach().clone() for name, tensor in base.model.named_parameters()}
    answers = base.generate(*QUESTIONS).sequences
    shared = Counting(base.model)
    matrices = [shape.numel() for layer in shared.layers for _, shape, _ in layer.places]
    kept = sum(map(Tensor.numel, base.model.parameters()))
    assert kept + sum(matrices) == sum(map(Tensor.numel, weights.values()))
    padding = 2 * shards.ALIGNED * len(shared.layers)
    assert 2 * sum(len(layer.part) for layer in shared.layers) <= 4 * sum(matrices) + padding
    assert base.generate(*QUESTIONS).sequences.equal(answers)

    for name, tensor in trained(base, settings, grpo, output / "shared").items():
        assert tensor.equal(expected[name]), name
    about = [json.loads((output / name / "vismem.json").read_text())["base"] for name in ("whole", "shared")]
    assert about[0] == about[1]
    assert shared.most <= 2, "autograd keeps layers"
    whole = [all(own.numel() for own, _, _ in layer.places) for layer in shared.layers]
    assert sum(whole) <= 1
    counts = [torch.tensor(0), torch.tensor(0)]
    dist.all_gather(counts, torch.tensor(shared.asked))
    assert counts[0] != counts[1], "the processes went in step: nothing was shown"
    for layer in shared.layers:
        layer.take(layer.gather())
    after = dict(base.model.named_parameters())
    assert all(after[name].equal(tensor) for name, tensor in weights.items())


class Counting(Shards):
    """Counts how often this process asked for a layer, and how many were whole at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.asked, self.most = 0, 0
        self.alive: list[StorageWeakRef] = []

    def _hold(self, layer: int) -> Tensor:
        before, whole = self._whole, super()._hold(layer)
        if whole is not before:
            self.asked += 1
            self.alive = [own for own in self.alive if not own.expired()] + [StorageWeakRef(whole.untyped_storage())]
            del before
            self.most = max(self.most, len(self.alive))
        return whole


def check_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP in a configuration of accelerate shares the layers; what it does not do is told."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    model, processor, _ = load_base("llava")
    found = Base(model, processor).generate(("what is it ?", []), max_new_tokens=4).sequences
    assert shards.of(model)
    whole, processor, _ = load_base("llava", device="cpu")
    assert not shards.of(whole)
    assert Base(whole, processor).generate(("what is it ?", []), max_new_tokens=4).sequences.equal(found)
    with pytest.raises(AttachError, match=r"Linear has no layers"):
        Shards(nn.Linear(2, 2))
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(AttachError, match=r"fsdp_offload_params"):
        load_base("llava")


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    other = config("transformer", "recompute", "cross", policy=PolicyConfig("lora", rank=4))
    check(untied, other, replace(GRPO, checkpointing=True), output / "recompute")
    for make in (llava_next, timm_lm):
        check(make, config(), GRPO, output / make.__name__)
    with pytest.MonkeyPatch.context() as patch:
        check_loading(patch)
