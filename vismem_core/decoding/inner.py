"""Passes of the language model alone, past the model's outer forward: under masks of ours, and compiled where asked.

Compiled passes have few shapes. Where some row has more than its next token, each row has as many places as the longest
ever needs, and what a row does not need is gone after the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import CompileConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from vismem_core.base import cache as kv
from vismem_core.base.backbone import NO_TOKEN
from vismem_core.config import KINDS, Kind
from vismem_core.memory.former import MemoryFormer, RidingFormer

from .session import Session

if TYPE_CHECKING:
    from vismem_core.memory.memory import Memory

CHUNKED = "chunked_attention"
"""Of layers in which a token sees those before it in its own chunk."""
Latents = dict[Kind, tuple[list[int], Tensor]]
"""Rows and the vectors (R, N, d) they take in, by kind."""


class Inner:
    """The language model's own passes in one call.

    Attributes:
        compile: how they are compiled, or None.
    """

    def __init__(self, memory: Memory, session: Session) -> None:
        self.memory, self.session = memory, session
        self.compile: CompileConfig | None = None

    @property
    def width(self) -> int:
        """Tokens of a row in a compiled pass in which some row has more than one: its own, with riders or latents."""
        return self.memory.config.query.length + self.memory.longest + 2

    def one(self, input_ids: Tensor) -> Any:
        """Feed one token a row."""
        session, ids = self.session, input_ids[:, -1:]
        with self.compiled():
            embeds, beside = session.backbone.embed(ids), self.beside(ids)
            session.backbone.continue_(embeds, self.masks(), session.positions, session.cache, **beside)
        return self.told(session.backbone.logits(session.hidden))

    def vectors(self, embeds: Tensor) -> Any:
        """Feed every row several vectors (B, T, d); the logits are the last ones'."""
        self._spread(embeds, [embeds.shape[1]] * self.session.rows)
        return self.told(self.session.backbone.logits(self.session.hidden[:, -1:]))

    def wide(self, input_ids: Tensor, latents: Latents, riders: Latents) -> tuple[Any, dict[int, Tensor]]:
        """Feed every row its next token, some of them latents before it, some of them riders behind it.

        Returns:
            the output, and the latents (N, d) that were formed of riders, by row.
        """
        session, ids = self.session, input_ids[:, -1:]
        last, places = session.backbone.embed(ids), [0] * session.rows  # where in its row each next token stands
        for rows, vectors in latents.values():
            for row in rows:
                places[row] = vectors.shape[1]
        behind = max([vectors.shape[1] for _, vectors in riders.values()], default=0)
        embeds = last.new_zeros(session.rows, 1 + max(*places, behind), last.shape[-1])
        at = torch.tensor([range(session.rows), places], device=embeds.device)
        embeds[tuple(at)] = last[:, 0]
        for own, first in ((latents, 0), (riders, 1)):
            for rows, vectors in own.values():
                embeds[rows, first : first + vectors.shape[1]] = vectors.to(embeds)
        tokens = torch.full(embeds.shape[:2], NO_TOKEN, device=ids.device)
        tokens[tuple(at.to(ids.device))] = ids[:, 0]
        self._spread(embeds, [place + 1 for place in places], riders, tokens)
        formed: dict[int, Tensor] = {}
        for kind, (rows, vectors) in riders.items():
            hidden = session.hidden[rows, 1 : 1 + vectors.shape[1]]
            read = riding(self.memory.former(kind)).read(hidden)
            formed |= dict(zip(rows, self.memory.entering(read), strict=True))
        for rows, vectors in latents.values():
            session.took_in(rows, vectors, session.places_of(rows, vectors.shape[1]))
        session.hidden, session.embeds = session.hidden[tuple(at.to(session.hidden.device))][:, None], last
        return self.told(session.backbone.logits(session.hidden)), formed

    def _spread(
        self, embeds: Tensor, counts: list[int], riders: Latents | None = None, ids: Tensor | None = None
    ) -> None:
        """One compiled pass over vectors (B, T, d), of which rows keep so many; all such passes are equally wide.

        The formers that may ride are on in all such passes, for no tokens where none ride: that is one pass to compile.

        Args:
            riders: what stands among the vectors behind each row's first.
            ids: (B, T); by default none of them is a token of the model's.
        """
        session, length, told = self.session, embeds.shape[1], ids
        if told is None:
            told = torch.full(embeds.shape[:2], NO_TOKEN)
        width = max(self.width, length)
        embeds, told = F.pad(embeds, (0, 0, 0, width - length)), F.pad(told, (0, width - length), value=NO_TOKEN)
        positions = session.positions + torch.arange(embeds.shape[1], device=session.positions.device)
        session.room.aim(counts, width=embeds.shape[1])
        ridden = {
            former: torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device) for former in self._rides
        }
        for kind, (rows, vectors) in (riders or {}).items():
            ridden[riding(self.memory.former(kind))][rows, 1 : 1 + vectors.shape[1]] = True
        with ExitStack() as stack:
            if ridden:
                stack.enter_context(self.memory.acting(~torch.stack(list(ridden.values())).any(0)))
            for former, tokens in ridden.items():
                stack.enter_context(former.on(tokens))
            stack.enter_context(self.compiled())
            session.backbone.continue_(
                embeds, self.masks(embeds.shape[1]), positions, session.cache, **self.beside(told)
            )
        session.room.landed()
        session.hidden, session.embeds = session.hidden[:, :length], session.embeds[:, :length]

    @property
    def _rides(self) -> list[RidingFormer]:
        """The formers that may ride, if any may: some layers work on all that is cached, and adapters cannot be on for
        single tokens there."""
        formers = map(self.memory.former, KINDS) if self.session.backbone.packs else ()
        return [riding(former) for former in formers if former.rides]

    def masks(self, width: int = 1) -> Any:
        """What the coming pass (T tokens a row) may look at, where the model could not tell from the session's mask.

        As the model takes it: (B, 1, T, W), by kind of layer if it has several.
        """
        config: Any = self.session.backbone.decoder.config
        kinds = set(getattr(config, "layer_types", None) or [""])
        found: dict[str, Tensor | None] = {}
        chunk = getattr(config, "attention_chunk_size", None)
        windows = {
            "full_attention": None,
            "indexed_attention": None,
            "": self.session.room.grown[0].window,
            CHUNKED: chunk,
        }
        for kind in kinds:
            if kind in ("conv", "linear_attention"):  # their states know no columns
                found[kind] = None
                continue
            window = windows.get(kind, getattr(config, "sliding_window", None))
            mask = self.session.room.seen(window, kind == CHUNKED, width)[:, None]
            if config._attn_implementation == "eager":
                mask = torch.zeros_like(mask, dtype=self.session.backbone.dtype).masked_fill(
                    ~mask, torch.finfo(self.session.backbone.dtype).min
                )
            found[kind] = mask
        return found if len(found) > 1 else next(iter(found.values()))

    def beside(self, ids: Tensor, before: int = 0, behind: int = 0) -> dict[str, Tensor]:
        """What comes with tokens (R, E) and so many vectors before and behind them (:meth:`Backbone.companions`)."""
        return self.session.backbone.companions(F.pad(ids, (before, behind), value=NO_TOKEN))

    def told(self, logits: Tensor) -> Any:
        """As the model would have returned it."""
        output = CausalLMOutputWithPast(logits=logits)
        setattr(output, kv.NAME, self.session.cache)
        return output

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Passes inside the context are compiled, if they are to be."""
        if self.compile is None:
            yield
            return
        with self.session.room.held(), self.memory.compiler.on(self.compile):
            yield
        self.session.hidden = self.session.hidden.clone()  # the next compiled pass writes its own in the same place


def riding(former: MemoryFormer) -> RidingFormer:
    """A former that says it rides, as what it must be then."""
    assert isinstance(former, RidingFormer), f"{type(former).__name__}.rides, and is no RidingFormer"
    return former
