"""Questions that come after memory: a prompt ends with its images, and what follows them is given to the answer.

The ids stay what the chat template makes of image and question; only where memory may come first is another place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import BatchFeature, StoppingCriteria

from vismem_core.base.backbone import Backbone
from vismem_core.errors import DataError
from vismem_core.files.samples import Sample


def split(backbone: Backbone, samples: Sequence[Sample], inputs: BatchFeature) -> tuple[BatchFeature, list[list[int]]]:
    """Prompts up to their last image where their samples are late, padded on the left, and the ids of each row that
    follow: given, not the model's choice. A special token that closes the image belongs to it.

    Raises:
        DataError: a late sample has no image.
    """
    if not any(own.late for own in samples):
        return inputs, [[] for _ in samples]
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    media, ends = torch.tensor(backbone.media, device=ids.device), []
    for row, own in enumerate(samples):
        seen = torch.isin(ids[row], media).nonzero()
        if own.late and not len(seen):
            raise DataError(f"{own.name}: memory can come before the question where there is an image, and it has none")
        end = int(seen[-1]) + 1 if own.late else ids.shape[1]
        closed = end < ids.shape[1] and int(ids[row, end]) in backbone.processor.tokenizer.all_special_ids
        ends.append(end + closed)
    tails = [ids[row, end:].tolist() for row, end in enumerate(ends)]
    longest = max(int(mask[row, :end].sum()) for row, end in enumerate(ends))
    cut = BatchFeature(dict(inputs))
    for name, own in inputs.items():
        if isinstance(own, Tensor) and own.shape == ids.shape:
            filler = own.new_full(
                (len(own), longest), int(backbone.processor.tokenizer.pad_token_id if name == "input_ids" else 0)
            )
            for row, end in enumerate(ends):
                kept = own[row, :end][mask[row, :end]]
                filler[row, longest - len(kept) :] = kept
            cut[name] = filler
    return cut, tails


class EndsLate(StoppingCriteria):
    """A row is done when it has written an end of its own, and not one that it was given.

    Args:
        width: columns of the prompts.
        given: how many ids each row is given.
        first: of the memory tokens' ids, which do not count.
        ends: ids that end an answer.
    """

    def __init__(self, width: int, given: Sequence[int], first: int, ends: Sequence[int]) -> None:
        self.width, self.given, self.first, self.ends = width, torch.tensor(given), first, torch.tensor(ends)

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        written = (input_ids[:, self.width :] < self.first).sum(1)
        return torch.isin(input_ids[:, -1], self.ends.to(input_ids)) & (written > self.given.to(input_ids))
