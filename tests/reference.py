"""Independent computations that the package's results are compared with: plain forward passes, one row at a time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
import towers
from torch import Tensor
from transformers import DynamicCache

from vismem_core import Memory
from vismem_core.base import cache as kv


@dataclass
class Sequence:
    """A row's prompt, answer and latents as one sequence.

    Attributes:
        embeds: (1, L, d)
        positions: (3, 1, L), or (1, L) where they are one-dimensional
        visual: (1, L), where image tokens are.
        places: index of each answer token in the sequence.
        hidden: (1, L, d), last-layer states of one forward pass without a cache.
        logits: (A, V), what that pass says before each of the A answer tokens.
        asks: (A, 2), the same for the two invocation tokens.
    """

    embeds: Tensor
    positions: Tensor
    visual: Tensor
    places: list[int]
    hidden: Tensor
    logits: Tensor
    asks: Tensor


@torch.no_grad()
def one_pass(memory: Memory, inputs: Any, answer: list[int], row: int = 0, hidden: bool = False) -> Sequence:
    """The answer of ``row`` in the last ``generate`` call, read by the base model in one go.

    Args:
        inputs: that row's prompt alone.
        hidden: whether all that follows the first invocation token does not see the images.
    """
    model = memory.model
    embeds = embed(memory, inputs["input_ids"])
    visual = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for medium, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in inputs:
            encode_medium = getattr(model.model, f"get_{medium}_features")
            about = {name: inputs[name] for name in signature(encode_medium).parameters if name in inputs}
            features = encode_medium(**about)
            here = inputs["input_ids"] == getattr(model.config, f"{medium}_token_id")
            tokens = features if isinstance(features, Tensor) else torch.cat(tuple(features.pooler_output))
            embeds = embeds.masked_scatter(here[..., None], tokens)
            visual |= here
    latents = {invocation.position: invocation.latents for invocation in memory.trace.row(row)}
    pieces, places, length = [embeds], [], embeds.shape[1]
    for position, token in enumerate(answer):
        pieces.append(embed(memory, torch.tensor([[token]])))
        places.append(length)
        length += 1
        if position in latents:
            pieces.append(latents[position][None])
            length += len(latents[position])
    embeds = torch.cat(pieces, dim=1)
    positions = prompt_positions(model, inputs)
    further = positions.max() + 1 + torch.arange(length - positions.shape[-1])
    positions = torch.cat([positions, further.expand(*positions.shape[:-1], -1)], dim=-1)
    mask = torch.ones(1, length)
    if hidden and latents:
        allowed = torch.ones(length, length).tril()
        allowed[places[min(latents)] + 1 :, : visual.shape[1]] *= ~visual[0]
        mask = torch.where(allowed.bool(), 0.0, -1e9)[None, None]
    states = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
    ).last_hidden_state
    before = states[0, [inputs["input_ids"].shape[1] - 1, *places[:-1]]]  # latents predict nothing
    asks = before @ memory.tokens.head.T
    return Sequence(embeds, positions, visual, places, states, F.linear(before, model.lm_head.weight), asks)


def prompt_positions(model: Any, inputs: Any) -> Tensor:
    """Positions of a single prompt: (3, 1, L) for M-RoPE, (1, L) for models that count through."""
    if not hasattr(model.model, "get_rope_index"):
        return torch.arange(inputs["input_ids"].shape[1])[None]
    if not any(f"{medium}_grid_thw" in inputs for medium in ("image", "video")):
        return torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    grids = {name: inputs[name] for name in inputs if "grid" in name or name == "mm_token_type_ids"}
    positions: Tensor = model.model.get_rope_index(inputs["input_ids"], **grids)[0]
    return positions


def embed(memory: Memory, ids: Tensor) -> Tensor:
    """Input vectors (1, L, d) without the hook: the base's table, and below it the four tokens' rows."""
    table = memory.model.get_input_embeddings().weight
    filler = table.new_zeros(memory.tokens.first - len(table), table.shape[1])
    return torch.cat([table, filler, memory.tokens.invoke, memory.tokens.close]).detach()[ids]


def query(memory: Memory, sequence: Sequence, begin: int, end: int) -> Tensor:
    """Q from H = [visual tokens, the hidden states that chose the sequence's places begin .. end]."""
    seen = sequence.embeds[:, : sequence.visual.shape[1]][sequence.visual][None]
    states = torch.cat([seen, sequence.hidden[:, begin - 1 : end]], dim=1)
    out: Tensor = memory.builder(states, torch.ones(states.shape[:2], dtype=torch.bool))
    return out


def merged(pristine: Any, memory: Memory, kind: str) -> Any:
    """A copy of the base model with F_s's or F_l's LoRA added into its weights."""
    model = copy.deepcopy(pristine)
    settings = getattr(memory.config, kind)
    matrices = memory.former(kind).adapter_parameters()  # type: ignore[arg-type]
    with torch.no_grad():
        for name in {name.rpartition(".")[0] for name in matrices}:
            update = matrices[f"{name}.lora_B"] @ matrices[f"{name}.lora_A"]
            model.get_submodule(name).weight += settings.alpha / settings.rank * update
    return model


@torch.no_grad()
def long_latents(pristine: Any, memory: Memory, sequence: Sequence, asked: Tensor, end: int, context: str) -> Tensor:
    """F_l by its definition: [X, Q, M_init] through the language model, X being the sequence up to ``end``."""
    former: Any = memory.long
    extra = torch.cat([asked * former.enter, former.initial[None]], dim=1)
    positions = sequence.positions[..., end : end + 1] + 1 + torch.arange(extra.shape[1])
    before, places = sequence.embeds[:, : end + 1], sequence.positions[..., : end + 1]
    adapted = merged(pristine, memory, "long").model.language_model
    cache = DynamicCache()
    first = pristine.model.language_model if context == "cache" else adapted
    first(inputs_embeds=before, position_ids=places, **kv.given(first, cache), use_cache=True)
    hidden = adapted(inputs_embeds=extra, position_ids=positions, **kv.given(adapted, cache)).last_hidden_state
    tail = hidden[0, -len(former.initial) :]
    tail = tail / tail.pow(2).mean(-1, keepdim=True).add(torch.finfo(tail.dtype).eps).sqrt()
    return tail @ former.leave.weight.T * former.gain


@torch.no_grad()
def short_latents(pristine: Any, memory: Memory, inputs: Any, asked: Tensor, context: str) -> Tensor:
    """F_s by its definition: extra tokens beside all patches of the row, with a dense attention mask."""
    former: Any = memory.short
    asked = former.enter(asked)
    extra = torch.cat([asked, former.initial + asked.mean(1, keepdim=True)], dim=1)[0]
    changed = merged(pristine, memory, "short")
    if memory.backbone.name != "qwen2_5_vl":
        extra = towers.encode(pristine if context == "cache" else changed, changed, inputs, extra)[1]
        return towers.project(pristine, extra[-len(former.initial) :]) @ former.leave.weight.T * former.gain
    adapted = changed.model.visual
    ground = pristine.model.visual if context == "cache" else adapted
    pixels = [inputs[name] for name in ("pixel_values", "pixel_values_videos") if name in inputs]
    grids = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
    patches = ground.patch_embed(torch.cat(pixels)) if pixels else extra[:0]
    extra = encode(ground, adapted, patches, torch.cat(grids).tolist() if grids else [], extra)[1]
    tokens: Tensor = pristine.model.visual.merger(extra[-len(former.initial) :])
    return tokens @ former.leave.weight.T * former.gain


def encode(ground: Any, adapted: Any, patches: Tensor, grids: list[list[int]], extra: Tensor) -> tuple[Tensor, Tensor]:
    """Patches through ``ground``'s blocks and extra tokens through ``adapted``'s, in one dense attention.

    Patches look at their window (or their frame, in full blocks); extra tokens look at everything and turn nowhere.
    """
    windows, frames, angles = layout(ground, grids)
    count, free = len(patches), len(extra)
    angles = torch.cat([angles, angles.new_zeros(free, angles.shape[1])])
    for index, (block, other) in enumerate(zip(ground.blocks, adapted.blocks, strict=True)):
        groups = frames if index in ground.fullatt_block_indexes else windows
        mask = torch.ones(count + free, count + free, dtype=torch.bool)
        mask[:count, :count] = groups[:, None] == groups
        mask[:count, count:] = False
        fused = torch.cat([block.attn.qkv(block.norm1(patches)), other.attn.qkv(other.norm1(extra))])
        queries, keys, values = fused.unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
        queries, keys = turn(queries, angles), turn(keys, angles)
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        mixed = block.attn.proj(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
        both = torch.cat([patches, extra]) + mixed
        both = both + block.mlp(block.norm2(both))
        patches, extra = both[:count], both[count:]
    return patches, extra


def layout(visual: Any, grids: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Window, frame and rotation angles of every patch, from its coordinates alone."""
    merge, size = visual.spatial_merge_size, visual.window_size // visual.patch_size
    half = visual.config.hidden_size // visual.config.num_heads // 2
    rates = 10000.0 ** -(torch.arange(0, half, 2) / half)
    windows, frames, angles = [], [], []
    for image, (depth, height, width) in enumerate(grids):
        for t in range(depth):
            for i in range(0, height, merge):  # patches come in merge x merge blocks
                for j in range(0, width, merge):
                    for y, x in ((i + a, j + b) for a in range(merge) for b in range(merge)):
                        windows.append((((image * 1000 + t) * 1000) + y // size) * 1000 + x // size)
                        frames.append(image * 1000 + t)
                        angles.append(torch.cat([y * rates, x * rates]))
    shape = torch.stack(angles) if angles else torch.zeros(0, half)
    return torch.tensor(windows), torch.tensor(frames), shape


def turn(vectors: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of (T, heads, w) by (T, w / 2)."""
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def plain_block(block: Any, tokens: Tensor, context: Tensor) -> Tensor:
    """One block over a single row without padding, head by head."""
    queries = block.query(block.norm(tokens))
    keys, values = block.key_value(block.norm(context)).chunk(2, dim=-1)
    width = queries.shape[-1] // block.heads
    mixed = []
    for head in range(block.heads):
        own = slice(head * width, (head + 1) * width)
        weights = (queries[:, own] @ keys[:, own].T / width**0.5).softmax(-1)
        mixed.append(weights @ values[:, own])
    tokens = tokens + block.out(torch.cat(mixed, dim=-1))
    out: Tensor = tokens + block.mlp(block.norm_mlp(tokens))
    return out
