"""Latents that stand at the positions of their row's image tokens (``memory.places=image``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ImagePlaces:
    """Position ids (.., n) of each row's visual tokens; without any, latents stand behind the text."""

    def __init__(self, own: Sequence[Tensor] = ()) -> None:
        self._own = own

    def take(self, rows: Sequence[int]) -> ImagePlaces:
        """Those of the given rows."""
        return ImagePlaces([self._own[row] for row in rows] if self._own else ())

    def seat(self, rows: Sequence[int], other: ImagePlaces) -> ImagePlaces:
        """With another's in the places of these rows."""
        told = dict(zip(rows, other._own, strict=False))  # there are none where latents stand behind the text
        return ImagePlaces([told.get(row, own) for row, own in enumerate(self._own)])

    def standing(self, rows: Sequence[int], count: int, following: Tensor) -> Tensor | None:
        """Position ids (.., R, N) of latents that stand where their rows' images stood; None where none do.

        Args:
            following: (.., R, 1), from where on those of rows without an image stand, as all do otherwise.
        """
        if not any(own.shape[-1] for own in self._own):
            return None
        steps = torch.arange(count, device=following.device)
        behind = following + steps
        found = []
        for at, row in enumerate(rows):
            own = self._own[row].to(behind.device)
            seen = own.shape[-1]
            found.append(own[..., steps * seen // count] if seen else behind[..., at, :])
        return torch.stack(found, dim=-2)

    def passed(self, rows: Sequence[int], count: int) -> list[int]:
        """How far the text's positions go on where rows take in so many latents."""
        there = [bool(self._own) and bool(self._own[row].shape[-1]) for row in rows]
        return [0 if own else count for own in there]
