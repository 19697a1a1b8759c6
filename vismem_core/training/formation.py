"""Stage I by cross-entropy: raise the likelihood of the answer through the latents alone.

Memory is invoked at a random point of each answer, short or long with equal chance, or whichever the trigger allows.
Query builder and both formers train; the base and the four tokens' rows are frozen. This is the public code's
objective, made to train what it means to train; the paper's own is GRPO on the gain in score (Eq. 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor, nn

from vismem_core.config import KINDS, StageConfig
from vismem_core.memory.memory import FORMATION, Memory

from .batches import Batch
from .dropout import drops_images
from .processes import Processes
from .stage import LikelihoodStage
from .teacher import bring_up, groups, likelihood


class Formation(LikelihoodStage):
    """Stage I.

    Args:
        image_dropout: chance that an answer drops its images (:mod:`vismem_core.training.dropout`).
    """

    def __init__(
        self, memory: Memory, settings: StageConfig, processes: Processes | None = None, image_dropout: float = 0.0
    ) -> None:
        super().__init__(memory, settings, processes)
        self.image_dropout = image_dropout

    @property
    def ways(self) -> Sequence[str]:
        """The kinds that it trains, each forced: the policy does not ask for them yet."""
        return self.memory.active_trigger.kinds

    def parameters(self) -> list[tuple[str, nn.Parameter, float]]:
        """What trains: name, tensor, learning rate relative to the stage's."""
        trained = self.memory.trained()
        return [(name, tensor, 1.0) for name, tensor in trained.items() if name.startswith(FORMATION)]

    def loss(self, batch: Batch, key: str) -> tuple[Tensor, dict[str, float]]:
        """The mean negative log-likelihood per token."""
        memory, processes = self.memory, self.processes
        chances = [Random(f"{key}/{sample.id}") for sample in batch.samples]
        kinds = [rng.choice(memory.active_trigger.kinds) for rng in chances]
        points = invocation_points(memory, batch, chances, self.settings.anywhere)
        drops = [drops_images(memory, self.image_dropout, f"{key}/{sample.id}") for sample in batch.samples]
        forced = bring_up(memory, batch, kinds, points)
        own = torch.zeros(len(KINDS), 2)  # log-likelihood and tokens, by kind
        everyone = processes.total(torch.tensor(float(sum(forced.counts(range(len(batch))))))).item()
        losses = []
        for kind, rows in groups(kinds).items():
            latents = forced.session.form(rows, memory.builder, memory.former(kind))
            forced.session.hide_images([row for row in rows if drops[row]])
            end = memory.tokens.vectors(torch.full((len(rows), 1), memory.tokens.end(kind)), latents)
            told = likelihood(memory, forced, rows, torch.cat([latents, end], dim=1)).sum()
            losses.append(-told / everyone)
            own[KINDS.index(kind)] = torch.tensor([told.item(), float(sum(forced.counts(rows)))])
        own = processes.total(own)
        figures = {"loss": -own[:, 0].sum().item() / everyone}
        counts = zip(KINDS, own.tolist(), strict=True)
        figures |= {f"loss_{kind}": -told / count for kind, (told, count) in counts if count}
        return torch.stack(losses).sum(), figures


def invocation_points(memory: Memory, batch: Batch, chances: Sequence[Random], anywhere: float) -> list[int]:
    """A position in each answer before which memory may be invoked; before what is given, where something is."""
    return [
        0 if given else invocation_point(answer, memory.delimiters, rng, anywhere)
        for answer, given, rng in zip(batch.answers, batch.given, chances, strict=True)
    ]


def invocation_point(answer: Sequence[int], delimiters: frozenset[int], rng: Random, anywhere: float) -> int:
    """A position in ``answer`` (its end of turn included) before which memory may be invoked.

    With probability ``anywhere`` any position; otherwise the start half of the time, and else a place where a
    delimiter was written and something is left to say.
    """
    if rng.random() < anywhere:
        return rng.randrange(len(answer))
    places = [place for place in range(1, len(answer) - 1) if answer[place - 1] in delimiters]
    return 0 if not places or rng.random() < 0.5 else rng.choice(places)
