"""What a call held is gone when the call is: nothing waits in a circle for the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bases import QUESTIONS, config, tied

from vismem_core.config import TrainConfig
from vismem_core.decoding.replay import read_prompts
from vismem_core.training.batches import make_batch
from vismem_core.training.formation import Formation
from vismem_core.training.rollout import Sampling, rollouts
from vismem_plugins.mosaic import mosaic


@contextmanager
def circles() -> Iterator[list[Any]]:
    """Tensors that nothing but circles holds after the context."""
    gc.collect()
    gc.disable()
    found: list[Any] = []
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found += [own for own in gc.garbage if isinstance(own, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_circles_are_found() -> None:
    with circles() as found:
        one: dict[str, Any] = {"held": torch.zeros(3)}
        one["itself"] = one
        del one
    assert len(found) == 1


@pytest.mark.parametrize("trigger", ["policy", "schedule:0=short,3=long", "schedule:0=long"])
def test_calls_leave_none(trigger: str) -> None:
    base = tied()
    memory = base.attach(config(trigger=trigger))

    def call() -> None:
        base.generate(*QUESTIONS, eos_token_id=None)

    call()
    with circles() as found:
        call()
    assert found == []
    assert "schedule" not in trigger or len(memory.trace)


@pytest.mark.parametrize("what", ["rollouts", "formation", "forward"])
def test_training_leaves_none(what: str) -> None:
    base = tied()
    memory = base.attach(config())
    samples = [mosaic("train", types=["read"])[at] for at in range(2)]
    batch = make_batch(memory.backbone, samples)
    steps: dict[str, Callable[[], Any]] = {
        "rollouts": lambda: rollouts(
            memory, read_prompts(memory, batch.inputs), [0, 0, 1], [1, 2, 3], Sampling(max_new_tokens=6)
        ),
        "formation": lambda: Formation(memory, TrainConfig().formation).loss(batch, "key")[0].backward(),
        "forward": lambda: memory.model(**batch.inputs).logits.sum(),
    }
    steps[what]()
    with circles() as found:
        steps[what]()
    assert found == []
