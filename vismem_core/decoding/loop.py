"""The decoding loop: ``generate``'s own sampling loop, in which rows may take in memory (Eq. 3, 4).

Every row writes one id per step, so the ids stay rectangular without filler: an invocation token, then its end token,
then text. Between the two the row's latents enter the cache; they have no ids.

The query is built from the states that chose an invocation token and the tokens before it. So memory that is formed by
the language model can ride behind the invocation token in the same forward pass, and memory that needs nothing of the
language model is there before. If all rows take in latents of the same kind together (always so for one row), these and
the end token enter in one pass, and in the invocation token's own where they are there before. In a ragged batch the
latents enter in the pass of the neighbours' next tokens (:mod:`vismem_core.decoding.packing`), or alone where that
cannot be.

A call need not end with the rows that it began with: those that are done may leave, and those of another call, which
has read its prompts, may go on in their places.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from vismem_core.base import cache as kv
from vismem_core.base.tensor import agreed
from vismem_core.config import KINDS, Kind
from vismem_core.errors import AttachError
from vismem_core.memory.trace import Invocation, Trace
from vismem_core.memory.trigger import Row, Trigger

from .inner import Latents
from .line import Line
from .passes import Passes
from .processors import Processors
from .record import Record
from .room import BLOCK
from .session import Session

if TYPE_CHECKING:
    from vismem_core.memory.memory import Memory

NEVER = float("-inf")
ROOM = 3
"""Ids an invocation needs before ``max_length``: its two tokens and one that can profit from it."""


class Decoder:
    """One ``generate`` call with memory; passed to transformers as ``custom_generate``.

    Args:
        memory: what is attached.
        session: already listening, since the images are encoded before the loop starts.
        streamer: ``generate`` keeps the user's streamer from custom loops, so it is handed over here.

    Attributes:
        line: the rows between two passes.
        guest: the prompts are read and no more; another call goes on with them (:meth:`_guests`).
        output: what a guest's first tokens are chosen from.
    """

    line: Line
    guest = False
    output: Any

    def __init__(self, memory: Memory, session: Session, trigger: Trigger, trace: Trace, streamer: Any = None) -> None:
        self.memory, self.session, self.trigger, self.trace = memory, session, trigger, trace
        self.tokens, self.streamer, self.passes = memory.tokens, streamer, Passes(memory, session)
        self.rows: list[Row] = []
        self.due: dict[int, Kind] = {}
        self.order: list[int] = []  # number of each row that is being decoded, in the result of its call
        self.ahead, self.left = 0, list[Tensor]()  # columns to reserve where that is known, and room for them
        self.reserved = list[Tensor]()

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Decode until every row has stopped; the same arguments and results as transformers' sampling loop."""
        _check(generation_config, model_kwargs)
        record = Record(generation_config)
        prompt = input_ids.shape[1]
        limit = stopping_criteria.max_length or generation_config.max_length
        pad: Any = generation_config._pad_token_tensor
        mask = model_kwargs.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        compiler, passes = self.memory.compiler, self.passes
        inner = passes.inner
        inner.compile = compiler.wanted(generation_config, model_kwargs, self.memory.config.compile)
        if inner.compile is not None and self.session.needs.image_places:
            raise AttachError("memory.places=image is not compiled: call generate without compiling or a static cache")
        if limit is not None:
            self.ahead = self.memory.columns(limit - prompt) + inner.width
            if inner.compile is None:
                self.ahead = min(self.ahead, BLOCK)  # more is cheap to reserve later
            else:
                self.left, compiler.room = compiler.room, []
        output = self._begin(model, input_ids, generation_config, model_kwargs)
        process = Processors(logits_processor, self.tokens, len(input_ids))
        self.order, line = list(range(len(input_ids))), Line.of(input_ids)
        self.line = line
        if self.guest:
            self.output = output
            return input_ids
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(output, model_kwargs, is_encoder_decoder=False)
            for guest in self._guests() if passes.fed is None else ():
                self._seat(guest, output, model_kwargs, pad)
                padded = True
            latents = self._form(line.fed)
            padded = self._forget(latents) or padded
            logits = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=line.ids.device)
            room = None if limit is None else limit - line.ids.shape[1]
            logits, forced = self._choices(logits, room, line.alive)
            scores = self._force(process(line.ids, logits, output.logits.shape[-1]), forced)
            record.add(output, scores, logits)
            tokens = self._select(scores, generation_config.do_sample)
            if ends:  # without an end token ``generate`` pads nothing either
                tokens = torch.where(line.running, tokens, pad.to(tokens.device))
            line.ids = torch.cat([line.ids, tokens[:, None]], dim=-1)
            owes = (tokens >= self.tokens.first) & (tokens < self.tokens.first + len(KINDS))
            line.ended = line.ended | stopping_criteria(line.ids, record.scores)
            line.running = agreed(self.memory.model, line.running & (~line.ended | owes))  # clocks, say, differ
            line.fed, going = torch.stack([tokens, line.running.long()]).tolist()  # a step's one wait for the device
            self._note(line.fed)
            line.alive = list(map(bool, going))
            if self.streamer is not None:
                self.streamer.put(torch.tensor(line.fed))
            del output
            if not any(line.alive):
                break
            if (kept := self._kept(line.alive)) is not None:
                latents = self._retire(kept, latents, model_kwargs)
            if not any(map(self._drops_images, range(len(line.fed)))):  # images leave before latents enter
                passes.form_early(line.fed, model_kwargs)
            with self.memory.acting() if self.trigger.active else nullcontext():
                output, padded = passes.feed(model, line.ids, line.fed, latents, model_kwargs, padded)
            self.session.observe([row for row, token in enumerate(line.fed) if token >= self.tokens.first + len(KINDS)])
            self.session.advance()
        if passes.fed is not None:  # nobody asked for it
            self.session.room.back(passes.fed.columns)
        if forbidden := int(process.forbidden):
            self.trace.blocked["forbidden"] += forbidden
        if self.streamer is not None:
            self.streamer.end()
        if inner.compile is not None and not record.wanted:  # else its cache stays the caller's
            compiler.room = self.reserved
        return record.result(line.ids, self.session.room)

    # What rollouts and servers do otherwise

    def _drops_images(self, row: int) -> bool:
        """Whether the images of ``row`` leave the cache once memory is formed."""
        return self.memory.config.drop_image_after_invocation

    def _room(self, row: int, room: int | None) -> int | None:
        """Ids that ``row`` may still write, where the call has room for so many."""
        return room

    def _trigger(self, row: int) -> Trigger:
        """Who decides about memory of ``row``."""
        return self.trigger

    def _begin(self, model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
        """Read the prompts; what the first tokens are chosen from."""
        output = model._prefill(input_ids, config, model_kwargs)
        self._start(input_ids, model_kwargs, output, config.num_return_sequences or 1)
        return output

    def _select(self, scores: Tensor, sample: bool) -> Tensor:
        """Each row's next token."""
        tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1) if sample else scores.argmax(-1)
        return agreed(self.memory.model, tokens)

    def _kept(self, alive: list[bool]) -> list[int] | None:
        """Before the next pass: the rows that go on, or None where all do, as in ``generate``."""
        return None

    def _guests(self) -> Iterable[Decoder]:
        """After a pass: others whose prompts have been read, and whose rows go on here."""
        return ()

    def _retire(self, kept: list[int], latents: Latents, model_kwargs: dict[str, Any]) -> Latents:
        """Go on with the kept rows alone; their part of the latents."""
        rows = len(self.rows)
        self.session.take(kept)
        self.line.take(kept)
        self.rows, self.order = [self.rows[row] for row in kept], [self.order[row] for row in kept]
        for name, value in model_kwargs.items():
            if isinstance(value, Tensor) and len(value) == rows:
                model_kwargs[name] = value[kept]
        model_kwargs[kv.NAME] = self.session.cache
        place = {row: at for at, row in enumerate(kept)}
        left: Latents = {}
        for kind, (owners, vectors) in latents.items():
            if own := [at for at, row in enumerate(owners) if row in place]:
                left[kind] = ([place[owners[at]] for at in own], vectors[own])
        return left

    def _seat(self, guest: Decoder, output: Any, model_kwargs: dict[str, Any], pad: Tensor | None) -> None:
        """Let a guest's rows go on here: in places of rows that are done, and in new ones where these are too few."""
        rows, missing = len(self.rows), len(guest.rows) - self.line.alive.count(False)
        if missing > 0:
            more = [*range(rows), *[0] * missing]
            self._retire(more, {}, model_kwargs)
            self.line.alive[rows:], self.line.fed[rows:] = [False] * missing, [-1] * missing
            output.logits = output.logits[more]
        free = [row for row, own in enumerate(self.line.alive) if not own]
        places = free[: len(guest.rows)]
        self.session.seat(places, guest.session)
        self.line.seat(places, guest.line.ids, pad)
        output.logits[places, -1] = guest.output.logits[:, -1]
        for place, row, number in zip(places, guest.rows, guest.order, strict=True):
            self.rows[place], self.order[place] = row, number

    # One step

    def _start(self, input_ids: Tensor, model_kwargs: dict[str, Any], output: Any, copies: int) -> None:
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if positions is None:
            full = torch.ones_like(input_ids) if mask is None else mask
            positions = (full.cumsum(-1) - 1).clamp(min=0)
        self.session.start(input_ids, mask, self.session.places(positions), getattr(output, kv.NAME))
        self.session.make_room(self.ahead, self.left)
        self.left = []
        if self.passes.inner.compile is not None:
            self.reserved = self.session.room.tensors
        setattr(output, kv.NAME, self.session.cache)
        self.rows = [Row(seed=seed) for seed in seeds(input_ids, mask, copies)]

    def _form(self, fed: list[int]) -> Latents:
        """Form memory for the rows that were just fed an invocation token."""
        rows: dict[Kind, list[int]] = defaultdict(list)
        for row, token in enumerate(fed):
            if kind := self.tokens.kind(token):
                rows[kind].append(row)
                self.due[row] = kind
        latents = {}
        for kind, own in rows.items():
            if own[0] in self.passes.formed:
                vectors = torch.stack([self.passes.formed.pop(row) for row in own])
            else:
                vectors = self.passes.form(own, kind)
            latents[kind] = (own, vectors)
            self.trace.invocations += [
                Invocation(self.order[row], kind, self.rows[row].step - 1, vectors[at]) for at, row in enumerate(own)
            ]
        return latents

    def _forget(self, latents: Latents) -> bool:
        """Let rows that have formed memory lose sight of their images; whether there are such rows."""
        rows = [row for own, _ in latents.values() for row in own if self._drops_images(row)]
        self.session.hide_images(rows)
        return bool(rows)

    def _choices(self, logits: Tensor, room: int | None, running: list[bool]) -> tuple[Tensor, dict[int, int]]:
        """Append the memory tokens' logits, and say which rows have no choice."""
        forced: dict[int, int] = {}
        offered: dict[int, tuple[Kind, ...]] = {}
        for at, row in enumerate(self.rows):
            if at in self.due:
                forced[at] = self.tokens.end(self.due.pop(at))
            elif running[at] and (decision := self._trigger(at)(row)) != "none":
                if (why := self.memory.refuses(row)) is not None:
                    if decision != "policy":  # which is just not asked there
                        self.trace.blocked[why] += 1
                elif (left := self._room(at, room)) is not None and left < ROOM:
                    self.trace.blocked["room"] += 1
                elif decision == "policy":
                    offered[at] = self._trigger(at).kinds
                else:
                    forced[at] = self.tokens.invocation(decision)
        extended = F.pad(logits, (0, self.tokens.width - logits.shape[-1]), value=NEVER)
        if offered:
            own = self.tokens.logits(self.session.hidden[:, -1]).to(logits.device)
            allowed = [[kind in offered.get(at, ()) for kind in KINDS] for at in range(len(logits))]
            if not all(map(all, allowed)):
                own = own.masked_fill(~torch.tensor(allowed, device=own.device), NEVER)
            extended[:, self.tokens.first : self.tokens.first + len(KINDS)] = own
        return extended, forced

    @staticmethod
    def _force(scores: Tensor, forced: dict[int, int]) -> Tensor:
        """Leave forced rows a single choice, of log-probability 0."""
        if forced:
            rows, tokens = list(forced), list(forced.values())
            scores = scores.clone()  # without a processor they are the raw logits, which the record keeps
            scores[rows] = NEVER
            scores[rows, tokens] = 0.0
        return scores

    def _note(self, tokens: list[int]) -> None:
        for row, token in zip(self.rows, tokens, strict=True):
            self.memory.note(row, token)


def _check(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise AttachError(
            f"memory works with greedy search and sampling, not with {mode.value.replace('_', ' ')}: "
            "use num_beams=1 and no other search, or memory.off() for this call"
        )
    if not model_kwargs.get("use_cache", True):
        raise AttachError("memory lives in the KV cache: call generate with use_cache=True")
    if config.prefill_chunk_size is not None:
        raise AttachError("memory needs the prompt in one piece: call generate without prefill_chunk_size")
    if config.guidance_scale not in (None, 1):
        raise AttachError("memory does not work with generate(guidance_scale=...): use memory.off() for this call")
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
        raise AttachError("memory needs prompts that are padded on the left: set tokenizer.padding_side = 'left'")
    past = model_kwargs.get(kv.NAME)
    if past is not None and past.get_seq_length():
        raise AttachError("memory cannot see what past_key_values already holds: pass the whole prompt without them")


def seeds(input_ids: Tensor, mask: Tensor | None, copies: int) -> list[int]:
    """One number per row from its own prompt and from which of its ``copies`` (``num_return_sequences``) it is."""
    kept = list(input_ids) if mask is None else [ids[own.bool()] for ids, own in zip(input_ids, mask, strict=True)]
    prompts = [zlib.crc32(str(ids.tolist()).encode("ascii")) for ids in kept]
    return [prompt + 0x100000000 * (row % copies) for row, prompt in enumerate(prompts)]
