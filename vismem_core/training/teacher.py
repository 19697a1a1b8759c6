"""Teacher forcing through memory: the likelihood of a given answer, with memory invoked at a given point.

One pass without gradients brings every row up to its invocation token. Memory is formed with gradients, and a second
pass with gradients goes over the latents, the end token and the rest of the answer. Prompt positions carry no
gradient work: they are in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vismem_core.base import cache as kv
from vismem_core.base.backbone import NO_TOKEN
from vismem_core.config import Kind
from vismem_core.decoding.session import Session
from vismem_core.decoding.turn import TURN
from vismem_core.memory.memory import Memory

from .batches import Batch, extended

IGNORED = -100


@dataclass
class Forced:
    """A batch brought up to its invocation points.

    Attributes:
        session: at each row's invocation token, or at the token before where a row has none.
        kinds: what each row invoked, or None.
        rests: what each row has still to write.
        given: how many tokens of that are not of its choosing.
    """

    session: Session
    kinds: list[Kind | None]
    rests: list[list[int]]
    given: list[int]

    def counts(self, rows: Sequence[int]) -> list[int]:
        """How many tokens each of some rows chooses."""
        return [len(self.rests[row]) - self.given[row] for row in rows]


def bring_up(memory: Memory, batch: Batch, kinds: Sequence[Kind | None], points: Sequence[int]) -> Forced:
    """Feed prompts, the first ``points`` answer tokens and the invocation tokens, without gradients."""
    backbone = memory.backbone
    written = [
        answer[:point] + ([memory.tokens.invocation(kind)] if kind else [])
        for answer, kind, point in zip(batch.answers, kinds, points, strict=True)
    ]
    rests = [answer[point:] for answer, point in zip(batch.answers, points, strict=True)]
    session = Session(backbone, memory.needs())
    with torch.no_grad(), TURN.call(), session.listen():
        inputs = extended(batch.inputs, written, int(backbone.processor.tokenizer.pad_token_id))
        positions = backbone.positions(inputs)
        # No number, as in :func:`vismem_core.decoding.replay.read_prompts`.
        kept = {"logits_to_keep": slice(-1, None), "use_cache": True, "return_dict": True}
        output = backbone.model(**inputs, position_ids=positions, **kept, **kv.fresh(backbone.model))
        session.start(
            inputs["input_ids"],
            inputs["attention_mask"],
            positions,
            getattr(output, kv.NAME),
            written=[len(own) for own in written],
        )
    given = [max(0, count - point) for count, point in zip(batch.given, points, strict=True)]
    return Forced(session, list(kinds), rests, given)


def likelihood(memory: Memory, forced: Forced, rows: Sequence[int], opening: Tensor | None = None) -> Tensor:
    """Log-likelihood of the rest of each row's answer, token by token; of what is given, zeros.

    Args:
        opening: (R, N + 1, d), latents and their end token, which enter between the session's cache and the rest; with
            gradients.

    Returns:
        (R, T), padded with zeros.
    """
    backbone, session = memory.backbone, forced.session
    rests = [forced.rests[row] for row in rows]
    longest = max(map(len, rests))
    index = torch.as_tensor(rows, device=session.mask.device)
    targets = torch.tensor([rest + [IGNORED] * (longest - len(rest)) for rest in rests], device=backbone.device)
    ids = targets[:, :-1].clamp(min=0)
    embeds = backbone.embed(ids)
    if opening is not None:
        ids = F.pad(ids, (opening.shape[1], 0), value=NO_TOKEN)
        embeds = torch.cat([opening.to(embeds), embeds], dim=1)
    last = session.hidden[index, -1:]
    hidden = last
    if embeds.shape[1]:
        steps = torch.arange(embeds.shape[1], device=session.positions.device)
        mask = torch.cat([session.mask[index], session.mask.new_ones(embeds.shape[:2])], dim=1)
        cache = kv.select(session.cache, rows)
        places, beside = session.positions[..., index, :] + steps, backbone.companions(ids)
        count = opening.shape[1] - 1 if opening is not None else 0
        if count and (standing := session.image_places.standing(rows, count, places[..., :1])) is not None:
            passed = places.new_tensor(session.image_places.passed(rows, count))[:, None]
            places = torch.cat([standing, places[..., count:] - count + passed], dim=-1)
        grown = backbone.continue_(embeds, mask, places, cache, **beside)
        hidden = torch.cat([last, grown], dim=1)[:, -longest:]
    logits = backbone.logits(hidden.contiguous()).float()  # for part of a tensor torch copies the head for each row
    steps = torch.arange(longest, device=targets.device)
    given = torch.tensor([forced.given[row] for row in rows], device=targets.device)
    targets = targets.masked_fill(steps < given[:, None], IGNORED).to(logits.device)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return -losses.to(backbone.device)


def groups(kinds: Sequence[Kind | None]) -> Mapping[Kind, list[int]]:
    """Rows by the kind they invoke."""
    found: dict[Kind, list[int]] = {}
    for row, kind in enumerate(kinds):
        if kind is not None:
            found.setdefault(kind, []).append(row)
    return found
