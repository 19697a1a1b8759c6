"""Training of the projector alone: the language model and the encoder are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from vismem_core.base.families import find_backbone
from vismem_core.files.samples import Sample
from vismem_core.training.batches import Sampler, extended, usable_batch

WARMUP = 0.1


def losses(model: Any, backbone: Any, samples: Sequence[Sample]) -> Tensor:
    """Cross-entropy (B,) of each answer, a mean over its tokens and the end of its turn."""
    batch: Any = usable_batch(backbone, samples, None)
    fed = extended(batch.inputs, batch.answers, int(backbone.processor.tokenizer.pad_token_id))
    lengths = [len(answer) for answer in batch.answers]
    with _mixed(model):
        hidden = model.model(**fed, use_cache=False).last_hidden_state
        before = torch.cat([hidden[row, -length - 1 : -1] for row, length in enumerate(lengths)])
        logits = model.lm_head(before).float()
    wanted = torch.tensor([token for answer in batch.answers for token in answer], device=logits.device)
    told = F.cross_entropy(logits, wanted, reduction="none").split(lengths)
    return torch.stack([own.mean() for own in told])


def train(
    model: Any, processor: Any, data: Sequence[Sample], *, steps: int, batch: int = 16, lr: float = 2e-3, seed: int = 0
) -> list[float]:
    """Train ``model.model.multi_modal_projector``; the loss of every step."""
    backbone = find_backbone(model)(model, processor)
    projector, dtype = model.model.multi_modal_projector, model.dtype
    model.requires_grad_(False)
    projector.float().requires_grad_()  # steps are smaller than what bfloat16 tells apart
    optimiser = torch.optim.AdamW(projector.parameters(), lr=lr, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, max(steps, 2), pct_start=WARMUP)
    told: list[float] = []
    with _progress() as progress:
        task = progress.add_task("projector", total=steps, note="")
        for drawn in islice(Sampler(len(data), batch, seed), steps):
            loss = losses(model, backbone, [data[at] for at in drawn]).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimiser.step()
            rate.step()
            told.append(loss.item())
            progress.update(task, advance=1, note=f"loss {mean(told[-20:]):.3f}")
    projector.to(dtype).requires_grad_(False)
    return told


@torch.no_grad()
def seen(model: Any, processor: Any, data: Sequence[Sample], batch: int = 25) -> tuple[float, float, int]:
    """Mean cross-entropy over the right images and over another's, and for how many the right one is better."""
    backbone = find_backbone(model)(model, processor)
    others = [replace(own, images=data[at - 1].images) for at, own in enumerate(data)]
    right, wrong = (
        torch.cat([losses(model, backbone, asked[at : at + batch]) for at in range(0, len(asked), batch)])
        for asked in (list(data), others)
    )
    return right.mean().item(), wrong.mean().item(), int((right < wrong).sum())


def _mixed(model: Any) -> AbstractContextManager[Any]:
    """A projector of float32 in a model of bfloat16."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(
        TextColumn("{task.description}"), *columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)
    )
