"""``forward`` on sequences that hold memory tokens: the logits that the decoding had, latents formed again, gradients.

A sequence is a prompt and the answer that follows it. Prompts are read as ``generate`` reads them; then the answers are
replayed (:mod:`vismem_core.decoding.replay`). Latents that nobody recorded are formed first, one invocation of every
row after the other, without gradients; the replay forms them all again, with gradients where memory trains.

Logits are :attr:`MemoryTokens.width <vismem_core.MemoryTokens.width>` wide. Where decoding leaves no choice, after an
invocation token and before one that the policy was not offered, only the next id is likely: it has the log-probability
0 and no part in the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from vismem_core.base import cache as kv
from vismem_core.config import KINDS
from vismem_core.errors import AttachError
from vismem_core.memory.memory import Memory
from vismem_core.memory.trigger import Row

from .checkpointed import checkpointed_layers, uncheckpointed
from .loop import ROOM, seeds
from .replay import Answer, Prompts, Replay, read_prompts
from .turn import TURN

UNLIKELY = -1e4
"""The logit of what cannot be; finite in every precision, since trainers multiply it by probabilities of 0."""
IGNORED = -100
CACHES = tuple({kv.NAME, "past_key_values"})
NOT_PASSED_ON = ("use_cache", "cache_position", "return_dict", "inputs_embeds", "num_items_in_batch", *CACHES)
REFUSED = ("position_ids", "output_attentions", "output_hidden_states")


def forward(
    memory: Memory,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
    checkpointing: bool = False,
    finished: bool = False,
    **rest: Any,
) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
    """What ``model.forward`` gives for B sequences of L ids, padded on whatever side.

    The answer begins behind what the chat template writes before an answer, the last time before the first invocation;
    where it writes nothing that can be found, at the first label, or where ``logits_to_keep`` begins.

    Args:
        labels: (B, L); the loss is the model's own ``loss_function``.
        checkpointing: compute the decoder's layers again in the backward pass.
        finished: nothing was to follow, so that an answer without an end was cut at ``max_new_tokens``, and its last
            ids left no room for an invocation. By default it may go on.
        rest: what else belongs to the prompts, such as their images.

    Returns:
        ``loss`` and ``logits`` (B, L or what is to be kept, width), the latter in the head's precision. No cache.

    Raises:
        AttachError: memory is off, the mask is not the ids', nothing says where an answer begins, or an image stands
            in one.
    """
    if not memory.enabled:
        raise AttachError("the sequence holds memory tokens, which the base model does not know: take them out")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shapes = " and ".join(str(tuple(own.shape)) for own in (attention_mask, input_ids))
        raise AttachError(f"attention_mask and input_ids have shapes {shapes}: the mask tells of every id, answers too")
    _check(rest)
    memory.follow()
    model = memory.model
    learns = torch.is_grad_enabled()
    deep = learns and any(own.requires_grad for own in model.parameters())
    checkpointing = checkpointing or (model.training and bool(checkpointed_layers(model)))
    with TURN.call(), uncheckpointed(model):
        told = _Sequences.of(memory, input_ids, attention_mask, labels, logits_to_keep)
        read = told.read(rest, deep)
        form(memory, read, told.answers)
        hidden = Replay(memory, read, told.answers, checkpointing and learns).hidden(
            form=learns and memory.recorded is None
        )
        states = told.states(read.session.hidden.to(hidden), hidden)
        kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        choices = told.choices(read, finished)
        logits = choices.logits(states[:, kept], kept)
    loss = None
    if labels is not None:
        targets = choices.free(labels)[:, kept]
        counted = {name: rest[name] for name in ("num_items_in_batch",) if rest.get(name) is not None}
        loss = model.loss_function(logits=logits, labels=targets, vocab_size=logits.shape[-1], **counted)
    output = CausalLMOutputWithPast(loss=loss, logits=logits)
    return output if rest.get("return_dict", True) is not False else output.to_tuple()


def form(memory: Memory, prompts: Prompts, answers: Sequence[Answer]) -> None:
    """Fill in the latents of answers that hold invocation tokens, as the decoding that wrote them formed them.

    The last id of an answer is not looked at, nor what would only follow it.
    """
    waiting = {
        row: [at for at, token in enumerate(own.ids[:-2]) if memory.tokens.kind(token)]
        for row, own in enumerate(answers)
    }
    if memory.recorded is not None:
        for row, places in waiting.items():
            known = {own.position: own.latents for own in memory.recorded.row(row)}
            if missing := [at for at in places if at not in known]:
                raise AttachError(f"the trace has no latents for the invocation at {missing[0]} of row {row}")
            answers[row].latents = {at: known[at] for at in places}
        return
    while rows := [row for row, places in waiting.items() if places]:
        ends = [waiting[row].pop(0) for row in rows]
        parts = [_until(answers[row], end) for row, end in zip(rows, ends, strict=True)]
        replay = Replay(memory, prompts, parts)
        for kind in KINDS:
            own = [at for at, end in enumerate(ends) if memory.tokens.kind(parts[at].ids[end]) == kind]
            formed = replay.forms([(at, ends[at]) for at in own]) if own else []
            for at, latents in zip(own, formed, strict=True):
                answers[rows[at]].latents[ends[at]] = latents


def _until(answer: Answer, end: int) -> Answer:
    """An answer up to the invocation token at ``end``, the last that is fed."""
    return Answer(answer.prompt, answer.ids[: end + 2], dict(answer.latents), answer.drops_images)


@dataclass(frozen=True)
class _Sequences:
    """B sequences of L ids as prompts and answers.

    Attributes:
        columns: of each row, where its ids are; the first ``starts`` are its prompt.
        answers: with one id more than there is, since the last one of an answer is not fed.
    """

    memory: Memory
    ids: Tensor
    columns: list[list[int]]
    starts: list[int]
    answers: list[Answer]

    @classmethod
    def of(
        cls, memory: Memory, ids: Tensor, mask: Tensor | None, labels: Tensor | None, keep: int | Tensor
    ) -> _Sequences:
        kept = torch.ones_like(ids) if mask is None else mask
        columns = [row.nonzero().flatten().tolist() for row in kept]
        starts, answers = [], []
        for row, (own, places) in enumerate(zip(ids.tolist(), columns, strict=True)):
            told = [own[at] for at in places]
            if (odd := memory.tokens.unpaired(told)) is not None:
                raise AttachError(f"row {row}: {odd}")
            start = _found(memory, told)
            if start is None and labels is not None:
                start = next((n for n, at in enumerate(places) if labels[row, at] != IGNORED), None)
            if start is None and isinstance(keep, int) and keep:
                start = next((n for n, at in enumerate(places) if at > len(own) - keep), None)
            if not start:
                raise AttachError(
                    f"row {row}: nothing says where the answer begins: its prompt does not end as the chat template "
                    "ends one, and there are no labels"
                )
            starts.append(start)
            drops = memory.config.drop_image_after_invocation
            answers.append(Answer(row, [*told[start:], 0], drops_images=drops))
        return cls(memory, ids, columns, starts, answers)

    def read(self, rest: Mapping[str, Any], gradients: bool) -> Prompts:
        """The prompts, which have all the images.

        Raises:
            AttachError: one stands in an answer.
        """
        try:
            return read_prompts(self.memory, self._prompts(rest), gradients=gradients, kinds=KINDS)
        except ValueError as error:
            media = set(self.memory.backbone.placeholders.values())
            for row, own in enumerate(self.answers):
                if media.intersection(own.ids):
                    raise AttachError(f"row {row}: an image stands behind the beginning of the answer") from error
            raise

    def _prompts(self, rest: Mapping[str, Any]) -> dict[str, Any]:
        """What the model takes for the prompts alone, padded on the left."""
        width, pad = max(self.starts), int(self.memory.backbone.processor.tokenizer.pad_token_id or 0)
        inputs = {name: own for name, own in rest.items() if name not in NOT_PASSED_ON and own is not None}
        inputs |= {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        for name, own in inputs.items():
            if isinstance(own, Tensor) and own.shape == self.ids.shape:
                rows = [own[row, places[:start]] for row, (places, start) in enumerate(self._prompted())]
                filler = pad if name == "input_ids" else 0
                inputs[name] = torch.stack([F.pad(part, (width - len(part), 0), value=filler) for part in rows])
        return inputs

    def _prompted(self) -> Iterator[tuple[list[int], int]]:
        return zip(self.columns, self.starts, strict=True)

    def states(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """The sequences' last hidden states (B, L, d), from the prompts' (B, P, d) and the answers' (B, S + 1, d)."""
        where = torch.zeros_like(self.ids)
        for row, (places, start) in enumerate(self._prompted()):
            before = range(prompts.shape[1] - start, prompts.shape[1])
            behind = [prompts.shape[1] + slot for slot in self.answers[row].slots[1:]]
            where[row, places] = torch.tensor([*before, *behind], device=where.device)
        where = where.to(prompts.device)
        return torch.cat([prompts, answers], dim=1)[torch.arange(len(where), device=where.device)[:, None], where]

    def choices(self, read: Prompts, finished: bool) -> _Choices:
        """What decoding had to choose from at every place."""
        offered = torch.zeros(*self.ids.shape, len(KINDS), dtype=torch.bool)
        forced: dict[tuple[int, int], int] = {}
        memory, trigger = self.memory, self.memory.active_trigger
        drawn = seeds(read.ids, read.mask, 1)
        told = memory.model.generation_config.eos_token_id
        ends = set(told if isinstance(told, list) else [told])
        for number, (places, start) in enumerate(self._prompted()):
            row, ids, due = Row(seed=drawn[number]), self.answers[number].ids, None
            cut = len(ids) - ROOM if finished and not ends.intersection(ids[-2:-1]) else len(ids)
            for at, token in enumerate(ids):
                place = places[start + at - 1]
                free = due is None and memory.refuses(row) is None and at < cut
                kinds = trigger.kinds if free and trigger(row) == "policy" else ()
                offered[number, place] = torch.tensor([kind in kinds for kind in KINDS])
                kind = memory.tokens.kind(token) if at < len(ids) - 1 else None
                if due is not None:
                    forced[number, place] = memory.tokens.end(due)
                elif token >= memory.tokens.first and kind not in kinds:
                    forced[number, place] = token
                due = kind
                memory.note(row, token)
        return _Choices(memory, offered, forced)


@dataclass(frozen=True)
class _Choices:
    """What there was to choose from.

    Attributes:
        offered: (B, L, 2), which invocation tokens, in the order of ``KINDS``.
        forced: the only id that could follow, by row and column.
    """

    memory: Memory
    offered: Tensor
    forced: dict[tuple[int, int], int]

    def logits(self, states: Tensor, kept: slice | Tensor) -> Tensor:
        """Logits (B, K, W) of states (B, K, d) in the columns ``kept``."""
        tokens = self.memory.tokens
        base = self.memory.backbone.logits(states).clamp(min=UNLIKELY)
        offered = self.offered.to(base.device)[:, kept]
        asks = tokens.logits(states).to(base).masked_fill(~offered, UNLIKELY)
        base = F.pad(base, (0, tokens.first - base.shape[-1]), value=UNLIKELY)
        logits = F.pad(torch.cat([base, asks], dim=-1), (0, tokens.width - tokens.first - len(KINDS)), value=UNLIKELY)
        columns = torch.arange(self.offered.shape[1])[kept].tolist()
        places = [(row, columns.index(at), token) for (row, at), token in self.forced.items() if at in columns]
        if not places:
            return logits
        rows, at, ids = (torch.tensor(own, device=logits.device) for own in zip(*places, strict=True))
        only = logits.new_full((len(ids), logits.shape[-1]), UNLIKELY).scatter(1, ids[:, None], 0.0)
        return logits.index_put((rows, at), only)

    def free(self, labels: Tensor) -> Tensor:
        """Labels (B, L) without the ids that were no choice."""
        labels = labels.clone()
        for row, at in self.forced:
            labels[row, at + 1 :][:1] = IGNORED
        return labels


def _found(memory: Memory, ids: list[int]) -> int | None:
    """Where the answer begins: behind the last opening of an answer before the first memory token."""
    opening = memory.backbone.opening
    first = next((at for at, token in enumerate(ids) if token >= memory.tokens.first), len(ids))
    ends = range(first, len(opening) - 1, -1)
    return next((end for end in ends if opening and ids[end - len(opening) : end] == opening), None)


def _check(rest: Mapping[str, Any]) -> None:
    odd = next((name for name in REFUSED if rest.get(name) is not None and rest[name] is not False), None)
    if odd is not None:
        raise AttachError(f"a sequence that holds memory tokens takes no {odd}: latents have places of their own in it")
    for name in CACHES:
        past = rest.get(name)
        if past is not None and past.get_seq_length():
            raise AttachError(f"a sequence that holds memory tokens takes no {name}: pass the whole of it")
