"""What both stages of GRPO share: sampling groups, scoring them, and learning from how they differ (Eq. 12-15).

The trajectories of a step are dealt over all processes twice (:mod:`vismem_core.training.balance`): to be sampled by
how long they are expected to get, and to be replayed by how long they are. A group may be spread over processes; in
between all of these have all trajectories.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from vismem_core.answers.reward import Written, parse, score
from vismem_core.config import KINDS, PolicyStageConfig, TrainConfig
from vismem_core.decoding.replay import Prompts, read_prompts
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory

from . import grpo
from .balance import Work, balanced
from .batches import Batch
from .processes import Processes
from .replay import TrajectoryReplay, micro_batches
from .resample import resampled
from .rollout import Group, Sampling, Trajectory, rollouts
from .stage import Stage, only

MEMBERS = 16
"""Bits of a trajectory's seed that say which one of its group it is."""


def together(seed: int) -> int:
    """What the seeds of a group have in common."""
    return seed >> MEMBERS


class GroupStage(Stage):
    """One stage of GRPO. Adapters' dropout stays off, so that the replay is the rollout.

    The reference of the KL term is this stage's starting values on the same base: they are put in place for one pass
    without gradients, so there never is a second model.
    """

    forms: bool
    """Whether the replay forms memory anew, with gradients."""

    def __init__(
        self, memory: Memory, config: TrainConfig, settings: PolicyStageConfig, processes: Processes | None = None
    ) -> None:
        super().__init__(memory, settings, processes)
        self.config, self.grpo = config, config.grpo
        self.reward = parse(self.grpo.rewards, self.grpo.patience)
        self.kl = grpo.AdaptiveKL(settings.beta, settings.target_kl)
        own = self.grpo
        self.sampling = Sampling(own.temperature, own.top_p, own.max_new_tokens, config.image_dropout)
        self.base_scores: dict[str, float] = {}
        self.reference = {name: tensor.detach().clone() for name, tensor in self.trained().items()}

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """The memory's tensors that this stage changes, by name."""

    @abstractmethod
    def sample(self, prompts: Prompts | None, batch: Batch, key: str, progress: float) -> Group:
        """Roll out and score one group per prompt, all processes together."""

    @abstractmethod
    def counted(self, trajectory: Trajectory) -> list[bool]:
        """Which ids the loss counts."""

    # What the training loop asks for

    def parameters(self) -> list[tuple[str, nn.Parameter, float]]:
        """What trains: name, tensor, learning rate relative to the stage's."""
        return [(name, tensor, 1.0) for name, tensor in self.trained().items()]

    def accumulate(self, batch: Batch, key: str, progress: float) -> dict[str, float]:
        """Roll out, score, replay; gradients of one step."""
        self.memory.eval()
        prompts = self.read(batch)
        group = replace(self.sample(prompts, batch, key, progress), work=self.work(batch))
        prompts, group = resampled(self, prompts, batch, group, key, progress)
        with only(self.memory, self.parameters()):
            return {**group.figures, **self.learn(prompts, group)}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run must know beyond its parameters."""
        return {
            "beta": torch.tensor(self.kl.beta),
            **{f"reference.{name}": own for name, own in self.reference.items()},
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        self.kl.beta = tensors["beta"].item()
        self.reference = {name: tensors[f"reference.{name}"].to(own.device) for name, own in self.reference.items()}

    # Who does what

    def pieces(self, sample: Sample) -> Sequence[float]:
        """What each trajectory is expected to cost: as much as it would take to write the right answer."""
        return [len(sample.answer or "") + 1.0] * self.grpo.group

    def work(self, batch: Batch) -> Work:
        """Who rolls out which trajectories of a step; this process all of a batch that is no part of one."""
        return batch.work or Work(batch.samples, [[self.processes.number] * self.grpo.group] * len(batch))

    def own(self, batch: Batch) -> list[int]:
        """This process's trajectories, numbered through those of its prompts' groups."""
        work, number = self.work(batch), self.processes.number
        places = {prompt: at for at, prompt in enumerate(work.of(number))}
        return [places[prompt] * self.grpo.group + member for prompt, member in work.pieces(number)]

    def everyones(
        self, batch: Batch, told: Sequence[Trajectory], *values: Sequence[float]
    ) -> tuple[list[Trajectory], list[Tensor]]:
        """The trajectories of all processes, by the step's prompts, and values of each, (P, G)."""
        pieces = self.work(batch).pieces(self.processes.number)
        if self.processes.count > 1:
            told = [own.sent(prompt) for own, (prompt, _) in zip(told, pieces, strict=True)]
        parts = self.processes.everyones(list(zip(pieces, zip(told, *values, strict=True), strict=True)))
        trajectories, *columns = zip(*(part for _, part in sorted(dict(parts).items())), strict=True)
        return list(trajectories), [torch.tensor(own).view(-1, self.grpo.group) for own in columns]

    # Learning

    def learn(self, prompts: Prompts | None, group: Group) -> dict[str, float]:
        """Gradients of the clipped objective and its KL term over all trajectories, in parts that fit.

        Each is replayed by one of the processes that have read its prompt.
        """
        told, settings = group.trajectories, self.grpo
        gain = grpo.advantages(group.rewards, scaled=settings.scaled).flatten()
        counted = _padded([self.counted(own) for own in told], False)
        if group.heard is not None:
            counted &= group.heard.repeat_interleave(settings.group)[:, None]
        weight = grpo.weights(counted, settings.aggregate)
        pulls = counted.any(1) & ((gain != 0) | (self.kl.beta > 0))  # what gives no gradient is not replayed
        active = pulls.nonzero().flatten().tolist()
        own, told = self._replayed(active, group)
        sums = {"loss": 0.0, "kl": 0.0, "clipped": 0.0}
        width = prompts.mask.shape[1] if prompts else 0
        for rows in micro_batches(told, own, width, settings.slots):
            assert prompts is not None
            replay = TrajectoryReplay(
                self.memory, prompts, [told[row] for row in rows], settings.temperature, settings.checkpointing
            )
            reference = self._reference_logprobs(replay)
            logprobs = replay.logprobs(form=self.forms)
            longest = logprobs.shape[1]
            counts, weights = (whole[rows, :longest].to(logprobs.device) for whole in (counted, weight))
            old = _padded([told[row].logprobs for row in rows], 0.0).to(logprobs.device)
            objective = grpo.clipped(logprobs, old, gain[rows].to(logprobs.device), settings.clip)
            divergence = grpo.k3(logprobs, logprobs.detach() if reference is None else reference)
            loss = -(weights * (objective - self.kl.beta * divergence)).sum()
            loss.backward()
            sums["loss"] += loss.item()
            sums["kl"] += divergence[counts].sum().item()
            sums["clipped"] += ((logprobs - old).exp() - 1).abs()[counts].gt(settings.clip).sum().item()
        return self._figures(sums, group, counted)

    def _replayed(self, rows: Sequence[int], group: Group) -> tuple[list[int], list[Trajectory]]:
        """This process's part of the rows to be replayed, and all trajectories by the prompts as it has them."""
        told, number = group.trajectories, self.processes.number
        work = group.work or Work([], [[number]] * len(group.rewards))
        readers = [work.owners[told[row].prompt] for row in rows]
        owners = balanced([told[row].slots[-1] for row in rows], self.processes.count, readers)
        places = {prompt: at for at, prompt in enumerate(work.of(number))}
        own = [row for row, owner in zip(rows, owners, strict=True) if owner == number]
        return own, [replace(one, prompt=places.get(one.prompt, -1)) for one in told]

    def _reference_logprobs(self, replay: TrajectoryReplay) -> Tensor | None:
        if self.kl.beta == 0:
            return None
        with torch.no_grad(), self.as_reference():
            return replay.logprobs(form=self.forms)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """This stage's starting values in place of the trained ones."""
        trained = self.trained()
        before = {name: tensor.data for name, tensor in trained.items()}
        for name, tensor in trained.items():
            tensor.data = self.reference[name]
        try:
            yield
        finally:
            for name, tensor in trained.items():
                tensor.data = before[name]

    def _figures(self, sums: dict[str, float], group: Group, counted: Tensor) -> dict[str, float]:
        told = group.trajectories
        loss, kl, clipped = self.processes.total(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
        tokens = max(int(counted.sum()), 1)
        self.kl.update(kl / tokens)
        asks = {kind: sum(own.ids.count(self.memory.tokens.invocation(kind)) for own in told) for kind in KINDS}
        return {
            "loss": loss,
            "kl": kl / tokens,
            "beta": self.kl.beta,
            "clipped": clipped / tokens,
            "entropy": sum(sum(own.entropy) for own in told) / max(sum(sum(own.chosen) for own in told), 1),
            "silent": grpo.silent(group.rewards).double().mean().item(),
            "resampled": float(group.resampled),
            **{kind: count / len(told) for kind, count in asks.items()},
            "tokens": float(sum(len(own.ids) for own in told)),
        }

    # Sampling and scoring

    def read(self, batch: Batch) -> Prompts | None:
        """This process's prompts, if it has any."""
        with self.memory.triggered("policy"):
            return read_prompts(self.memory, batch.inputs) if len(batch) else None

    def rollouts(
        self,
        prompts: Prompts | None,
        copies: Sequence[int],
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        **dealt: Any,
    ) -> list[Trajectory]:
        """As :func:`~vismem_core.training.rollout.rollouts`, of none if there are none."""
        if prompts is None or not copies:
            return []
        return rollouts(self.memory, prompts, copies, seeds, sampling or self.sampling, **dealt)

    def seeds(self, batch: Batch, key: str) -> list[int]:
        """One for each trajectory of its prompts, from step and sample alone; :func:`together` tells groups apart."""
        return [
            Random(f"{key}/{sample.id}").getrandbits(48 - MEMBERS) << MEMBERS | number
            for sample in batch.samples
            for number in range(self.grpo.group)
        ]

    def copies(self, batch: Batch) -> list[int]:
        """The prompt of each trajectory."""
        return [prompt for prompt in range(len(batch)) for _ in range(self.grpo.group)]

    def score(self, trajectories: Sequence[Trajectory], batch: Batch) -> list[float]:
        """S of trajectories of this process."""
        if not trajectories:
            return []
        samples: list[Sample] = [batch.samples[own.prompt] for own in trajectories]
        return self.processes.agreed(score(self.reward, [self.written(own) for own in trajectories], samples))

    def written(self, trajectory: Trajectory) -> Written:
        """What a reward may see of a trajectory."""
        text = self.memory.backbone.processor.tokenizer.decode(trajectory.ids, skip_special_tokens=True)
        return Written(text.strip(), tuple(trajectory.ids))

    def base(self, prompts: Prompts | None, batch: Batch) -> Tensor:
        """S(tau_base) of each of the step's prompts' greedy answer without memory, (P,).

        The base does not change, so each is asked once.
        """
        work, number = self.work(batch), self.processes.number
        new = [at for at, sample in enumerate(work.samples) if sample.id not in self.base_scores]
        if new:
            costs = [self.pieces(work.samples[at])[0] for at in new]
            owners = balanced(costs, self.processes.count, [work.owners[at] for at in new])
            own = [at for at, owner in zip(new, owners, strict=True) if owner == number]
            with self.memory.triggered("never"):
                greedy, places = Sampling(0.0, 1.0, self.sampling.max_new_tokens), work.of(number)
                told = self.rollouts(prompts, [places.index(at) for at in own], [0] * len(own), sampling=greedy)
            scores = zip((work.samples[at].id for at in own), self.score(told, batch), strict=True)
            self.base_scores |= dict(self.processes.everyones(list(scores)))
        return torch.tensor([self.base_scores[sample.id] for sample in work.samples])


def _padded(rows: Sequence[Sequence[bool]] | Sequence[Sequence[float]], fill: bool | float) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
