"""The log-probabilities of sampled trajectories again, with gradients, and batches of them that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vismem_core.config import KINDS
from vismem_core.decoding.loop import NEVER
from vismem_core.decoding.replay import Prompts, Replay
from vismem_core.memory.memory import Memory

from .rollout import Trajectory


class TrajectoryReplay(Replay):
    """A micro-batch of R trajectories.

    Args:
        temperature: at which they were sampled.
        checkpointing: compute the decoder's layers again in the backward pass instead of keeping their insides.
    """

    def __init__(
        self,
        memory: Memory,
        prompts: Prompts,
        trajectories: Sequence[Trajectory],
        temperature: float = 1.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(memory, prompts, trajectories, checkpointing)
        self.trajectories, self.temperature = trajectories, temperature or 1.0

    def logprobs(self, *, form: bool) -> Tensor:
        """Log-probability of every id the policy chose, (R, T) with zeros elsewhere.

        Args:
            form: form the memory anew, with gradients; otherwise the rollout's latents are constants.
        """
        hidden = self.hidden(form=form)
        chosen = [(r, t) for r, own in enumerate(self.trajectories) for t, free in enumerate(own.chosen) if free]
        longest = max(len(own.ids) for own in self.trajectories)
        result = hidden.new_zeros(len(self.trajectories), longest, dtype=torch.float32)
        if not chosen:
            return result
        rows = torch.tensor([row for row, _ in chosen], device=hidden.device)
        before = torch.tensor([self.slots[row][index] for row, index in chosen], device=hidden.device)
        states = hidden[rows, before]
        tokens = self.memory.tokens
        logits = self.backbone.logits(states).float()
        media = torch.tensor(self.backbone.media, dtype=torch.long, device=logits.device)
        logits = logits.index_fill(1, media, NEVER)  # as in the rollout
        asks = tokens.logits(states).to(logits.device)
        offered = torch.tensor([self.trajectories[row].offered[index] for row, index in chosen], device=logits.device)
        asks = asks.masked_fill(~offered, NEVER)
        logits = F.pad(torch.cat([_to(logits, tokens.first), asks], dim=1), (0, len(KINDS)), value=NEVER)
        ids = torch.tensor([self.trajectories[row].ids[index] for row, index in chosen], device=logits.device)
        own = -F.cross_entropy(logits / self.temperature, ids, reduction="none")
        index = torch.tensor([index for _, index in chosen], device=hidden.device)
        return result.index_put((rows, index), own.to(result))


def micro_batches(
    trajectories: Sequence[Trajectory], rows: Sequence[int], prompt: int, budget: int
) -> Iterator[list[int]]:
    """Rows together, none shorter than half of another, as many as have ``budget`` positions.

    Args:
        prompt: columns of their prompts. Each row holds its own copy of them, and padding counts too.
    """
    lengths = {row: trajectories[row].slots[-1] for row in rows}
    batch: list[int] = []
    for row in sorted(rows, key=lambda own: -lengths[own]):
        longest = lengths[batch[0]] if batch else 0
        if batch and ((len(batch) + 1) * (prompt + longest) > budget or 2 * lengths[row] < longest):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _to(logits: Tensor, width: int) -> Tensor:
    return F.pad(logits, (0, width - logits.shape[1]), value=NEVER)
