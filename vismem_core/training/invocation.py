"""Stage II by likelihood: the invocation tokens' output rows learn to ask for memory where it pays.

At a point of the answer, the rest is scored three times: without memory, with short and with long. A score is the
mean probability of the rest's tokens, from 0 to 1 as a reward is, less a cost for asking. The better a choice scores,
the likelier the policy should be to make it there (:mod:`vismem_core.training.choices`).

Only the output rows train. Input rows that learn from the likelihood of answers become prompts: they teach the base
the task without the latents' help, and replacing these by noise would then change little. The paper's own objective is
GRPO with its two penalties (Eq. 8), which trains all rows.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor, nn

from vismem_core.config import KINDS, Kind, TrainConfig
from vismem_core.memory.memory import Memory

from .batches import Batch
from .choices import Choices
from .dropout import drops_images
from .formation import invocation_points
from .processes import Processes
from .stage import LikelihoodStage
from .teacher import bring_up, likelihood


class InvocationStage(LikelihoodStage):
    """Stage II."""

    def __init__(self, memory: Memory, config: TrainConfig, processes: Processes | None = None) -> None:
        super().__init__(memory, config.invocation, processes)
        self.config = config
        self.choices = Choices(memory, self.processes, config.temperature, trials=False)

    def parameters(self) -> list[tuple[str, nn.Parameter, float]]:
        """What trains: name, tensor, learning rate relative to the stage's."""
        return [("tokens.head", self.memory.tokens.head, 1.0)]

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know beyond its parameters."""
        return self.choices.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        self.choices.restore(tensors)

    def finish(self) -> None:
        """The output rows that follow from all that was tried."""
        self.choices.fit()

    def loss(self, batch: Batch, key: str) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of the choice."""
        memory, processes, rows = self.memory, self.processes, list(range(len(batch)))
        chances = [Random(f"{key}/{sample.id}") for sample in batch.samples]
        points = invocation_points(memory, batch, chances, self.settings.anywhere)
        drops = [drops_images(memory, self.config.image_dropout, f"{key}/{sample.id}") for sample in batch.samples]
        plain = bring_up(memory, batch, [None] * len(batch), points)
        lengths = torch.tensor(plain.counts(rows), device=memory.backbone.device)
        with torch.no_grad():
            told = [likelihood(memory, plain, rows), *(self._with_memory(batch, kind, points, drops) for kind in KINDS)]
        scores = torch.stack([own.sum(1) / lengths for own in told], dim=1).exp()
        scores[:, 1:] -= self.config.cost
        hidden = plain.session.hidden[:, -1].float()
        self.choices.add(hidden, scores)
        loss = self.choices.loss()
        chosen = self.choices.logprobs(hidden).detach().exp()
        worth = (scores / self.config.temperature).softmax(-1)
        parts = torch.cat([loss.detach()[None] * len(batch), chosen[:, 1:].sum(0), worth[:, 1:].sum(0)])
        means = (processes.total(parts) / processes.total(torch.tensor(float(len(batch)))).item()).tolist()
        figures = {"loss": means[0] * processes.count}
        figures |= {f"asks_{kind}": means[1 + at] for at, kind in enumerate(KINDS)}
        return loss, figures | {f"worth_{kind}": means[3 + at] for at, kind in enumerate(KINDS)}

    def _with_memory(self, batch: Batch, kind: Kind, points: list[int], drops: list[bool]) -> Tensor:
        """Log-likelihoods (B, T) after memory of ``kind``."""
        memory, tokens, rows = self.memory, self.memory.tokens, list(range(len(batch)))
        invoked = bring_up(memory, batch, [kind] * len(batch), points)
        latents = invoked.session.form(rows, memory.builder, memory.former(kind))
        invoked.session.hide_images([row for row in rows if drops[row]])
        end = tokens.vectors(torch.full((len(rows), 1), tokens.end(kind)), latents)
        return likelihood(memory, invoked, rows, torch.cat([latents, end], dim=1))
