"""Where rows stand between two passes of the decoding loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Line:
    """What the loop knows of its rows.

    Attributes:
        ids: (B, L), prompts and what was written, padded on the left.
        running: (B,), False for rows that are done and write padding.
        ended: (B,), whether something stops a row; in the midst of an invocation it does so after its end token.
        fed: the last token that each row wrote, -1 for none.
        alive: the same as ``running``, on the host.
    """

    ids: Tensor
    running: Tensor
    ended: Tensor
    fed: list[int]
    alive: list[bool]

    @classmethod
    def of(cls, ids: Tensor) -> Line:
        """Prompts of which nothing is written."""
        running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        return cls(ids, running, ~running, [-1] * len(ids), [True] * len(ids))

    def take(self, rows: Sequence[int]) -> None:
        """Go on with the given rows alone."""
        index = torch.as_tensor(rows, device=self.ids.device)
        self.ids, self.running, self.ended = self.ids[index], self.running[index], self.ended[index]
        self.fed, self.alive = [self.fed[row] for row in rows], [self.alive[row] for row in rows]

    def seat(self, places: Sequence[int], prompts: Tensor, pad: Tensor | None) -> None:
        """Prompts (R, L) begin in these places; columns in front that are padding everywhere are gone."""
        width, none = max(self.ids.shape[1], prompts.shape[1]), 0 if pad is None else int(pad)
        ids, told = (F.pad(own, (width - own.shape[1], 0), value=none) for own in (self.ids, prompts))
        ids[places] = told
        self.ids = ids[:, int((ids != none).any(0).int().argmax()) :]
        self.running[places], self.ended[places] = True, False
        for place in places:
            self.alive[place] = True
