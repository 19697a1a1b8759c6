"""The decoding loop: ``generate``'s own sampling loop, in which rows may take in memory (Eq. 3, 4).

Every row writes one id per step, so the ids stay rectangular without filler: an invocation token, then its end token,
then text. Between the two the row's latents enter the cache; they have no ids.

The query is built from the states that chose an invocation token and the tokens before it. So memory that is formed by
the language model can ride behind the invocation token in the same forward pass, and memory that needs nothing of the
language model is there before. If all rows take in latents of the same kind together (always so for one row), these and
the end token enter in one pass, and in the invocation token's own where they are there before. In a ragged batch the
latents enter in the pass of the neighbours' next tokens (:mod:`vismem_core.decoding.packing`), or alone where that
cannot be.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import CompileConfig, GenerateDecoderOnlyOutput, GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from vismem_core.base import cache as kv
from vismem_core.base.backbone import NO_TOKEN
from vismem_core.config import KINDS, Kind
from vismem_core.errors import AttachError
from vismem_core.memory.former import MemoryFormer, RidingFormer
from vismem_core.memory.tokens import text_alone
from vismem_core.memory.trace import Invocation, Trace
from vismem_core.memory.trigger import Row, Trigger

from .processors import Processors
from .record import Record
from .session import Session

if TYPE_CHECKING:
    from vismem_core.memory.memory import Memory

NEVER = float("-inf")
ROOM = 3
"""Ids an invocation needs before ``max_length``: its two tokens and one that can profit from it."""
Latents = dict[Kind, tuple[list[int], Tensor]]
"""Rows and the vectors (R, N, d) they take in, by kind."""


class Decoder:
    """One ``generate`` call with memory; passed to transformers as ``custom_generate``.

    Args:
        memory: what is attached.
        session: already listening, since the images are encoded before the loop starts.
        streamer: ``generate`` keeps the user's streamer from custom loops, so it is handed over here.
    """

    def __init__(self, memory: Memory, session: Session, trigger: Trigger, trace: Trace, streamer: Any = None) -> None:
        self.memory, self.session, self.trigger, self.trace = memory, session, trigger, trace
        self.tokens, self.streamer = memory.tokens, streamer
        self.rows: list[Row] = []
        self.due: dict[int, Kind] = {}
        self.formed: dict[int, Tensor] = {}  # latents that are there when their invocation token has been fed, by row
        self.fed: Fed | None = None  # the step of end tokens that were fed with their invocation tokens
        self.order: list[int] = []  # number in the result of each row that is being decoded
        self.compile: CompileConfig | None = None  # how steps without memory are compiled
        self.ahead = 0  # columns to reserve, where that is known and pays

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
        self.compile = self.memory.compiler.wanted(generation_config, model_kwargs, self.memory.config.compile)
        if self.compile is not None and limit is not None:
            self.ahead = limit - prompt + self.memory.config.budget * self.memory.longest
        output = self._begin(model, input_ids, generation_config, model_kwargs)
        process = Processors(logits_processor, self.tokens, len(input_ids))
        self.order, fed = list(range(len(input_ids))), [-1] * len(input_ids)
        running = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        ended = ~running  # what stops a row in the midst of an invocation does so after its end token
        alive = [True] * len(input_ids)
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(output, model_kwargs, is_encoder_decoder=False)
            latents = self._form(fed, input_ids.shape[1] - prompt - 1)
            padded = self._forget(latents) or padded
            logits = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
            room = None if limit is None else limit - input_ids.shape[1]
            logits, forced = self._choices(logits, room, alive)
            scores = self._force(process(input_ids, logits, output.logits.shape[-1]), forced)
            record.add(output, scores, logits)
            tokens = self._select(scores, generation_config.do_sample)
            if ends:  # without an end token ``generate`` pads nothing either
                tokens = torch.where(running, tokens, pad.to(tokens.device))
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            owes = (tokens >= self.tokens.first) & (tokens < self.tokens.first + len(KINDS))
            ended = ended | stopping_criteria(input_ids, record.scores)
            running = running & (~ended | owes)
            fed, going = torch.stack([tokens, running.long()]).tolist()  # the one wait for the device in a step
            self._note(fed)
            alive = list(map(bool, going))
            if self.streamer is not None:
                self.streamer.put(torch.tensor(fed))
            del output
            if not any(alive):
                break
            if (kept := self._kept(alive)) is not None:
                input_ids, running, ended = input_ids[kept], running[kept], ended[kept]
                fed, alive = [fed[row] for row in kept], [alive[row] for row in kept]
                latents = self._retire(kept, latents, model_kwargs)
            self._form_early(fed, model_kwargs)
            with self.memory.acting() if self.trigger.active else nullcontext():
                output, padded = self._feed(model, input_ids, fed, latents, model_kwargs, padded)
            self.session.observe([row for row, token in enumerate(fed) if token >= self.tokens.first + len(KINDS)])
            self.session.advance()
        if self.fed is not None:  # nobody asked for it
            self.session.room.back(self.fed.columns)
        if forbidden := int(process.forbidden):
            self.trace.blocked["forbidden"] += forbidden
        if self.streamer is not None:
            self.streamer.end()
        return record.result(input_ids, self.session.room)

    # What rollouts do otherwise

    def _drops_images(self, row: int) -> bool:
        """Whether the images of ``row`` leave the cache once memory is formed."""
        return self.memory.config.drop_image_after_invocation

    def _begin(self, model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
        """Read the prompts; what the first tokens are chosen from."""
        output = model._prefill(input_ids, config, model_kwargs)
        self._start(input_ids, model_kwargs, output, config.num_return_sequences or 1)
        return output

    def _select(self, scores: Tensor, sample: bool) -> Tensor:
        """Each row's next token."""
        if sample:
            return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        return scores.argmax(-1)

    def _kept(self, alive: list[bool]) -> list[int] | None:
        """Before the next pass: the rows that go on, or None where all do, as in ``generate``."""
        return None

    def _retire(self, kept: list[int], latents: Latents, model_kwargs: dict[str, Any]) -> Latents:
        """Go on with the kept rows alone; their part of the latents."""
        rows = len(self.rows)
        self.session.take(kept)
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

    # One step

    def _start(self, input_ids: Tensor, model_kwargs: dict[str, Any], output: Any, copies: int) -> None:
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if positions is None:
            full = torch.ones_like(input_ids) if mask is None else mask
            positions = (full.cumsum(-1) - 1).clamp(min=0)
        self.session.start(input_ids, mask, self.session.places(positions), getattr(output, kv.NAME))
        self.session.make_room(self.ahead)
        setattr(output, kv.NAME, self.session.cache)
        self.rows = [Row(seed=seed) for seed in seeds(input_ids, mask, copies)]

    def _form(self, fed: list[int], position: int) -> Latents:
        """Form memory for the rows that were just fed an invocation token."""
        rows: dict[Kind, list[int]] = defaultdict(list)
        for row, token in enumerate(fed):
            if kind := self.tokens.kind(token):
                rows[kind].append(row)
                self.due[row] = kind
        latents = {}
        for kind, own in rows.items():
            if own[0] in self.formed:
                vectors = torch.stack([self.formed.pop(row) for row in own])
            else:
                vectors = self._replaced(self.session.form(own, self.memory.builder, self.memory.former(kind)))
            latents[kind] = (own, vectors)
            self.trace.invocations += [
                Invocation(self.order[row], kind, position, vectors[at]) for at, row in enumerate(own)
            ]
        return latents

    def _form_early(self, fed: list[int], model_kwargs: dict[str, Any]) -> None:
        """Form memory for rows that are about to be fed an invocation token, all of one kind, where it can be."""
        session, kind = self.session, self.tokens.kind(fed[0])
        if kind is None or set(fed) != {fed[0]} or not self.memory.former(kind).early:
            return
        rows = list(range(len(fed)))
        alike = not (session.room.ragged or session.room.sources or kv.states(session.room))
        if alike and not session.watched(model_kwargs) and not any(map(self._drops_images, rows)):
            vectors = session.form(rows, self.memory.builder, self.memory.former(kind), fed=False)
            self.formed = dict(zip(rows, self._replaced(vectors), strict=True))

    def _replaced(self, vectors: Tensor) -> Tensor:
        return vectors if self.memory.replacement is None else self.memory.replacement(vectors)

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
            elif running[at] and (decision := self.trigger(row)) != "none":
                if (why := self.memory.refuses(row)) is not None:
                    if decision != "policy":  # which is just not asked there
                        self.trace.blocked[why] += 1
                elif room is not None and room < ROOM:
                    self.trace.blocked["room"] += 1
                elif decision == "policy":
                    offered[at] = self.trigger.kinds
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

    def _feed(
        self,
        model: Any,
        input_ids: Tensor,
        fed: list[int],
        latents: Latents,
        model_kwargs: dict[str, Any],
        padded: bool,
    ) -> tuple[Any, bool]:
        """Feed every row's last id, after the latents of the rows that formed some."""
        session, together = self.session, next(iter(latents.values()), None)
        if self.fed is not None:
            return self._feed_nothing(latents), padded
        if self.formed:
            ends = [self.tokens.end(kind) for kind in map(self.tokens.kind, fed) if kind]
            return self._feed_at_once(model, input_ids, ends, model_kwargs, padded), padded
        shared = session.room.sources is not None
        same = not session.room.ragged and not shared
        if together is not None and len(together[0]) == len(self.rows) and same:
            return self._feed_together(model, input_ids, together[1], model_kwargs, padded), padded
        if session.packs(model_kwargs):
            riders = self._riders(fed)
            if latents or riders or shared:
                padded = padded or bool(latents)
                return self._feed_packed(model, input_ids, latents, riders, model_kwargs, padded), padded
        if latents:
            session.insert(latents)
            padded = True
        session.room.aim(1)
        with text_alone() if max(fed) < self.tokens.first else nullcontext():
            output = self._feed_one(model, input_ids, model_kwargs, padded)
        session.room.landed()
        return output, padded

    def _feed_one(self, model: Any, input_ids: Tensor, model_kwargs: dict[str, Any], padded: bool) -> Any:
        """Feed one token a row and nothing else."""
        session = self.session
        model_kwargs["attention_mask"] = session.shown if padded else None
        if "position_ids" in model_kwargs:
            model_kwargs["position_ids"] = session.positions
        compiled, watched = self.compile is not None, session.watched(model_kwargs)
        masked = compiled or (session.room.ragged and session.room.windowed and not session.room.aligned)
        if masked and not watched and not _hooked(model):  # not all models hand such masks on to their language model
            with self._compiled_pass() if compiled else nullcontext():
                last, beside = session.backbone.embed(input_ids[:, -1:]), session.beside(input_ids[:, -1:])
                session.backbone.continue_(last, session.masks(), session.positions, session.cache, **beside)
            output = CausalLMOutputWithPast(logits=session.backbone.logits(session.hidden))
            setattr(output, kv.NAME, session.cache)
            return output
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        inputs["position_ids"] = session.positions  # which some models leave out there, or change
        with self._compiled_pass() if compiled else nullcontext():
            if masked:
                inputs["attention_mask"] = session.masks()
            return model(**inputs, return_dict=True)

    @contextmanager
    def _compiled_pass(self) -> Iterator[None]:
        assert self.compile is not None
        with self.session.room.held(), self.memory.compiler.on(self.compile):
            yield
        self.session.hidden = self.session.hidden.clone()  # the next compiled pass writes its own in the same place

    def _riders(self, fed: list[int]) -> Latents:
        """For rows whose next token is an invocation: what their memory is formed of, where it may ride along."""
        riders = {}
        for kind in KINDS:
            rows = [row for row, token in enumerate(fed) if self.tokens.kind(token) == kind]
            former = self.memory.former(kind)
            if rows and former.rides:
                riders[kind] = (rows, self.session.rider(rows, self.memory.builder, _riding(former)))
        return riders

    def _feed_packed(
        self,
        model: Any,
        input_ids: Tensor,
        latents: Latents,
        riders: Latents,
        model_kwargs: dict[str, Any],
        padded: bool,
    ) -> Any:
        session, formers = self.session, [_riding(self.memory.former(kind)) for kind in riders]
        last = session.backbone.embed(input_ids[:, -1])
        packing, positions = session.pack(latents, riders)
        model_kwargs["attention_mask"] = session.shown if padded else None
        if "position_ids" in model_kwargs:
            model_kwargs["position_ids"] = session.positions
        behind = [vectors.flatten(0, 1) for own in (latents, riders) for _, vectors in own.values()]
        with packing.on(session.backbone.decoder) as cache, ExitStack() as stack:
            if formers:
                stack.enter_context(self.memory.acting(slice(packing.slices()[0].start)))
            for former, tokens in zip(formers, packing.slices(), strict=True):
                stack.enter_context(former.on(tokens))
            output = model(
                inputs_embeds=torch.cat([last, *behind])[None],
                position_ids=positions,
                **kv.given(model, cache),
                use_cache=True,
                logits_to_keep=slice(len(last)),  # not a tensor: the states may be on another device than these ids
                return_dict=True,
                packing=packing,
                **session.beside(input_ids[:, -1][None], behind=sum(map(len, behind))),
            )
        for former, (rows, _), hidden in zip(formers, riders.values(), packing.ridden(session.hidden[0]), strict=True):
            self.formed |= dict(zip(rows, self._replaced(former.read(hidden)), strict=True))
        session.unpack()
        output.logits = output.logits.transpose(0, 1)
        setattr(output, kv.NAME, session.cache)
        return output

    def _feed_at_once(
        self, model: Any, input_ids: Tensor, ends: list[int], model_kwargs: dict[str, Any], padded: bool
    ) -> Any:
        """Feed every row its invocation token, the latents that are there already, and its end token."""
        session, latents = self.session, torch.stack(list(self.formed.values()))
        begin, columns = session.backbone.embeddings(input_ids[:, -1:]), latents.shape[1] + 1
        end = self.tokens.vectors(torch.tensor(ends, device=input_ids.device)[:, None], latents)
        embeds = torch.cat([begin.to(latents), latents, end], dim=1)
        logits = self._feed_embeds(model, embeds, model_kwargs, padded).logits
        self.fed = Fed(columns, logits, *session.part())
        output = CausalLMOutputWithPast(logits=session.backbone.logits(session.hidden))
        setattr(output, kv.NAME, session.cache)
        return output

    def _feed_nothing(self, latents: Latents) -> Any:
        """The step of end tokens that were fed before."""
        assert self.fed is not None
        session, ((rows, vectors),) = self.session, latents.values()
        session.took_in(rows, vectors, session.places_of(rows, vectors.shape[1]))
        session.hidden, session.embeds = self.fed.hidden, self.fed.embeds
        output = CausalLMOutputWithPast(logits=self.fed.logits)
        setattr(output, kv.NAME, session.cache)
        self.fed = None
        return output

    def _feed_together(
        self, model: Any, input_ids: Tensor, latents: Tensor, model_kwargs: dict[str, Any], padded: bool
    ) -> Any:
        """Feed every row its latents and its end token."""
        rows, session = range(len(latents)), self.session
        end = self.tokens.vectors(input_ids[:, -1:], latents)
        places = session.places_of(rows, latents.shape[1])
        output = self._feed_embeds(model, torch.cat([latents, end], dim=1), model_kwargs, padded)
        session.took_in(rows, latents, places)
        return output

    def _feed_embeds(self, model: Any, embeds: Tensor, model_kwargs: dict[str, Any], padded: bool) -> Any:
        """Feed every row several vectors (B, T, d); the logits are the last ones'."""
        session, length = self.session, embeds.shape[1]
        session.room.aim(length)
        model_kwargs["attention_mask"] = session.shown if padded else None
        wanted = {
            name: model_kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in model_kwargs
        }
        output = model(
            inputs_embeds=embeds,
            attention_mask=model_kwargs["attention_mask"],
            position_ids=session.positions + torch.arange(length, device=session.positions.device),
            **kv.given(model, session.cache),
            use_cache=True,
            logits_to_keep=slice(-1, None),  # no number, by which some language models compute few to the end
            return_dict=True,
            **session.beside(torch.full(embeds.shape[:2], NO_TOKEN)),
            **wanted,
        )
        session.room.landed()
        for name in ("attentions", "hidden_states"):  # one position per returned id, as everywhere else
            if layers := getattr(output, name, None):
                setattr(output, name, tuple(layer[..., -1:, :] for layer in layers))
        return output


@dataclass(frozen=True)
class Fed:
    """What is known of the coming step, whose end tokens have been fed.

    Attributes:
        columns: that each row took in for it, latents and end token.
        logits: (B, 1, V) after the end tokens.
        hidden, embeds: (B, 1, d), the end tokens' last states and embeddings.
    """

    columns: int
    logits: Tensor
    hidden: Tensor
    embeds: Tensor


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


def _hooked(model: Any) -> bool:
    """Whether others than memory listen to the model's own forward, outside of its language model."""
    hooks = (
        hook
        for own in {model, model.base_model}
        for hook in (*own._forward_pre_hooks.values(), *own._forward_hooks.values())
    )
    return any(not hook.__module__.startswith("vismem_core.") for hook in hooks)


def _riding(former: MemoryFormer) -> RidingFormer:
    assert isinstance(former, RidingFormer), f"{type(former).__name__}.rides, and is no RidingFormer"
    return former


def seeds(input_ids: Tensor, mask: Tensor | None, copies: int) -> list[int]:
    """One number per row from its own prompt and from which of its ``copies`` (``num_return_sequences``) it is."""
    kept = list(input_ids) if mask is None else [ids[own.bool()] for ids, own in zip(input_ids, mask, strict=True)]
    prompts = [zlib.crc32(str(ids.tolist()).encode("ascii")) for ids in kept]
    return [prompt + 0x100000000 * (row % copies) for row, prompt in enumerate(prompts)]
