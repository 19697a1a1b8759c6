"""What the vision encoder computed for a batch, kept so that memory can look at the images again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismem_core.errors import AttachError

UNCLEAR = (
    "cannot tell which images belong to which prompt: their language tokens do not add up to the prompts' placeholders"
)


@dataclass
class VisionStates:
    """Keys and values of every encoder block over all patches of a batch, packed image after image.

    A backbone fills one while its encoder runs (``Backbone.record``) and reads it in ``Backbone.carry``. An image
    that the encoder takes in tiles may be several images here: either each with its own language tokens, or the last
    one with those of all and the others with none.
    """

    keys: list[Tensor] = field(default_factory=list)
    """Per block (P, heads, head width), positions already applied."""
    values: list[Tensor] = field(default_factory=list)
    """Per block (P, heads, head width)."""
    patches: list[int] = field(default_factory=list)
    """Patches of each image, in packed order; they add up to P."""
    tokens: list[int] = field(default_factory=list)
    """Language tokens of each image, in packed order."""
    inputs: list[dict[str, Tensor]] = field(default_factory=list)
    """Arguments of the encoder's calls, kept for ``context="recompute"``."""
    rows: list[list[int]] = field(default_factory=list)
    """Which images belong to each row of the batch; see :meth:`assign`."""

    def extend(self, block: int, keys: Tensor, values: Tensor) -> None:
        """Add one encoder call's keys and values of one block, each (P', heads, head width)."""
        if block == len(self.keys):
            self.keys.append(keys)
            self.values.append(values)
        else:
            self.keys[block] = torch.cat([self.keys[block], keys])
            self.values[block] = torch.cat([self.values[block], values])

    def assign(self, counts: Sequence[Sequence[int]]) -> None:
        """Deal the images out to rows.

        Args:
            counts: for each medium in the order the encoder is called (images, then videos), how many of its
                placeholder tokens every row holds. Rows that ``generate`` made as copies of one prompt
                (``num_return_sequences``) share its images.

        Raises:
            AttachError: if the images' tokens are no such placeholders.
        """
        self.rows = [[] for _ in counts[0]]
        if not self.tokens:  # text only, or nothing was recorded
            return
        copies, odd = divmod(sum(map(sum, counts)), sum(self.tokens))
        if odd or not copies:
            raise AttachError(UNCLEAR)
        queue = iter(range(len(self.tokens)))
        for row_tokens in counts:
            for first in range(0, len(row_tokens), copies):
                need, mine = row_tokens[first], []
                while need > 0 and (image := next(queue, None)) is not None:
                    mine.append(image)
                    need -= self.tokens[image]
                if need:
                    raise AttachError(UNCLEAR)
                for row in range(first, first + copies):
                    self.rows[row] += mine

    @classmethod
    def together(cls, rows: Sequence[tuple[VisionStates, int]]) -> tuple[VisionStates, list[int]]:
        """Rows of several batches in one: its states, and the rows' numbers there.

        Args:
            rows: each with its number in its own batch.
        """
        batches = list({id(own): own for own, _ in rows}.values())
        if len(batches) == 1:
            return batches[0], [row for _, row in rows]
        found, first = cls(), dict[int, int]()
        for own in batches:
            first[id(own)] = len(found.patches)
            for name in ("patches", "tokens", "inputs"):
                getattr(found, name).extend(getattr(own, name))
        for name in ("keys", "values"):  # those without an image have none
            blocks = zip(*filter(None, (getattr(own, name) for own in batches)), strict=True)
            setattr(found, name, [torch.cat(own) for own in blocks])
        found.rows = [[image + first[id(own)] for image in own.rows[row]] for own, row in rows]
        return found, list(range(len(rows)))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gather(self, rows: Sequence[int]) -> PatchIndex:
        """Index of the patches of each of ``rows``, padded to the longest, on the device of the first block."""
        device = self.keys[0].device if self.keys else None
        starts = [0]
        for count in self.patches:
            starts.append(starts[-1] + count)
        images = self.rows[rows[0]] if len(rows) == 1 else []
        if images and images == list(range(images[0], images[-1] + 1)):
            first, stop = starts[images[0]], starts[images[-1] + 1]
            return PatchIndex(torch.arange(first, stop, device=device)[None], None, first, stop - first)
        lists = [[p for image in self.rows[row] for p in range(starts[image], starts[image + 1])] for row in rows]
        longest = max(map(len, lists), default=0)
        index = torch.tensor([row + [0] * (longest - len(row)) for row in lists], dtype=torch.long, device=device)
        ragged = any(len(row) != longest for row in lists)
        mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in lists], device=device)
        return PatchIndex(index, mask if ragged else None)


@dataclass(frozen=True)
class PatchIndex:
    """Patches of some rows: ``index`` (R, P) into the packed patches, ``mask`` (R, P) or None if none is padding.

    ``first`` and ``count`` say the same of a single row whose images stand side by side, as they do: nothing need be
    copied for it.
    """

    index: Tensor
    mask: Tensor | None
    first: int = 0
    count: int = 0

    def of(self, kept: Tensor) -> Tensor:
        """The rows' part (R, heads, P, head width) of what is kept of all patches."""
        own = kept[None].narrow(1, self.first, self.count) if self.count else kept[self.index.to(kept.device)]
        return own.transpose(1, 2)


def beside(extra: Tensor, block: nn.Module) -> Tensor:
    """Extra tokens on the device of the block that they enter next, where an encoder's blocks are spread."""
    return extra.to(next(block.parameters()).device)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, states: VisionStates, block: int, where: PatchIndex
) -> Tensor:
    """Extra tokens attend to their row's patches in one block, and to each other; patches see none of it.

    Args:
        queries, keys, values: of the extra tokens, each (R, heads, E, head width).

    Returns:
        (R, E, heads * head width)
    """
    mask = None
    if states.keys:
        seen_keys, seen_values = (where.of(kept.to(queries)) for kept in (states.keys[block], states.values[block]))
        if where.count and queries.dtype == torch.float32 and not torch.is_grad_enabled():
            return _beside(queries, keys, values, seen_keys, seen_values)
        if where.mask is not None:
            extras = where.mask.new_ones(len(where.mask), queries.shape[2])
            mask = torch.cat([where.mask, extras], dim=1)[:, None, None, :].to(queries.device)
        keys, values = torch.cat([seen_keys, keys], dim=2), torch.cat([seen_values, values], dim=2)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


def _beside(queries: Tensor, keys: Tensor, values: Tensor, seen_keys: Tensor, seen_values: Tensor) -> Tensor:
    """The same over patches (1, heads, P, head width) that are not copied to stand beside the extra tokens' own."""
    queries = queries * queries.shape[-1] ** -0.5
    shares = torch.cat([queries @ seen_keys.mT, queries @ keys.mT], dim=-1).softmax(-1)
    first, second = shares.split([seen_keys.shape[2], keys.shape[2]], dim=-1)
    mixed: Tensor = first @ seen_values + second @ values
    return mixed.transpose(1, 2).flatten(2)
