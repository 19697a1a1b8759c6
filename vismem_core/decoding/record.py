"""What a ``generate`` call with ``return_dict_in_generate`` gives back."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from vismem_core.base import cache as kv

from .room import RoomCache


class Record:
    """What ``return_dict_in_generate`` asked to be kept."""

    def __init__(self, config: GenerationConfig) -> None:
        self.wanted = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if self.wanted and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if self.wanted and config.output_logits else None
        self.attentions: tuple[Any, ...] | None = () if self.wanted and config.output_attentions else None
        self.hidden: tuple[Any, ...] | None = () if self.wanted and config.output_hidden_states else None

    def add(self, output: Any, scores: Tensor, logits: Tensor) -> None:
        """A step: what its pass gave, and scores and raw logits (B, W) from which the next tokens are chosen."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)
        if self.attentions is not None:
            self.attentions += (output.attentions,)
        if self.hidden is not None:
            self.hidden += (output.hidden_states,)

    def result(self, ids: Tensor, cache: RoomCache) -> Tensor | GenerateDecoderOnlyOutput:
        """What ``generate`` returns: ids (B, L) alone, or with all that was kept and the cache, padded on the left."""
        if not self.wanted:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,  # type: ignore[arg-type]
            scores=self.scores,  # type: ignore[arg-type]
            logits=self.logits,  # type: ignore[arg-type]
            attentions=self.attentions,
            hidden_states=self.hidden,
            **{kv.NAME: cache.together(range(len(ids)))[0]},
        )
