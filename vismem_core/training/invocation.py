"""Stage II by likelihood: the invocation tokens' output rows learn to ask for memory where it pays.

At a point of the answer, the rest is scored three times: without memory, with short and with long. A score is the
mean probability of the rest's tokens, from 0 to 1 as a reward is, less a cost for asking. The better a choice scores,
the likelier the policy should be to make it there (:mod:`vismem_core.training.choices`).

Only the output rows train. Input rows that learn from the likelihood of answers become prompts: they teach the base
the task without the latents' help, and replacing these by noise would then change little. The paper's own objective is
GRPO with its two penalties (Eq. 8), which trains all rows.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from torch import Tensor, nn

from vismem_core.config import KINDS, Kind, TrainConfig
from vismem_core.decoding.replay import Answer, Prompts, Replay, read_prompts
from vismem_core.memory.memory import Memory

from .batches import Batch
from .choices import Choices
from .dropout import drops_images
from .formation import invocation_points
from .processes import Processes
from .stage import LikelihoodStage


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
        memory, processes = self.memory, self.processes
        chances = [Random(f"{key}/{sample.id}") for sample in batch.samples]
        points = invocation_points(memory, batch, chances, self.settings.anywhere)
        drops = [drops_images(memory, self.config.image_dropout, f"{key}/{sample.id}") for sample in batch.samples]
        with torch.no_grad():
            prompts = read_prompts(memory, batch.inputs, kinds=KINDS)
            told = [_rest(memory, prompts, batch, kind, points, drops) for kind in (None, *KINDS)]
        scores = torch.stack([likely.exp() for likely, _ in told], dim=1)
        scores[:, 1:] -= self.config.cost
        hidden = told[0][1]
        self.choices.add(processes.joined(hidden), processes.joined(scores))
        loss = self.choices.loss()
        chosen = self.choices.logprobs(hidden).detach().exp()
        worth = (scores / self.config.temperature).softmax(-1)
        parts = torch.cat([loss.detach()[None] * len(batch), chosen[:, 1:].sum(0), worth[:, 1:].sum(0)])
        means = (processes.total(parts) / processes.total(torch.tensor(float(len(batch)))).item()).tolist()
        figures = {"loss": means[0] * processes.count}
        figures |= {f"asks_{kind}": means[1 + at] for at, kind in enumerate(KINDS)}
        return loss, figures | {f"worth_{kind}": means[3 + at] for at, kind in enumerate(KINDS)}


def _rest(
    memory: Memory, prompts: Prompts, batch: Batch, kind: Kind | None, points: list[int], drops: list[bool]
) -> tuple[Tensor, Tensor]:
    """The mean log-likelihood (B,) of what follows each point where memory of ``kind`` is invoked there, or none, and
    the states (B, d) in which it would be chosen. Of what is given nothing counts."""
    backbone, tokens = memory.backbone, memory.tokens
    marks = [tokens.invocation(kind), tokens.end(kind)] if kind else []
    answers = [
        Answer(row, [*own[:point], *marks, *own[point:]], drops_images=drop)
        for row, (own, point, drop) in enumerate(zip(batch.answers, points, drops, strict=True))
    ]
    if kind:
        begun = [replace(own, ids=own.ids[: point + 2]) for own, point in zip(answers, points, strict=True)]
        formed = Replay(memory, prompts, begun).forms(list(enumerate(points)))
        for own, point, latents in zip(answers, points, formed, strict=True):
            own.latents[point] = latents
    replay = Replay(memory, prompts, answers)
    hidden = replay.hidden(form=False)
    first = [max(point, given) + len(marks) for point, given in zip(points, batch.given, strict=True)]
    places = [(row, at) for row, own in enumerate(answers) for at in range(first[row], len(own.ids))]
    rows, slots, ids = (
        torch.tensor(own, device=hidden.device)
        for own in zip(*((row, replay.slots[row][at], answers[row].ids[at]) for row, at in places), strict=True)
    )
    told = backbone.logits(hidden[rows, slots]).float().log_softmax(-1)
    told = told.gather(1, ids.to(told.device)[:, None])[:, 0].to(hidden.device)
    total, count = (hidden.new_zeros(len(batch), dtype=torch.float32) for _ in range(2))
    total, count = total.index_add(0, rows, told), count.index_add(0, rows, torch.ones_like(told))
    states = torch.stack([hidden[row, replay.slots[row][point]] for row, point in enumerate(points)])
    return (total / count).to(backbone.device), states.float().to(backbone.device)
