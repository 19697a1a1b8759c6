"""The forward passes of decoding: how the rows' next tokens, latents and riders enter the language model.

One pass a step, whatever enters. Rows that take in the same number of vectors take them in side by side; else all of
it is one packed sequence (:mod:`vismem_core.decoding.packing`), or latents enter by passes of their own before.
Compiled passes go past the model's outer forward (:mod:`vismem_core.decoding.inner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vismem_core.base import cache as kv
from vismem_core.base.backbone import NO_TOKEN
from vismem_core.config import KINDS, Kind
from vismem_core.memory.tokens import text_alone

from .inner import Inner, Latents, riding
from .packing import Packing
from .session import Session

if TYPE_CHECKING:
    from vismem_core.memory.memory import Memory


class Passes:
    """The passes of one call.

    Attributes:
        inner: passes of the language model alone.
        formed: latents (N, d) that are there when their invocation token has been fed, by row.
        fed: the step of end tokens that were fed with their invocation tokens.
    """

    def __init__(self, memory: Memory, session: Session) -> None:
        self.memory, self.session, self.tokens = memory, session, memory.tokens
        self.inner = Inner(memory, session)
        self.formed: dict[int, Tensor] = {}
        self.fed: Fed | None = None

    def form_early(self, fed: list[int], model_kwargs: dict[str, Any]) -> None:
        """Form memory for rows that are about to be fed an invocation token, all of one kind, where it can be."""
        session, kind = self.session, self.tokens.kind(fed[0])
        if kind is None or set(fed) != {fed[0]} or not self.memory.former(kind).early:
            return
        rows = list(range(len(fed)))
        alike = not (session.room.ragged or session.room.sources or kv.states(session.room))
        if alike and not session.needs.image_places and not session.watched(model_kwargs):
            self.formed = dict(zip(rows, self.form(rows, kind, fed=False), strict=True))

    def form(self, rows: Sequence[int], kind: Kind, fed: bool = True) -> Tensor:
        """The latents (R, N, d) of ``rows`` (:meth:`Session.form`), as they enter the language model."""
        with self.memory.compiler.forming(self.inner.compile):
            vectors = self.session.form(rows, self.memory.builder, self.memory.former(kind), fed)
        return self.memory.entering(vectors)

    def feed(
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
            return self._nothing(latents), padded
        if self.formed:
            ends = [self.tokens.end(kind) for kind in map(self.tokens.kind, fed) if kind]
            return self._at_once(model, input_ids, ends, model_kwargs, padded), padded
        if self._compiled(model, model_kwargs) and (latents or max(fed) >= self.tokens.first):
            riders = self._riders(fed) if session.backbone.packs else {}
            output, formed = self.inner.wide(input_ids, latents, riders)
            self.formed |= formed
            return output, padded or bool(latents)
        shared = session.room.sources is not None
        same = not session.room.ragged and not shared and not session.needs.image_places
        if together is not None and len(together[0]) == session.rows and same:
            return self._together(model, input_ids, together[1], model_kwargs, padded), padded
        if session.packs(model_kwargs):
            riders = self._riders(fed)
            if latents or riders or shared:
                padded = padded or bool(latents)
                return self._packed(model, input_ids, latents, riders, model_kwargs, padded), padded
        if latents:
            self._insert(latents)
            padded = True
        session.room.aim(1)
        with text_alone() if max(fed) < self.tokens.first else nullcontext():
            output = self._one(model, input_ids, model_kwargs, padded)
        session.room.landed()
        return output, padded

    def _one(self, model: Any, input_ids: Tensor, model_kwargs: dict[str, Any], padded: bool) -> Any:
        """Feed one token a row and nothing else."""
        session, compiled = self.session, self.inner.compile is not None
        model_kwargs["attention_mask"] = session.shown if padded else None
        if "position_ids" in model_kwargs:
            model_kwargs["position_ids"] = session.positions
        masked = compiled or (session.room.ragged and session.room.windowed and not session.room.aligned)
        if masked and self._alone(model, model_kwargs):
            return self.inner.one(input_ids)
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
        inputs["position_ids"] = session.positions  # which some models leave out there, or change
        with self.inner.compiled():
            if masked:
                inputs["attention_mask"] = self.inner.masks()
            return model(**inputs, return_dict=True)

    def _alone(self, model: Any, model_kwargs: dict[str, Any]) -> bool:
        """Whether the language model's pass is all that anybody asks of the model's."""
        return not self.session.watched(model_kwargs) and not _hooked(model)

    def _compiled(self, model: Any, model_kwargs: dict[str, Any]) -> bool:
        shared = self.session.room.sources is not None  # which packed passes alone can read
        return self.inner.compile is not None and not shared and self._alone(model, model_kwargs)

    def _riders(self, fed: list[int]) -> Latents:
        """For rows whose next token is an invocation: what their memory is formed of, where it may ride along."""
        riders = {}
        for kind in KINDS:
            rows = [row for row, token in enumerate(fed) if self.tokens.kind(token) == kind]
            former = self.memory.former(kind)
            if rows and former.rides:
                riders[kind] = (rows, self.session.rider(rows, self.memory.builder, riding(former)))
        return riders

    def _packed(
        self,
        model: Any,
        input_ids: Tensor,
        latents: Latents,
        riders: Latents,
        model_kwargs: dict[str, Any],
        padded: bool,
    ) -> Any:
        session, formers = self.session, [riding(self.memory.former(kind)) for kind in riders]
        last = session.backbone.embed(input_ids[:, -1])
        packing, positions = self._pack(latents, riders)
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
                **self.inner.beside(input_ids[:, -1][None], behind=sum(map(len, behind))),
            )
        for former, (rows, _), hidden in zip(formers, riders.values(), packing.ridden(session.hidden[0]), strict=True):
            self.formed |= dict(zip(rows, self.memory.entering(former.read(hidden)), strict=True))
        self._unpack()
        output.logits = output.logits.transpose(0, 1)
        setattr(output, kv.NAME, session.cache)
        return output

    def _at_once(
        self, model: Any, input_ids: Tensor, ends: list[int], model_kwargs: dict[str, Any], padded: bool
    ) -> Any:
        """Feed every row its invocation token, the latents that are there already, and its end token."""
        session, latents = self.session, torch.stack(list(self.formed.values()))
        begin, columns = session.backbone.embeddings(input_ids[:, -1:]), latents.shape[1] + 1
        end = self.tokens.vectors(torch.tensor(ends, device=input_ids.device)[:, None], latents)
        embeds = torch.cat([begin.to(latents), latents, end], dim=1)
        logits = self._vectors(model, embeds, model_kwargs, padded).logits
        self.fed = Fed(columns, logits, *session.part())
        return self.inner.told(session.backbone.logits(session.hidden))

    def _nothing(self, latents: Latents) -> Any:
        """The step of end tokens that were fed before."""
        assert self.fed is not None
        session, ((rows, vectors),) = self.session, latents.values()
        session.took_in(rows, vectors, session.places_of(rows, vectors.shape[1]))
        session.hidden, session.embeds = self.fed.hidden, self.fed.embeds
        output = self.inner.told(self.fed.logits)
        self.fed = None
        return output

    def _together(
        self, model: Any, input_ids: Tensor, latents: Tensor, model_kwargs: dict[str, Any], padded: bool
    ) -> Any:
        """Feed every row its latents and its end token."""
        rows, session = range(len(latents)), self.session
        end = self.tokens.vectors(input_ids[:, -1:], latents)
        places = session.places_of(rows, latents.shape[1])
        output = self._vectors(model, torch.cat([latents, end], dim=1), model_kwargs, padded)
        session.took_in(rows, latents, places)
        return output

    def _vectors(self, model: Any, embeds: Tensor, model_kwargs: dict[str, Any], padded: bool) -> Any:
        """Feed every row several vectors (B, T, d); the logits are the last ones'."""
        session, length = self.session, embeds.shape[1]
        if self._compiled(model, model_kwargs):
            return self.inner.vectors(embeds)
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
            **self.inner.beside(torch.full(embeds.shape[:2], NO_TOKEN)),
            **wanted,
        )
        session.room.landed()
        for name in ("attentions", "hidden_states"):  # one position per returned id, as everywhere else
            if layers := getattr(output, name, None):
                setattr(output, name, tuple(layer[..., -1:, :] for layer in layers))
        return output

    def _insert(self, latents: Latents) -> None:
        """Let some rows take in latents on their own, while their neighbours wait.

        Args:
            latents: kind -> (rows, (R, N, d)).
        """
        session = self.session
        for rows, vectors in latents.values():
            length, positions = vectors.shape[1], session.places_of(rows, vectors.shape[1])
            if (standing := session.image_places.standing(rows, length, positions[..., :1])) is not None:
                positions = standing
            grown, mask = session.room.together(rows)
            mask = torch.cat([mask, mask.new_ones(len(rows), length)], dim=-1)
            with session.apart():
                session.backbone.continue_(vectors, mask, positions, grown)
            session.took_in(rows, vectors, positions)
            session.room.aim([length * (row in rows) for row in range(session.rows)])
            session.room.put(grown, rows, length)
            session.room.landed()

    def _pack(self, latents: Latents, riders: Latents) -> tuple[Packing, Tensor]:
        """Prepare a pass in which every row takes in its next token, some latents before it, some riders behind it.

        Returns:
            the packing, and the position ids (.., 1, M) of the packed tokens.
        """
        session = self.session
        places, counts = [], [1] * session.rows
        for rows, vectors in latents.values():
            places.append(session.places_of(rows, vectors.shape[1]))
            session.took_in(rows, vectors, places[-1])
            for row in rows:
                counts[row] += vectors.shape[1]
        beyond = [0] * len(counts)
        for rows, vectors in riders.values():
            for row in rows:
                beyond[row] = vectors.shape[1]
        session.room.aim(counts, beyond)
        places += [session.places_of(rows, vectors.shape[1]) + 1 for rows, vectors in riders.values()]
        packed = torch.cat([session.positions.squeeze(-1), *(own.flatten(-2) for own in places)], dim=-1)
        groups, behind = ([(rows, vectors.shape[1]) for rows, vectors in own.values()] for own in (latents, riders))
        return Packing(session.room, groups, behind), packed[..., None, :]

    def _unpack(self) -> None:
        """After a packed pass: what it noted of each row's last token, as after any other pass."""
        session, rows = self.session, self.session.rows
        session.room.landed()
        session.hidden = session.hidden[:, :rows].transpose(0, 1)
        session.embeds = session.embeds[:, :rows].transpose(0, 1)


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


def _hooked(model: Any) -> bool:
    """Whether others than memory listen to the model's own forward, outside of its language model."""
    hooks = (
        hook
        for own in {model, model.base_model}
        for hook in (*own._forward_pre_hooks.values(), *own._forward_hooks.values())
    )
    return any(not hook.__module__.startswith("vismem_core.") for hook in hooks)
