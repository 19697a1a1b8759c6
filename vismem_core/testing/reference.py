"""What the model itself does, heard from outside, and independent computations to compare memory with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismem_core.base.backbone import Backbone
from vismem_core.base.vision import VisionStates
from vismem_core.memory.memory import Memory

from .base import NO_END, Base, Question
from .liveliness import picture

KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


@dataclass
class Heard:
    """One entry per forward pass of the language model.

    Attributes:
        embeds: (B, L, d), what entered.
        visual: (B, L, d), the same with visual tokens in their places, which may come later.
        positions: (.., B, L), its position ids, or None where the language model makes them up.
        masks: its attention masks as they were given.
        hidden: (B, L, d), its last hidden states.
        beside: what else came with each token, (B, L, ..) by name.
    """

    embeds: list[Tensor] = field(default_factory=list)
    visual: list[Tensor] = field(default_factory=list)
    positions: list[Tensor | None] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    beside: list[dict[str, Tensor]] = field(default_factory=list)


@contextmanager
def listening(backbone: Backbone) -> Iterator[Heard]:
    """Note what enters and leaves the language model inside the context."""
    heard = Heard()

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeds = kwargs.get("inputs_embeds")
        ids = kwargs.get("input_ids", args[0] if args else None)
        heard.embeds.append(embeds if embeds is not None else backbone.embeddings(ids))
        heard.visual.append(heard.embeds[-1])
        heard.positions.append(kwargs.get("position_ids"))
        heard.masks.append(kwargs.get("attention_mask"))
        others = {name: own for name, own in kwargs.items() if isinstance(own, Tensor) and name not in KNOWN}
        here = heard.embeds[-1].shape[:2]
        heard.beside.append({name: own for name, own in others.items() if own.shape[:2] == here})

    def pass_by(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard.visual[-1] = next(iter((*args, *kwargs.values())))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        heard.hidden.append(output[0])

    handles = [
        backbone.decoder.register_forward_pre_hook(enter, with_kwargs=True),
        backbone.decoder.register_forward_hook(leave),
    ]
    if backbone.entrance is not None:
        handles.append(backbone.entrance.register_forward_pre_hook(pass_by, with_kwargs=True))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def generated(base: Base, *questions: Question) -> Heard:
    """The base's own ``generate``: the prefill and the pass after it."""
    inputs = base.inputs(*questions)
    with listening(base.backbone) as heard:
        base.model.generate(**inputs, max_new_tokens=2, do_sample=False, **NO_END)
    return heard


def states(base: Base, *questions: Question) -> VisionStates:
    """What ``record`` fills while the model reads a batch, its images dealt out to rows."""
    inputs, filled = base.inputs(*questions), VisionStates()
    with torch.no_grad(), base.backbone.record(filled, keep=True, inputs=True):
        base.model(**inputs)
    media = base.backbone.placeholders.values()
    counts = [(inputs["input_ids"] == token).sum(-1).tolist() for token in media]
    told, written = sum(filled.tokens), sum(map(sum, counts))
    assert told == written, f"record counts {told} language tokens, the prompts hold {written} placeholders"
    filled.assign(counts)
    return filled


@torch.no_grad()
def one_pass(base: Base, question: Question, extra: Tensor, ids: Sequence[int | None] = ()) -> Tensor:
    """Last hidden states (L + E, d) of a prompt alone and E vectors after it (E, d), without a cache.

    The whole model reads them, as a prompt with E more tokens like its last one, which are replaced where embeddings
    leave their table. So whatever the model gives its language model beside embeddings is there too. Where prompts have
    masks of their own, in which some tokens see those after them, the language model reads with these masks continued.

    Args:
        ids: of the vectors, None for those that are no token's, as all are by default.
    """
    heard, inputs = generated(base, question), base.inputs(question)
    beside = _beside(base, ids or [None] * len(extra))
    if (mask := heard.masks[0]) is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        return _with_masks(base, heard, extra, beside)
    told = dict(inputs)
    for name, own in inputs.items():
        if isinstance(own, Tensor) and own.shape == inputs["input_ids"].shape:
            told[name] = torch.cat([own, own[:, -1:].expand(-1, len(extra))], dim=1)
    if heard.positions[0] is not None and heard.positions[1] is not None:
        steps = torch.arange(len(extra), device=extra.device)
        told["position_ids"] = torch.cat([heard.positions[0], heard.positions[1] + steps], dim=-1)
    length = told["input_ids"].shape[1]

    def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.shape[1] != length:
            return output
        return torch.cat([output[:, : length - len(extra)], extra[None].to(output)], dim=1)

    def accompany(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        own = {name: torch.cat([kwargs[name][:, : -len(extra)], rows], dim=1) for name, rows in beside.items()}
        return args, kwargs | own

    handles = [
        base.backbone.embeddings.register_forward_hook(replace),
        base.backbone.decoder.register_forward_pre_hook(accompany, with_kwargs=True),
    ]
    try:
        with listening(base.backbone) as whole:
            base.model(**told, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return whole.hidden[0][0]


def _beside(base: Base, ids: Sequence[int | None]) -> dict[str, Tensor]:
    """What the model itself gives its language model beside the embeddings of such tokens, (1, E, ..); where there is
    none, what it gives with a token of an image."""
    image = base.inputs(("?", [picture(32, 32, 0)]))
    told = torch.tensor([[token or 0 for token in ids]], device=image["input_ids"].device)
    with listening(base.backbone) as heard:
        base.model(input_ids=told)
        if not heard.beside[0]:
            return {}
        base.model(**image)
    place = int((image["input_ids"][0] == base.backbone.placeholders["image"]).nonzero()[0])
    found = {name: own.clone() for name, own in heard.beside[0].items()}
    for name, own in found.items():
        own[0, [at for at, token in enumerate(ids) if token is None]] = heard.beside[1][name][0, place]
    return found


def _with_masks(base: Base, heard: Heard, extra: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    embeds, mask = torch.cat([heard.embeds[0], extra[None]], dim=1), heard.masks[0]
    config: Any = base.backbone.decoder.config
    places = torch.arange(embeds.shape[1], device=embeds.device)
    causal = (places <= places[:, None])[-len(extra) :]

    def continued(own: Tensor | None, kind: str) -> Tensor:
        if own is None:  # nothing but the order of tokens matters
            return (places <= places[:, None])[None, None]
        seen = own if own.dtype == torch.bool else own >= 0  # (1, 1, L, L)
        window = config.sliding_window if "sliding" in kind else len(places)
        rows = causal & (places > places[-len(extra) :, None] - window)
        whole = torch.cat([F.pad(seen[0, 0, :, : seen.shape[2]], (0, len(extra))), rows])[None, None]
        lowest = torch.finfo(embeds.dtype).min
        return (
            whole
            if own.dtype == torch.bool
            else torch.zeros_like(whole, dtype=embeds.dtype).masked_fill(~whole, lowest)
        )

    given = (
        {kind: continued(own, kind) for kind, own in mask.items()} if isinstance(mask, dict) else continued(mask, "")
    )
    positions = {}
    if heard.positions[0] is not None and heard.positions[1] is not None:
        steps = torch.arange(len(extra), device=extra.device)
        positions["position_ids"] = torch.cat([heard.positions[0], heard.positions[1] + steps], dim=-1)
    whole = {name: torch.cat([heard.beside[0][name], rows], dim=1) for name, rows in beside.items()}
    output = base.backbone.decoder(inputs_embeds=embeds, attention_mask=given, use_cache=False, **positions, **whole)
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


@torch.no_grad()
def logits(
    base: Base, memory: Memory, question: Question, answer: Sequence[int], latents: Mapping[int, Tensor]
) -> Tensor:
    """What one pass over prompt, answer and latents says before each of the A answer tokens, (A, V).

    Args:
        latents: (N, d), by the index of the invocation token that they follow.
    """
    pieces, places, length = [], [], 0
    ids: list[int | None] = []
    for index, token in enumerate(answer):
        pieces.append(_embedded(memory, token))
        places.append(length)
        ids.append(token if token < memory.tokens.first else None)
        length += 1
        if index in latents:
            pieces.append(latents[index])
            ids += [None] * len(latents[index])
            length += len(latents[index])
    with memory.off():
        hidden = one_pass(base, question, torch.cat(pieces), ids)
    prompt = len(hidden) - length
    before = [prompt - 1, *(prompt + place for place in places[:-1])]  # latents predict nothing
    return base.backbone.logits(hidden[before])


def _embedded(memory: Memory, token: int) -> Tensor:
    """(1, d), a memory token's vector taken from its row."""
    own = token - memory.tokens.first
    if own >= 0:
        return torch.cat([memory.tokens.invoke, memory.tokens.close])[own : own + 1]
    return memory.backbone.embed(torch.tensor([token], device=memory.backbone.device))
