"""Stage I by cross-entropy: raise the likelihood of the answer through the latents alone.

Memory is invoked at a random point of each answer, short or long with equal chance. Query builder and both formers
train; the base and the four tokens' rows are frozen. This is the public code's objective, made to train what it
means to train; the paper's own is GRPO on the gain in score (Eq. 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn

from ..config import KINDS, Kind, StageConfig
from ..memory import Memory
from .batches import Batch
from .teacher import bring_up, groups, likelihood


class Formation:
    """Stage I."""

    name = "formation"

    def __init__(self, memory: Memory, settings: StageConfig) -> None:
        self.memory, self.settings = memory, settings

    def parameters(self) -> list[tuple[str, nn.Parameter, float]]:
        """What trains: name, tensor, learning rate relative to the stage's."""
        trained = self.memory.trained()
        return [(name, tensor, 1.0) for name, tensor in trained.items() if not name.startswith("tokens.")]

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know beyond its parameters: nothing."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""

    def finish(self) -> None:
        """Nothing is left to do after the last step."""

    def loss(self, batch: Batch, rng: Random) -> tuple[Tensor, dict[str, float]]:
        """Mean negative log-likelihood per token, and figures for the log."""
        memory = self.memory
        kinds = [rng.choice(KINDS) for _ in batch.answers]
        points = [invocation_point(answer, memory.delimiters, rng, self.settings.anywhere) for answer in batch.answers]
        forced = bring_up(memory, batch, kinds, points)
        losses: dict[Kind, Tensor] = {}
        for kind, rows in groups(kinds).items():
            latents = forced.session.form(rows, memory.builder, memory.former(kind))
            end = memory.tokens.vectors(torch.full((len(rows), 1), memory.tokens.end(kind)), latents)
            told = likelihood(memory, forced, rows, torch.cat([latents, end], dim=1))
            losses[kind] = -told.sum() / sum(len(forced.rests[row]) for row in rows)
        shares = {kind: kinds.count(kind) / len(kinds) for kind in losses}
        total = torch.stack([shares[kind] * loss for kind, loss in losses.items()]).sum()
        return total, {f"loss_{kind}": loss.item() for kind, loss in losses.items()}


def invocation_point(answer: Sequence[int], delimiters: frozenset[int], rng: Random, anywhere: float) -> int:
    """A position in ``answer`` (its end of turn included) before which memory may be invoked.

    With probability ``anywhere`` any position; otherwise the start half of the time, and else a place where a
    delimiter was written and something is left to say.
    """
    if rng.random() < anywhere:
        return rng.randrange(len(answer))
    places = [place for place in range(1, len(answer) - 1) if answer[place - 1] in delimiters]
    return 0 if not places or rng.random() < 0.5 else rng.choice(places)
