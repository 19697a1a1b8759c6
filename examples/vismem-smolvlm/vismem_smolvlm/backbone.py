"""SmolVLM and Idefics3: SigLIP over tiles, pixel shuffle, and a Llama."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vismem_core import Backbone
from vismem_core.base.vision import VisionStates, attend


class SmolVLM(Backbone):
    """Checkpoints in their transformers format, several images, each in tiles.

    A memory token attends to all patches of all tiles of its row's images. As many of them as the connector puts into
    one language token are one square of patches.
    """

    name = "smolvlm"
    model_types = ("idefics3", "smolvlm")
    packs = True  # a Llama's attention is plain sdpa
    lora_targets = {
        "short": r"model\.vision_model\.encoder\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
        "long": r"model\.text_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)",
    }

    @classmethod
    def matches(cls, model: Any) -> bool:
        return super().matches(model) and model.config.text_config.model_type == "llama"

    @property
    def tower(self) -> Any:
        """The vision encoder."""
        return self.model.model.vision_model

    @property
    def vision_width(self) -> int:
        return int(self.tower.config.hidden_size)

    @property
    def merge(self) -> int:
        return int(self.model.config.scale_factor) ** 2

    @property
    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.image_token_id}

    @property
    def vision_device(self) -> torch.device:
        return self.tower.post_layernorm.weight.device  # type: ignore[no-any-return]

    @property
    def vision_dtype(self) -> torch.dtype:
        return self.tower.post_layernorm.weight.dtype  # type: ignore[no-any-return]

    @contextmanager
    def record(self, states: VisionStates, *, keep: bool, inputs: bool) -> Iterator[None]:
        seen: list[Tensor] = []  # (tiles, patches) of the call that runs: False at padding
        fused: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            grid = kwargs["patch_attention_mask"].flatten(1)
            seen[:] = [grid]
            states.patches += grid.sum(-1).tolist()
            states.tokens += [grid.shape[1] // self.merge] * len(grid)
            if inputs:
                states.inputs.append({name: kwargs[name] for name in ("pixel_values", "patch_attention_mask")})

        with ExitStack() as stack:
            stack.callback(self.tower.register_forward_pre_hook(enter, with_kwargs=True).remove)
            for index, block in enumerate(self.tower.encoder.layers if keep else []):

                def keys(module: nn.Module, args: Any, output: Tensor) -> None:
                    fused.append(output)

                def values(module: nn.Module, args: Any, output: Tensor, index: int = index) -> None:
                    states.extend(index, *(self._heads(own)[seen[0]] for own in (fused.pop(), output)))

                stack.callback(block.self_attn.k_proj.register_forward_hook(keys).remove)
                stack.callback(block.self_attn.v_proj.register_forward_hook(values).remove)
            yield

    def _heads(self, fused: Tensor) -> Tensor:
        return fused.unflatten(-1, (self.tower.config.num_attention_heads, -1))  # type: ignore[no-any-return]

    def encode(self, inputs: dict[str, Tensor]) -> None:
        self.tower(**inputs)

    def carry(self, extra: Tensor, states: VisionStates, rows: Sequence[int]) -> Tensor:
        where = states.gather(rows)
        for index, block in enumerate(self.tower.encoder.layers):
            normed, own = block.layer_norm1(extra), block.self_attn
            fused = (part(normed) for part in (own.q_proj, own.k_proj, own.v_proj))
            queries, keys, values = (self._heads(part).transpose(1, 2) for part in fused)
            mixed = attend(queries, keys, values, states, index, where)
            extra = extra + own.out_proj(mixed)
            extra = extra + block.mlp(block.layer_norm2(extra))
        return self.tower.post_layernorm(extra)  # type: ignore[no-any-return]

    def project(self, tokens: Tensor) -> Tensor:
        squares = tokens.unflatten(1, (-1, self.merge)).flatten(0, 1)
        vectors = self.model.model.connector(squares)  # (R * N, 1, d)
        return vectors.view(len(tokens), -1, vectors.shape[-1])  # type: ignore[no-any-return]
