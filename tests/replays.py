"""Rollouts to be replayed, and what a replay is compared by."""

from __future__ import annotations

from samples import SAMPLES
from torch import Tensor, tensor
from torch.nn.utils.rnn import pad_sequence

from vismem_core import Memory
from vismem_core.decoding.replay import Prompts, read_prompts
from vismem_core.training.batches import make_batch
from vismem_core.training.rollout import Sampling, Trajectory, rollouts


def told(
    memory: Memory, trigger: str, temperature: float = 1.0, dropout: float = 0.0
) -> tuple[Prompts, list[Trajectory]]:
    """Three trajectories for each sample, in which memory is invoked many times."""
    read = read_prompts(memory, make_batch(memory.backbone, SAMPLES).inputs)
    with memory.triggered(trigger):
        copies = [prompt for prompt in range(len(SAMPLES)) for _ in range(3)]
        return read, rollouts(memory, read, copies, list(range(12)), Sampling(temperature, 1.0, 20, dropout))


def recorded(trajectories: list[Trajectory]) -> Tensor:
    return pad_sequence([tensor(own.logprobs) for own in trajectories], batch_first=True)


def gradients(memory: Memory, total: Tensor) -> dict[str, Tensor]:
    memory.zero_grad()
    for own in memory.trained().values():
        own.grad = None
    total.backward()
    return {name: own.grad.clone() for name, own in memory.trained().items() if own.grad is not None}
