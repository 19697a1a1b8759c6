"""Vision encoders beside Qwen's, written out: extra tokens next to all patches of one row, under a dense mask."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor


def encode(ground: Any, adapted: Any, inputs: Any, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Patches through ``ground``'s blocks and extra tokens through ``adapted``'s.

    Args:
        ground, adapted: models; the second one's weights are for the extra tokens.
        inputs: one row's prompt.
        extra: (E, D)

    Returns:
        what leaves the last block of the patches (P, D), class tokens included, and the extra tokens as the projector
        gets them.
    """
    with torch.no_grad():
        if hasattr(ground.model, "visual"):
            return rice(ground.model, adapted.model, inputs, extra)
        way = timm if hasattr(ground.model.vision_tower, "timm_model") else tiles
        return way(ground.model, adapted.model, inputs, extra)


def project(model: Any, tokens: Tensor) -> Tensor:
    """The model's own projector over consecutive tokens of an encoder: (N * merge, D) -> (N, d)."""
    if hasattr(model.model, "visual"):
        return model.model.visual.merger(tokens)  # type: ignore[no-any-return]
    if hasattr(model.config, "projector_pooling_ratio"):
        each = model.model.multi_modal_projector.linear_2(
            torch.nn.functional.gelu(model.model.multi_modal_projector.linear_1(tokens))
        )
        return each.unflatten(0, (-1, model.config.projector_pooling_ratio**2)).mean(1)
    if hasattr(model.config, "downsample_ratio"):
        tokens = torch.cat([tokens[place::4] for place in range(4)], dim=-1)
    return model.model.multi_modal_projector(tokens)  # type: ignore[no-any-return]


def features(model: Any, inputs: Any) -> Any:
    """What the bare model makes of a prompt's images, or of its videos if it has no images."""
    way = model.get_image_features if "pixel_values" in inputs else model.get_video_features
    return way(**{name: inputs[name] for name in signature(way).parameters if name in inputs})


def entering(model: Any, inputs: Any) -> Tensor:
    """What the first block gets while the bare model encodes a prompt's images, (tiles, T, D)."""
    seen: list[Tensor] = []
    block = stack(model.vision_tower)[0]
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features(model, inputs)
    handle.remove()
    return seen[0]


def stack(tower: Any) -> Any:
    """The blocks of an encoder that takes tiles."""
    if hasattr(tower, "timm_model"):
        return tower.timm_model.blocks
    return tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer


def tiles(ground: Any, adapted: Any, inputs: Any, extra: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP, SigLIP and InternViT: positions are in what enters, tiles do not see each other."""
    tokens, groups = extra[:0], torch.zeros(0)
    if "pixel_values" in inputs or "pixel_values_videos" in inputs:
        entered = entering(ground, inputs)
        tokens, groups = entered.flatten(0, 1), torch.arange(len(entered)).repeat_interleave(entered.shape[1])
    count, states = len(tokens), [extra]
    for block, other in zip(stack(ground.vision_tower), stack(adapted.vision_tower), strict=True):
        both = torch.cat([tokens, states[-1]])
        intern = hasattr(block, "lambda_1")
        normed = (block.layernorm_before if intern else block.layer_norm1)(both)
        mine, theirs = ((own.attention if intern else own.self_attn) for own in (block, other))
        fused = [
            torch.cat([getattr(mine, name)(normed[:count]), getattr(theirs, name)(normed[count:])])
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        if intern:
            fused[:2] = mine.q_norm(fused[0]), mine.k_norm(fused[1])
        mixed = dense(*(own.unflatten(-1, (mine.num_heads, -1)) for own in fused), groups)
        if intern:
            both = both + block.lambda_1 * mine.projection_layer(mixed)
            both = both + block.lambda_2 * block.mlp(block.layernorm_after(both))
        else:
            both = both + mine.out_proj(mixed)
            both = both + block.mlp(block.layer_norm2(both))
        tokens = both[:count]
        states.append(both[count:])
    layers = ground.config.vision_feature_layer
    leaving = torch.cat([states[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
    if hasattr(ground.vision_tower, "layernorm") and layers == -1:
        leaving = ground.vision_tower.layernorm(leaving)
    return tokens, leaving


def timm(ground: Any, adapted: Any, inputs: Any, extra: Tensor) -> tuple[Tensor, Tensor]:
    """timm's ViT: queries, keys and values from one matrix, normalised head by head, and scaled branches."""
    tokens, groups = extra[:0], torch.zeros(0)
    if "pixel_values" in inputs:
        entered = entering(ground, inputs)
        tokens, groups = entered.flatten(0, 1), torch.arange(len(entered)).repeat_interleave(entered.shape[1])
    count, both = len(tokens), torch.cat([tokens, extra])
    for block, other in zip(stack(ground.vision_tower), stack(adapted.vision_tower), strict=True):
        normed, mine = block.norm1(both), block.attn
        fused = torch.cat([mine.qkv(normed[:count]), other.attn.qkv(normed[count:])])
        queries, keys, values = (own.unflatten(-1, (mine.num_heads, -1)) for own in fused.chunk(3, dim=-1))
        branch = mine.proj(mine.norm(dense(mine.q_norm(queries), mine.k_norm(keys), values, groups)))
        both = both + branch * getattr(block.ls1, "gamma", 1)
        both = both + block.mlp(block.norm2(both)) * getattr(block.ls2, "gamma", 1)
    return both[:count], ground.vision_tower.timm_model.norm(both[count:])


def rice(ground: Any, adapted: Any, inputs: Any, extra: Tensor) -> tuple[Tensor, Tensor]:
    """RICE: a class token in front of every frame, which has an angle of its own; memory tokens turn nowhere."""
    visual = ground.visual
    half = visual.config.hidden_size // visual.config.num_heads // 2
    rates = 10000.0 ** -(torch.arange(0, half, 2) / half)
    grids = inputs["image_grid_thw"].tolist() if "pixel_values" in inputs else []
    patches = iter(visual.patch_embed(inputs["pixel_values"])) if grids else iter(())
    rows, angles, frames = [], [], []
    for depth, height, width in grids:
        for _ in range(depth):
            places: list[tuple[int, int]] = [
                (i + a, j + b) for i in range(0, height, 2) for j in range(0, width, 2) for a in (0, 1) for b in (0, 1)
            ]
            frames += [frames[-1] + 1 if frames else 0] * (1 + len(places))
            rows += [visual.class_embedding, *(next(patches) for _ in places)]
            angles += [visual.class_pos_emb[0], *(torch.cat([y * rates, x * rates]) for y, x in places)]
    tokens = visual.pre_layernorm(torch.stack(rows)) if rows else extra[:0]
    turns = torch.stack([*angles, *(torch.zeros(half) for _ in extra)])
    for block, other in zip(visual.blocks, adapted.visual.blocks, strict=True):
        normed = block.norm1(torch.cat([tokens, extra]))
        fused = torch.cat([block.attn.qkv(normed[: len(tokens)]), other.attn.qkv(normed[len(tokens) :])])
        queries, keys, values = fused.unflatten(-1, (3, block.attn.num_heads, -1)).unbind(1)
        both = torch.cat([tokens, extra])
        both = both + block.attn.proj(dense(turn(queries, turns), turn(keys, turns), values, torch.tensor(frames)))
        both = both + block.mlp(block.norm2(both))
        tokens, extra = both[: len(tokens)], both[len(tokens) :]
    return tokens, extra


def turn(vectors: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of (T, heads, w) by (T, w / 2), as complex numbers."""
    first, second = vectors.chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def dense(queries: Tensor, keys: Tensor, values: Tensor, groups: Tensor) -> Tensor:
    """Attention in which the first tokens see their own group alone, and those beyond ``groups`` see everything.

    Args:
        queries, keys, values: (T, heads, w)
        groups: (P,)

    Returns:
        (T, heads * w)
    """
    count = len(groups)
    mask = torch.ones(len(queries), len(queries), dtype=torch.bool)
    mask[:count, :count] = groups[:, None] == groups
    mask[:count, count:] = False
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), values).flatten(1)
