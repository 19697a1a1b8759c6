"""The interface of memory formers: a query and a context become latent vectors (Eq. 6)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from vismem_core.base.backbone import Backbone
from vismem_core.base.vision import VisionStates
from vismem_core.config import FormerConfig, Kind


@dataclass(frozen=True)
class Needs:
    """What a former asks a session to keep: the vision encoder's keys and values, its inputs, all embeddings."""

    vision_cache: bool = False
    vision_inputs: bool = False
    history: bool = False
    image_places: bool = False
    """Latents stand where the row's images stood (``memory.places``)."""

    @staticmethod
    def union(needs: Iterable[Needs]) -> Needs:
        """All of what several formers need."""
        flags = [astuple(own) for own in needs]
        return Needs(*(any(column) for column in zip(*flags, strict=True)))


@dataclass(frozen=True)
class History:
    """All that R rows fed to the language model, right-aligned: for ``context="recompute"``.

    Attributes:
        embeds: (R, W, d)
        mask: (R, W)
        positions: (.., R, W)
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[Tensor, Tensor]]], like: Tensor) -> History:
        """From the pieces (L, d) and (.., L) that each row fed one after the other.

        Args:
            like: a mask of the kind and on the device that this one's is to be.
        """
        embeds = [torch.cat([piece[0] for piece in own]) for own in rows]
        places = [torch.cat([piece[1] for piece in own], dim=-1) for own in rows]
        width = max(map(len, embeds))
        history = torch.stack([F.pad(own, (0, 0, width - len(own), 0)) for own in embeds])
        positions = [F.pad(own, (width - own.shape[-1], 0)) for own in places]
        lengths = like.new_tensor([len(own) for own in embeds])
        mask = like.new_ones(history.shape[:2]).cumsum(-1) > width - lengths[:, None]
        return cls(history, mask.to(like), torch.stack(positions, dim=-2))


@dataclass
class MemoryContext:
    """What memory may look at when R rows invoke the same kind at the same time.

    Attributes:
        states, mask: H (R, y + z, d) in fp32 and its mask (R, y + z); see :class:`~vismem_core.QueryBuilder`.
        visual: y, how many of the states are visual tokens (they come first).
        query: Q (R, K, d) in fp32.
        cache: the language model's cache of these rows, up to the invocation token. Appending to it is allowed: it
            is a fork. While decoding it is empty for formers that are early.
        attention_mask: (R, W) over the cache.
        next_position: (.., R, 1), the position id of the next token.
        vision: the vision encoder's states of the whole batch.
        rows: the R rows' numbers in the batch, for ``vision``.
        history: where the former needs it; of all memory may look at, images included that the cache has no more.
        standing: (.., R, N), the position ids that the latents will have, where these are not the next ones.
    """

    states: Tensor
    mask: Tensor
    visual: int
    query: Tensor
    cache: DynamicCache
    attention_mask: Tensor
    next_position: Tensor
    vision: VisionStates
    rows: Sequence[int]
    history: History | None = None
    standing: Tensor | None = None


class MemoryFormer(nn.Module, ABC):
    """F_s or F_l: forms the N latent vectors of one kind.

    Args:
        kind: which memory this one forms.
        backbone: the model it is attached to. A former may put adapters on it and must take them off in
            :meth:`detach`; it must not keep the model as a submodule.
        config: its settings.
    """

    def __init__(self, kind: Kind, backbone: Backbone, config: FormerConfig) -> None:
        super().__init__()
        self.kind, self.config = kind, config

    @property
    def needs(self) -> Needs:
        """What :meth:`forward` reads beyond the states, the query and the cache."""
        return Needs()

    @abstractmethod
    def forward(self, context: MemoryContext) -> Tensor:
        """(R, N, d), in the precision of the language model's embeddings."""

    @property
    def early(self) -> bool:
        """Whether it reads neither cache nor history, and so need not wait for the invocation token's pass."""
        return False

    @property
    def rides(self) -> bool:
        """Whether it is a :class:`RidingFormer` whose settings let it ride."""
        return False

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Trained tensors that live inside the base model, by name."""
        return {}

    def detach(self) -> None:
        """Leave the base model as it was."""


class RidingFormer(MemoryFormer):
    """A former that is one pass of the language model over a few tokens.

    These can ride in the pass that feeds the invocation token, behind it (:mod:`vismem_core.decoding.packing`);
    ``forward`` is the same thing as a pass of its own.
    """

    @property
    @abstractmethod
    def rides(self) -> bool: ...

    @abstractmethod
    def rider(self, query: Tensor) -> Tensor:
        """Q (R, K, d) -> the tokens (R, E, d) that enter the language model behind the invocation token."""

    @abstractmethod
    def read(self, hidden: Tensor) -> Tensor:
        """The riders' last states (R, E, d) -> the latents (R, N, d)."""

    @abstractmethod
    def on(self, tokens: slice | Tensor) -> AbstractContextManager[None]:
        """The former's adapters for those tokens alone, inside the context (:meth:`vismem_core.base.Adapter.on`).

        Args:
            tokens: of a packed sequence (1, M, d), or of rows (B, T, d) as a mask (B, T).
        """
