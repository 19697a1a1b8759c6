"""A model of LLaVA-OneVision-1.5's structure, whose own code comes with its checkpoints: RICE and Qwen3."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

WIDTH, HEADS, MERGE = 32, 4, 2


class RiceConfig(PretrainedConfig):
    model_type = "rice_vit"

    def __init__(self, patch: int = 48, depth: int = 2, **rest: Any) -> None:
        super().__init__(**rest)
        self.patch, self.depth, self.hidden_size, self.num_heads = patch, depth, WIDTH, HEADS


class RiceVLConfig(PretrainedConfig):
    model_type = "llavaonevision1_5"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": Qwen3Config, "vision_config": RiceConfig}

    def __init__(self, text_config: Any = None, vision_config: Any = None, image_token_id: int = 0, **rest: Any):
        self.text_config = text_config if isinstance(text_config, Qwen3Config) else Qwen3Config(**(text_config or {}))
        self.vision_config = RiceConfig(**(vision_config or {}))
        self.image_token_id = self.video_token_id = image_token_id
        self.video_token_id = rest.pop("video_token_id", 0)
        super().__init__(**rest)


class RiceAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (own[:, None] for own in position_embeddings)
        queries, keys, values = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        queries, keys = (own * cos + rotate(own) * sin for own in (queries, keys))
        out = [
            nn.functional.scaled_dot_product_attention(*(own[a:b].transpose(0, 1) for own in (queries, keys, values)))
            for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        ]
        return self.proj(torch.cat(out, dim=1).transpose(0, 1).flatten(1))  # type: ignore[no-any-return]


def rotate(vectors: Tensor) -> Tensor:
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class RiceBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = RiceAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, hidden_states: Tensor, **where: Any) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), **where)
        return hidden_states + self.mlp(self.norm2(hidden_states))  # type: ignore[no-any-return]


class RiceMerger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        wide = WIDTH * MERGE**2
        self.ln_q = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, WIDTH * MERGE**2))  # type: ignore[no-any-return]


class Rice(nn.Module):
    """Packed patches, a class token in front of each frame's, all frames apart; gives merged tokens as one tensor."""

    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.config, self.spatial_merge_size = config, MERGE
        self.patch_embed = nn.Linear(config.patch, WIDTH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.class_pos_emb = nn.Parameter(torch.randn(1, WIDTH // HEADS // 2))
        self.pre_layernorm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(RiceBlock() for _ in range(config.depth))
        self.merger = RiceMerger()

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        sizes = [size for depth, height, width in grid_thw.tolist() for size in [height * width] * depth]
        angles = torch.cat([self.angles(height, width).repeat(depth, 1) for depth, height, width in grid_thw.tolist()])
        angles = angles.to(hidden_states.device)
        pieces = self.patch_embed(hidden_states).split(sizes)
        hidden_states = torch.cat([torch.cat([self.class_embedding[None], own]) for own in pieces])
        angles = torch.cat([torch.cat([self.class_pos_emb, own]) for own in angles.split(sizes)])
        hidden_states, angles = self.pre_layernorm(hidden_states), torch.cat([angles, angles], dim=-1)
        ends = torch.tensor([0, *(1 + size for size in sizes)]).cumsum(0)
        for block in self.blocks:
            hidden_states = block(hidden_states, cu_seqlens=ends, position_embeddings=(angles.cos(), angles.sin()))
        kept = [own[1:] for own in hidden_states.split([1 + size for size in sizes])]
        return self.merger(torch.cat(kept))  # type: ignore[no-any-return]

    def angles(self, height: int, width: int) -> Tensor:
        half = WIDTH // HEADS // 2
        rates = 1.0 / 10000.0 ** (torch.arange(0, half, 2) / half)
        places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
        squares = places.unflatten(1, (-1, MERGE)).unflatten(0, (-1, MERGE)).transpose(1, 2).reshape(-1, 2)
        return (squares[..., None] * rates).flatten(1)


class RiceModel(nn.Module):
    def __init__(self, config: RiceVLConfig) -> None:
        super().__init__()
        self.config = config
        self.visual, self.language_model = Rice(config.vision_config), Qwen3Model(config.text_config)

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        return self.visual(pixel_values, grid_thw=image_grid_thw)  # type: ignore[no-any-return]


class RiceForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = RiceVLConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _supports_sdpa = True

    def __init__(self, config: RiceVLConfig) -> None:
        super().__init__(config)
        self.model = RiceModel(config)
        self.lm_head = nn.Linear(WIDTH, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.model.language_model.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: Any = 0,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        rest.pop("return_dict", None)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None and image_grid_thw is not None:
                image = (input_ids == self.config.image_token_id)[..., None]
                inputs_embeds = inputs_embeds.masked_scatter(
                    image, self.model.get_image_features(pixel_values, image_grid_thw)
                )
        out = self.model.language_model(inputs_embeds=inputs_embeds, position_ids=position_ids, **rest)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(out.last_hidden_state[:, kept]),
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


AutoConfig.register(RiceVLConfig.model_type, RiceVLConfig)
AutoModelForCausalLM.register(RiceVLConfig, RiceForConditionalGeneration)
