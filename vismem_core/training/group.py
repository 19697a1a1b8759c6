"""What both stages of GRPO share: sampling groups, scoring them, and learning from how they differ (Eq. 12-15)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random

import torch
from torch import Tensor, nn

from vismem_core.answers.reward import Written, parse, score
from vismem_core.config import KINDS, PolicyStageConfig, TrainConfig
from vismem_core.decoding.replay import Prompts, read_prompts
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory

from . import grpo
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
    def sample(self, prompts: Prompts, batch: Batch, key: str, progress: float) -> Group:
        """Roll out and score one group per prompt. It must wait for no other process: these may have more to do."""

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
        with self.memory.triggered("policy"):
            prompts = read_prompts(self.memory, batch.inputs)
        group = self.sample(prompts, batch, key, progress)
        counted = float(len(group.rewards))  # processes may have kept different numbers of prompts
        prompts, group = resampled(self, prompts, batch, group, key, progress)
        sums = self.processes.total(counted * torch.tensor([*group.figures.values(), 1.0]))
        means = (sums[:-1] / sums[-1]).tolist()
        with only(self.memory, self.parameters()):
            return {**dict(zip(group.figures, means, strict=True)), **self.learn(prompts, group)}

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

    # Learning

    def learn(self, prompts: Prompts, group: Group) -> dict[str, float]:
        """Gradients of the clipped objective and its KL term over all trajectories, in parts that fit."""
        told, settings = group.trajectories, self.grpo
        gain = grpo.advantages(group.rewards, scaled=settings.scaled).flatten()
        counted = _padded([self.counted(own) for own in told], False)
        if group.heard is not None:
            counted &= group.heard.repeat_interleave(settings.group)[:, None]
        weight = self._weights(counted)
        pulls = counted.any(1) & ((gain != 0) | (self.kl.beta > 0))  # what gives no gradient is not replayed
        active = pulls.nonzero().flatten().tolist()
        sums = {"loss": 0.0, "kl": 0.0, "clipped": 0.0}
        for rows in micro_batches(told, active, prompts.mask.shape[1], settings.slots):
            replay = TrajectoryReplay(
                self.memory, prompts, [told[row] for row in rows], settings.temperature, settings.checkpointing
            )
            reference = self._reference_logprobs(replay)
            logprobs = replay.logprobs(form=self.forms)
            own = torch.tensor(rows)
            width = logprobs.shape[1]
            counts, weights = (whole[own, :width].to(logprobs.device) for whole in (counted, weight))
            old = _padded([told[row].logprobs for row in rows], 0.0).to(logprobs.device)
            objective = grpo.clipped(logprobs, old, gain[own].to(logprobs.device), settings.clip)
            divergence = grpo.k3(logprobs, logprobs.detach() if reference is None else reference)
            loss = -(weights * (objective - self.kl.beta * divergence)).sum()
            loss.backward()
            sums["loss"] += loss.item()
            sums["kl"] += divergence[counts].sum().item()
            sums["clipped"] += ((logprobs - old).exp() - 1).abs()[counts].gt(settings.clip).sum().item()
        return self._figures(sums, group, counted)

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

    def _weights(self, counted: Tensor) -> Tensor:
        """As :func:`grpo.weights` over the trajectories of all processes."""
        mode = self.grpo.aggregate
        own = counted.sum() if mode == "token" else counted.any(1).sum()
        everyone = self.processes.total(own.float()).item()
        return grpo.weights(counted, mode) * (own.item() / max(everyone, 1.0))

    def _figures(self, sums: dict[str, float], group: Group, counted: Tensor) -> dict[str, float]:
        told = group.trajectories
        entropy = sum(sum(own.entropy) for own in told)
        free = sum(sum(own.chosen) for own in told)
        parts = [*sums.values(), counted.sum().item(), entropy, free, grpo.silent(group.rewards).sum().item()]
        parts += [len(group.rewards), len(told), sum(len(own.ids) for own in told)]
        parts += [sum(own.ids.count(self.memory.tokens.invocation(kind)) for own in told) for kind in KINDS]
        loss, kl, clipped, tokens, entropy, free, silent, prompts, rows, ids, short, long = self.processes.total(
            torch.tensor(parts, dtype=torch.float64)
        ).tolist()
        self.kl.update(kl / max(tokens, 1))
        return {
            "loss": loss,
            "kl": kl / max(tokens, 1),
            "beta": self.kl.beta,
            "clipped": clipped / max(tokens, 1),
            "entropy": entropy / max(free, 1),
            "silent": silent / prompts,
            "resampled": float(group.resampled),
            "short": short / rows,
            "long": long / rows,
            "tokens": ids,
        }

    # Scoring

    def seeds(self, batch: Batch, key: str) -> list[int]:
        """One for each trajectory, from the step and the sample alone; :func:`together` tells groups apart."""
        return [
            Random(f"{key}/{sample.id}").getrandbits(48 - MEMBERS) << MEMBERS | number
            for sample in batch.samples
            for number in range(self.grpo.group)
        ]

    def copies(self, batch: Batch) -> list[int]:
        """The prompt of each trajectory."""
        return [prompt for prompt in range(len(batch)) for _ in range(self.grpo.group)]

    def scores(self, trajectories: Sequence[Trajectory], batch: Batch) -> Tensor:
        """S of whole groups, (P, G)."""
        return torch.tensor(self.score(trajectories, batch)).view(len(batch), -1)

    def score(self, trajectories: Sequence[Trajectory], batch: Batch) -> list[float]:
        """S of each trajectory."""
        samples: list[Sample] = [batch.samples[own.prompt] for own in trajectories]
        return self.processes.agreed(score(self.reward, [self.written(own) for own in trajectories], samples))

    def written(self, trajectory: Trajectory) -> Written:
        """What a reward may see of a trajectory."""
        text = self.memory.backbone.processor.tokenizer.decode(trajectory.ids, skip_special_tokens=True)
        return Written(text.strip(), tuple(trajectory.ids))

    def base(self, prompts: Prompts, batch: Batch) -> Tensor:
        """S(tau_base) of each prompt's greedy answer without memory, (P,); the base does not change, so once each."""
        new = [at for at, sample in enumerate(batch.samples) if sample.id not in self.base_scores]
        if new:
            with self.memory.triggered("never"):
                greedy = Sampling(0.0, 1.0, self.sampling.max_new_tokens)
                told = rollouts(self.memory, prompts, new, [0] * len(new), greedy)
            for at, own in zip(new, self.score(told, batch), strict=True):
                self.base_scores[batch.samples[at].id] = own
        return torch.tensor([self.base_scores[sample.id] for sample in batch.samples])


def _padded(rows: Sequence[Sequence[bool]] | Sequence[Sequence[float]], fill: bool | float) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])
