"""Gemma 3, 3n and 4: windows in most layers, images that see themselves both ways, tables of their own for layers.

The small models of Gemma 4 and Gemma 3n look each token up once more, for an input of each layer ("per-layer inputs").
Images have none: the models take the row of padding in their places, and so it is for latents and memory tokens. Their
last layers read keys and values of earlier ones and keep none.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .generic import Generic

RECOMPUTE = "memory.long.context=recompute"
LORA = "memory.short.name=lora"


class Gemma3(Generic):
    """Checkpoints of 4B to 27B in their transformers format, and ShieldGemma 2, which is made of them."""

    name = "gemma3"
    model_types: ClassVar[tuple[str, ...]] = ("gemma3", "shieldgemma2")
    packs = True

    @classmethod
    def outlook(cls, config: Any) -> tuple[bool | None, str, dict[str, str]]:
        return True, "its family has an adapter of its own", {RECOMPUTE: "its prompts carry more than embeddings"}


class PaliGemma(Gemma3):
    """PaliGemma, whose questions are seen both ways too, and PaliGemma 2."""

    name = "paligemma"
    model_types = ("paligemma",)


class Gemma4(Gemma3):
    """Checkpoints of Gemma 4 in their transformers format, dense, of experts, and with per-layer inputs."""

    name = "gemma4"
    model_types: ClassVar[tuple[str, ...]] = ("gemma4", "gemma4_unified")

    @classmethod
    def outlook(cls, config: Any) -> tuple[bool | None, str, dict[str, str]]:
        attaches, why, without = super().outlook(config)
        blind = {LORA: "extra tokens have no way through its vision encoder"}
        return attaches, why, without | ({} if config.model_type == "gemma4" else blind)

    @property
    def further_tables(self) -> dict[nn.Module, int]:
        table = getattr(self.decoder, "embed_tokens_per_layer", None)
        return {} if table is None else {table: self._nothing}

    @property
    def _nothing(self) -> int:
        """The id whose rows the model takes where an image stands."""
        return int(self._text_config.pad_token_id)

    def companions(self, ids: Tensor) -> dict[str, Tensor]:
        table: Any = next(iter(self.further_tables), None)
        if table is None:
            return {}
        known = (ids >= 0) & (ids < min(len(table.weight), len(self.embeddings.weight)))  # memory's are beyond
        known &= ~torch.isin(ids, ids.new_tensor(self.media))
        config = self._text_config
        rows = table(ids.where(known, self._nothing).to(table.weight.device))
        rows = rows.unflatten(-1, (config.num_hidden_layers, config.hidden_size_per_layer_input))
        return {"per_layer_inputs": rows}


class Gemma3n(Gemma4):
    """Gemma 3n, whose encoder is a MobileNet: short memory is formed of what it gave the language model."""

    name = "gemma3n"
    model_types = ("gemma3n",)
    undivided = "its MLPs keep what stands out of all their columns, of which a process would see its own alone"

    @property
    def _nothing(self) -> int:
        return 0

    @property
    def _media_words(self) -> list[Any]:
        """What embeds words of the encoders' own, such as the end of an image; their ids follow the text's."""
        return [self.model.model.embed_vision, self.model.model.embed_audio]

    @property
    def embedders(self) -> dict[nn.Module, int]:
        last = self._media_words[-1]  # it is asked for whatever is beyond the others
        return super().embedders | {last: last.vocab_offset}

    def embed(self, ids: Tensor) -> Tensor:
        embeds = super().embed(ids)
        for own in self._media_words:
            mine = (ids >= own.vocab_offset) & (ids < own.vocab_offset + own.vocab_size)
            embeds = embeds.where(~mine[..., None], own(input_ids=ids.where(mine, own.vocab_offset)))
        return embeds
