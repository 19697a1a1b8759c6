"""Stage II by likelihood: the invocation tokens' output rows learn to ask for memory where it pays.

At a point of the answer, the rest is scored three times: without memory, with short and with long. A score is the
mean probability of the rest's tokens, from 0 to 1 as a reward is, less a cost for asking. The better a choice scores,
the likelier the policy should be to make it there. What asking was worth in a state stays true while memory is frozen,
so every step learns from all states that were tried.

Only the output rows train. Input rows that learn from the likelihood of answers become prompts: they teach the base
the task without the latents' help, and replacing these by noise would then change little. The paper's own objective is
GRPO with its two penalties (Eq. 8), which trains all rows.
"""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor, nn

from ..config import KINDS, Kind, TrainConfig
from ..memory import Memory
from .batches import Batch
from .dropout import drops_images
from .formation import invocation_point
from .processes import Processes
from .stage import LikelihoodStage
from .teacher import bring_up, likelihood

REMEMBERED = 8192
"""States whose worth is kept, the latest ones."""
TETHER = 1e-5
"""How strongly the last fit holds the output rows where training had brought them."""


class InvocationStage(LikelihoodStage):
    """Stage II."""

    def __init__(self, memory: Memory, config: TrainConfig, processes: Processes | None = None) -> None:
        super().__init__(memory, config.invocation, processes)
        self.config = config
        device = memory.backbone.device
        self.tried = {"hidden": torch.empty(0, memory.backbone.width), "worth": torch.empty(0, 1 + len(KINDS))}
        self.tried = {name: own.to(device) for name, own in self.tried.items()}

    def parameters(self) -> list[tuple[str, nn.Parameter, float]]:
        """What trains: name, tensor, learning rate relative to the stage's."""
        return [("tokens.head", self.memory.tokens.head, 1.0)]

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know beyond its parameters."""
        return self.tried

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        self.tried = {name: tensors[name].to(own.device) for name, own in self.tried.items()}

    def finish(self) -> None:
        """Fit the output rows to all that was tried.

        Steps of the optimiser teach the rows what memory does to an answer, but turn the output rows slowly: hidden
        states have a large common part. The states are few and the problem convex, so its end can be had exactly.
        """
        head = self.memory.tokens.head
        began = head.detach().clone()
        solver = torch.optim.LBFGS([head], max_iter=300, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            solver.zero_grad()
            choice = self._choice(self.tried["hidden"])
            loss = -(self.tried["worth"] * choice).sum(1).mean() + TETHER * (head - began).pow(2).sum()
            loss.backward()
            return loss

        solver.step(closure)

    def loss(self, batch: Batch, key: str) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of the choice."""
        memory, processes, rows = self.memory, self.processes, list(range(len(batch)))
        points = [
            invocation_point(answer, memory.delimiters, Random(f"{key}/{sample.id}"), self.settings.anywhere)
            for answer, sample in zip(batch.answers, batch.samples, strict=True)
        ]
        drops = [drops_images(memory, self.config.image_dropout, f"{key}/{sample.id}") for sample in batch.samples]
        plain = bring_up(memory, batch, [None] * len(batch), points)
        lengths = torch.tensor([len(rest) for rest in plain.rests], device=memory.backbone.device)
        with torch.no_grad():
            told = [likelihood(memory, plain, rows), *(self._with_memory(batch, kind, points, drops) for kind in KINDS)]
        scores = torch.stack([own.sum(1) / lengths for own in told], dim=1).exp()
        scores[:, 1:] -= self.config.cost
        worth = (scores / self.config.temperature).softmax(-1)
        hidden = plain.session.hidden[:, -1].float()
        for name, own in (("hidden", hidden), ("worth", worth)):
            self.tried[name] = torch.cat([self.tried[name], processes.joined(own)])[-REMEMBERED:]
        choice = self._choice(self.tried["hidden"])
        loss = -(self.tried["worth"] * choice).sum(1).mean() / processes.count
        wanted = worth.mean(0)
        chosen = choice[-len(batch) * processes.count :].detach().exp().mean(0)
        means = processes.total(torch.stack([loss.detach(), *wanted[1:]])) / torch.tensor([1.0, *[processes.count] * 2])
        figures = {"loss": means[0].item()}
        figures |= {f"asks_{kind}": chosen[1 + at].item() for at, kind in enumerate(KINDS)}
        return loss, figures | {f"worth_{kind}": means[1 + at].item() for at, kind in enumerate(KINDS)}

    def _with_memory(self, batch: Batch, kind: Kind, points: list[int], drops: list[bool]) -> Tensor:
        """Log-likelihoods (B, T) after memory of ``kind``."""
        memory, tokens, rows = self.memory, self.memory.tokens, list(range(len(batch)))
        invoked = bring_up(memory, batch, [kind] * len(batch), points)
        latents = invoked.session.form(rows, memory.builder, memory.former(kind))
        invoked.session.hide_images([row for row in rows if drops[row]])
        end = tokens.vectors(torch.full((len(rows), 1), tokens.end(kind)), latents)
        return likelihood(memory, invoked, rows, torch.cat([latents, end], dim=1))

    def _choice(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (B, 3) of going on, asking for short, asking for long, where ``hidden`` (B, d) chooses."""
        backbone = self.memory.backbone
        with torch.no_grad():
            plain = backbone.head(hidden.to(backbone.dtype)).float().logsumexp(-1, keepdim=True)
        asks = self.memory.tokens.logits(hidden).to(plain.device)
        return torch.cat([plain, asks], dim=1).log_softmax(-1)
