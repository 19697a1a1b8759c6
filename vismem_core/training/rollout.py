"""Rollouts: a group of trajectories per prompt, sampled with memory by the loop that inference uses.

Each prompt is encoded once; the cache of a long one is held once for its group. A trajectory's chances come from its
own seed, so it can be sampled again alone, and with the other memory at its invocations the same chances meet it
(``swapped``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.modeling_outputs import CausalLMOutputWithPast

from vismem_core.base import cache as kv
from vismem_core.base.tensor import agreed
from vismem_core.config import KINDS, Kind
from vismem_core.decoding.loop import NEVER, Decoder
from vismem_core.decoding.replay import Answer, Prompts
from vismem_core.decoding.session import Session
from vismem_core.errors import TrainingError
from vismem_core.memory.memory import Memory
from vismem_core.memory.trace import Trace
from vismem_core.memory.trigger import Row

from .balance import Work
from .dropout import drops_images

Deal = Kind | Literal["none"]
SHARED = 256
"""Columns of a prompt from which it is faster to read it once for its group than a copy for each trajectory."""


@dataclass
class Trajectory(Answer):
    """One sampled answer; the lists have one entry per id.

    Attributes:
        ids: the answer with its memory tokens, up to and with the end of the turn.
        logprobs: of each id under the policy at the sampling temperature; 0 where there was no choice.
        chosen: whether the policy had a choice.
        offered: which invocation tokens it could have chosen, in the order of ``KINDS``.
        entropy: of the policy, in nats.
        dealt: index of the id that was dealt, and not the policy's own choice.
        state: (d,), the last hidden state in which it was dealt.
    """

    logprobs: list[float] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    offered: list[list[bool]] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    dealt: int | None = None
    state: Tensor | None = None

    def sent(self, prompt: int) -> Trajectory:
        """A copy that can go to other processes, where its prompt has another number."""
        latents = {place: own.to("cpu", copy=True) for place, own in self.latents.items()}
        state = None if self.state is None else self.state.to("cpu", copy=True)
        return replace(self, prompt=prompt, latents=latents, state=state)


@dataclass
class Group:
    """P prompts with G trajectories each, those of all processes, and what they earned.

    Attributes:
        rewards: what the advantages are made of, (P, G).
        figures: means over all trajectories, for the log.
        tried: states (n, d) in which all choices were tried, and their rewards (n, 3), where Stage II dealt some.
        heard: which prompts (P,) the loss is about; by default all.
        resampled: how many of the prompts were drawn in place of silent ones.
        work: which process has read which prompts; by default this one has read all.
    """

    trajectories: list[Trajectory]
    rewards: Tensor
    figures: dict[str, float]
    tried: tuple[Tensor, Tensor] | None = None
    heard: Tensor | None = None
    resampled: int = 0
    work: Work | None = None


@dataclass(frozen=True)
class Sampling:
    """How trajectories are drawn; temperature 0 takes the likeliest token.

    ``image_dropout`` is the chance that a trajectory drops its images (:mod:`vismem_core.training.dropout`).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    image_dropout: float = 0.0


class _Rollout(Decoder):
    def __init__(
        self,
        memory: Memory,
        session: Session,
        sampling: Sampling,
        seeds: Sequence[int],
        deals: Sequence[tuple[int, Deal] | None],
        swapped: bool,
    ) -> None:
        super().__init__(memory, session, memory.active_trigger, Trace())
        self.sampling, self.seeds, self.swapped = sampling, seeds, swapped
        self.deals = dict(enumerate(deals))
        self.trajectories: list[Trajectory] = []
        self._forced: dict[int, int] = {}
        self._quiet: set[int] = set()
        self._dealt: dict[int, Deal] = {}
        self._running: list[bool] = []
        draws = [torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self._chances = torch.stack(draws)  # (trajectories, steps)

    def __call__(self, model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, *args: Any, **rest: Any):  # type: ignore[no-untyped-def]
        # What the base's generation config asks for besides (a repetition penalty, say) is not in the replay.
        return super().__call__(model, input_ids, LogitsProcessorList(), *args, **rest)

    def _begin(self, model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
        self.rows = [Row(seed=seed) for seed in self.seeds]
        logits = self.session.backbone.logits(self.session.hidden[:, -1:])
        output = CausalLMOutputWithPast(logits=logits)
        output[kv.NAME] = self.session.cache
        return output

    def _drops_images(self, row: int) -> bool:
        return self.trajectories[self.order[row]].drops_images

    def _choices(self, logits: Tensor, room: int | None, running: list[bool]) -> tuple[Tensor, dict[int, int]]:
        # An image token that is no image would be taken for one when the trajectory is read again.
        logits[:, self.session.backbone.media] = NEVER
        extended, self._forced = super()._choices(logits, room, running)
        self._running = running
        columns = slice(self.tokens.first, self.tokens.first + len(KINDS))
        self._dealt = self._deal((extended[:, columns] > NEVER).tolist())
        if silent := [row for row, own in enumerate(self.order) if own in self._quiet or self.deals.get(own)]:
            extended[silent, columns] = NEVER
        return extended, self._forced

    def _select(self, scores: Tensor, sample: bool) -> Tensor:
        temperature = self.sampling.temperature
        logprobs = (scores / (temperature or 1.0)).log_softmax(-1)
        columns = slice(self.tokens.first, self.tokens.first + len(KINDS))
        offered = (scores[:, columns] > NEVER).tolist()
        allowed, dealt = logprobs, self._dealt
        if "none" in dealt.values():
            allowed = logprobs.clone()
            allowed[[row for row, deal in dealt.items() if deal == "none"], columns] = NEVER
        chances = self._chances[self.order, self.rows[0].step].to(scores.device)
        tokens = draw(allowed, chances, self.sampling.top_p) if temperature else allowed.argmax(-1)
        tokens = agreed(self.memory.model, tokens)
        for row, deal in dealt.items():
            trajectory = self.trajectories[self.order[row]]
            trajectory.dealt, trajectory.state = len(trajectory.ids), self.session.hidden[row, -1]
            if deal != "none":
                tokens[row] = self.tokens.invocation(deal)
            else:
                self._quiet.add(self.order[row])
        self._keep(tokens, logprobs, offered)
        return self._swap(tokens) if self.swapped else tokens

    def _deal(self, offered: list[list[bool]]) -> dict[int, Deal]:
        """What rows are dealt now: at the n-th place where every kind was offered."""
        dealt: dict[int, Deal] = {}
        for row, number in enumerate(self.order):
            own = self.deals.get(number)
            if own is None or row in self._forced or not all(offered[row]):
                continue
            wait, deal = own
            self.deals[number] = None if wait == 0 else (wait - 1, deal)
            if wait == 0:
                dealt[row] = deal
        return dealt

    def _swap(self, tokens: Tensor) -> Tensor:
        at = tokens - self.tokens.first
        return torch.where((at == 0) | (at == 1), self.tokens.first + 1 - at, tokens)

    def _keep(self, tokens: Tensor, logprobs: Tensor, offered: list[list[bool]]) -> None:
        own = logprobs.gather(1, tokens[:, None]).squeeze(1).tolist()
        entropy = torch.special.entr(logprobs.exp()).sum(-1).tolist()
        written = (self._swap(tokens) if self.swapped else tokens).tolist()
        for row, number in enumerate(self.order):
            if not self._running[row]:
                continue
            trajectory, free = self.trajectories[number], row not in self._forced
            trajectory.ids.append(written[row])
            trajectory.logprobs.append(own[row] if free else 0.0)
            trajectory.chosen.append(free)
            trajectory.offered.append(offered[row] if free else [False] * len(KINDS))
            trajectory.entropy.append(entropy[row] if free else 0.0)

    def _kept(self, alive: list[bool]) -> list[int] | None:
        """Finished rows leave as soon as half of the batch is finished: what is left costs half as much."""
        return [row for row, own in enumerate(alive) if own] if 2 * sum(alive) <= len(alive) else None


def rollouts(
    memory: Memory,
    prompts: Prompts,
    copies: Sequence[int],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    deals: Sequence[tuple[int, Deal] | None] = (),
    swapped: bool = False,
) -> list[Trajectory]:
    """Sample R trajectories in one batch, under the memory's trigger.

    Args:
        copies: the number of its prompt, for each trajectory.
        seeds: one per trajectory; the same seed draws the same chances.
        deals: per trajectory (wait, choice): it invokes at none of the first ``wait`` places where it could, and at the
            next is made to choose a kind, or ``none`` from there on.
        swapped: every invocation that the policy chooses is one of the other kind (tau_rev of Eq. 8).
    """
    session = prompts.session.branch(copies, room=True, shared=_shares(prompts.session, copies))
    decoder = _Rollout(memory, session, sampling, seeds, deals, swapped)
    drops = [drops_images(memory, sampling.image_dropout, str(seed)) for seed in seeds]
    decoder.trajectories = [Trajectory(prompt, drops_images=own) for prompt, own in zip(copies, drops, strict=True)]
    index = torch.as_tensor(copies, device=prompts.ids.device)
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=memory.model.generation_config.eos_token_id,
        pad_token_id=memory.backbone.processor.tokenizer.pad_token_id,
    )
    with torch.no_grad():
        memory.hook.decode(
            decoder,
            input_ids=prompts.ids[index],
            attention_mask=prompts.mask[index],
            position_ids=prompts.positions[..., index, :],
            generation_config=settings,
        )
    for invocation in decoder.trace.invocations:
        decoder.trajectories[invocation.row].latents[invocation.position] = invocation.latents
    return decoder.trajectories


def _shares(session: Session, copies: Sequence[int]) -> bool:
    """Whether a prompt's columns are held once for its group.

    It takes packed passes and layers that hold all tokens.
    """
    apart = len(set(copies)) == len(copies) or list(copies) != sorted(copies)
    return not apart and session.mask.shape[1] >= SHARED and session.packs({}) and kv.whole(session.cache)


def draw(logprobs: Tensor, chances: Tensor, top_p: float | Tensor = 1.0) -> Tensor:
    """Tokens (R,) at the given quantiles of each row's distribution (R, V), the likeliest tokens first.

    Args:
        chances: (R,), from 0 to 1.
        top_p: the share of the distribution that is kept, made of its likeliest tokens; of all rows, or (R, 1).

    Raises:
        TrainingError: a row is no distribution.
    """
    if logprobs.isnan().any():
        raise TrainingError("the policy's probabilities are not finite; lower the learning rate (--set train...lr)")
    shares, ids = logprobs.exp().sort(dim=-1, descending=True)
    reached = shares.double().cumsum(-1)
    kept = reached - shares < top_p
    last = kept.sum(-1, keepdim=True) - 1
    at = (reached < chances[:, None] * reached.gather(1, last)).sum(-1, keepdim=True)
    return ids.gather(1, at.minimum(last)).squeeze(1)
