"""Logits processors where there are four columns more: whose see them, and whose do not.

Processors of transformers take any width. Those of users are made for the base's vocabulary: they get the base's
columns and the ids of the text, without memory tokens, and memory's columns pass them by.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PrefixConstrainedLogitsProcessor

from vismem_core.errors import AttachError
from vismem_core.memory.tokens import MemoryTokens

STATEFUL = ("xgrammar",)
"""Packages whose processors take in the last token whenever they are called, and so must be called once for each."""


class Processors:
    """The processors of one call.

    Args:
        processors: as ``generate`` made the list: the warpers of sampling come last.

    Attributes:
        forbidden: how often processors left a row no invocation token of those it was offered.

    Raises:
        AttachError: one of them keeps a state for every row, and there are several rows.
    """

    def __init__(self, processors: LogitsProcessorList, tokens: MemoryTokens, rows: int) -> None:
        self.tokens = tokens
        warps = [type(own).__name__.endswith("Warper") and not _users(own) for own in processors]
        self.rules = [own for own, warp in zip(processors, warps, strict=True) if not warp]
        self.warpers = [own for own, warp in zip(processors, warps, strict=True) if warp]
        self.forbidden: Tensor | int = 0
        self._kept: dict[int, tuple[int, Tensor]] = {}
        odd = next((own for own in self.rules if _stateful(own)), None)
        if odd is not None and rows > 1:
            raise AttachError(
                f"memory works with {type(odd).__module__.partition('.')[0]} one row at a time: call generate for "
                "each, or use memory.off() for this call"
            )

    def __call__(self, input_ids: Tensor, logits: Tensor, base: int) -> Tensor:
        """Process logits (B, W), of which the first ``base`` columns are the base's."""
        offered = logits[:, self.tokens.first :].isfinite().any(1) if self.rules else None
        scores, text = logits, None
        for number, own in enumerate(self.rules):
            if not _users(own):
                scores = own(input_ids, scores)
                continue
            text = self._text(input_ids) if text is None else text
            ids = input_ids if isinstance(own, PrefixConstrainedLogitsProcessor) else text
            ours, theirs = scores[:, base:], scores[:, :base].contiguous()  # some write in place
            theirs = self._once(number, own, ids, theirs) if _stateful(own) else own(ids, theirs)
            scores = torch.cat([theirs, ours.to(theirs)], dim=1)
        if offered is not None:
            left = scores[:, self.tokens.first :].isfinite().any(1)
            self.forbidden = self.forbidden + (offered & ~left).sum()
        for own in self.warpers:
            scores = own(input_ids, scores)
        return scores

    def _text(self, ids: Tensor) -> Tensor:
        """The ids without memory tokens; a row that has more of them than another begins with its first id again."""
        mine = self.tokens.contains(ids)
        counts = mine.sum(1, keepdim=True)
        if not counts.any():
            return ids
        moved = ids.gather(1, mine.int().argsort(dim=1, descending=True, stable=True))
        filler = torch.arange(ids.shape[1], device=ids.device) < counts
        return torch.where(filler, moved.gather(1, counts), moved)[:, int(counts.min()) :]

    def _once(self, number: int, own: Any, ids: Tensor, scores: Tensor) -> Tensor:
        """What a processor with a state forbids, which is asked only when there is new text."""
        length, banned = self._kept.get(number, (-1, scores))
        if length == ids.shape[1]:
            return scores.masked_fill(banned, float("-inf"))
        scores = own(ids, scores)
        self._kept[number] = (ids.shape[1], scores == float("-inf"))
        return scores


def of_text(allowed: Any, tokens: MemoryTokens) -> Any:
    """``prefix_allowed_tokens_fn`` that is asked about the text alone, and allows text alone."""
    return lambda row, ids: [own for own in allowed(row, ids[~tokens.contains(ids)]) if own < tokens.first]


def _users(own: Any) -> bool:
    return isinstance(own, PrefixConstrainedLogitsProcessor) or not type(own).__module__.startswith("transformers.")


def _stateful(own: Any) -> bool:
    return type(own).__module__.partition(".")[0] in STATEFUL
