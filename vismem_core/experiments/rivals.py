"""What memory is compared with: a LoRA on all linear layers of the base, by cross-entropy or by GRPO.

It takes as many steps, of as large batches, as the settings have for memory's two stages together. On the embedded
models its rank makes it about as many trained parameters; reports say how many there are of either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from vismem_core.answers import reward
from vismem_core.base.families import find_backbone
from vismem_core.config import Config, StageConfig
from vismem_core.files.samples import Sample, asked
from vismem_core.training.batches import Batch, Sampler, extended, make_batch

LR = {"sft": 2e-3, "grpo": 5e-4}
"""Rates that suit models of a million parameters, as those of ``mini/train.yaml`` do for memory."""
RANK = 32
TARGETS = "all-linear"


def train(
    model: Any,
    processor: Any,
    name: str,
    config: Config,
    data: Sequence[Sample],
    folder: Path,
    before: Path | None = None,
) -> dict[str, Any]:
    """Train an adapter and write it to ``folder / "lora"``; the model is left as it was.

    Args:
        before: the folder of another such cell, with whose end it begins.

    Returns:
        ``parameters``, how many are trained.
    """
    torch.manual_seed(config.train.seed)
    backbone = find_backbone(model, name)(model, processor)
    frozen = [own for own in model.parameters() if own.requires_grad]
    if before is None:
        wrapped: Any = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    else:
        wrapped = PeftModel.from_pretrained(model, str(before / "lora"), is_trainable=True)
    try:
        learnt = [own for own in wrapped.parameters() if own.requires_grad]
        for batch, step in _steps(learnt, backbone, config, data):
            loss = _likelihood(model, backbone, batch) if step == "sft" else _grpo(model, backbone, batch, config)
            if loss is not None:
                loss.backward()
        wrapped.save_pretrained(str(folder / "lora"))
        return {"parameters": sum(own.numel() for own in learnt)}
    finally:
        wrapped.unload()
        for own in frozen:
            own.requires_grad_(True)


def load(model: Any, before: Path) -> Any:
    """The model with an adapter that was trained."""
    return PeftModel.from_pretrained(model, str(before / "lora")).eval()


def _steps(learnt: list[Tensor], backbone: Any, config: Config, data: Sequence[Sample]) -> Iterator[tuple[Batch, str]]:
    """Batches to be learnt from, each with how; the optimizer goes a step when the next is asked for."""
    kind = "sft" if config.train.objective == "sft" else "grpo"
    own = config.train if kind == "sft" else config.train.grpo
    stages: list[StageConfig] = [own.formation, own.invocation]
    steps = sum(stage.steps for stage in stages)
    optimizer = torch.optim.AdamW(learnt, lr=LR[kind], weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.05 * steps), steps)
    for number, stage in enumerate(stages):
        sampler = Sampler(len(data), stage.batch, config.train.seed + number)
        for _ in range(stage.steps):
            yield make_batch(backbone, [data[at] for at in sampler.draw()]), kind
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def _likelihood(model: Any, backbone: Any, batch: Batch) -> Tensor:
    told, mask = _logprobs(model, backbone, batch)
    return -(told * mask).sum() / mask.sum()


def _grpo(model: Any, backbone: Any, batch: Batch, config: Config) -> Tensor | None:
    """One step on the policy's own trajectories; None where no group's scores differ."""
    settings = config.train.grpo
    count, width = settings.group, batch.inputs["input_ids"].shape[1]
    with torch.no_grad():
        ids = model.generate(
            **batch.inputs,
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            num_return_sequences=count,
            max_new_tokens=settings.max_new_tokens,
        )[:, width:]
    end = backbone.end_of_turn
    written = [row[: row.index(end) + 1] if end in row else row for row in ids.tolist()]
    words = backbone.processor.tokenizer
    told = [reward.Written(words.decode(row, skip_special_tokens=True).strip(), tuple(row)) for row in written]
    samples = [sample for sample in batch.samples for _ in range(count)]
    scores = torch.tensor(reward.parse(settings.rewards)(told, samples)).view(-1, count)
    gain = scores - scores.mean(1, keepdim=True)
    advantages = gain / (scores.std(1, keepdim=True) + 1e-4)
    live = [row for row in range(len(scores)) if bool(gain[row].any())]
    if not live:
        return None
    losses = []
    for row in live:  # a prompt's group at a time: its images are the same
        part = slice(row * count, (row + 1) * count)
        group = replace(
            batch, samples=samples[part], inputs=backbone.inputs(*asked(samples[part])), answers=written[part]
        )
        logprobs, mask = _logprobs(model, backbone, group)
        losses.append(-(advantages[row][:, None].to(logprobs) * logprobs * mask).sum(1) / mask.sum(1))
    return torch.cat(losses).sum() / scores.numel()


def _logprobs(model: Any, backbone: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers (B, T), flush right, and a mask of them."""
    answers, pad = batch.answers, int(backbone.processor.tokenizer.pad_token_id)
    inputs = extended(batch.inputs, answers, pad)
    longest = max(map(len, answers))
    logits = model(**inputs, use_cache=False).logits[:, -longest - 1 : -1].float()
    ids = inputs["input_ids"][:, -longest:]
    told = logits.log_softmax(-1).gather(2, ids[..., None]).squeeze(2)
    mask = torch.tensor([[0.0] * (longest - len(own)) + [1.0] * len(own) for own in answers], device=told.device)
    return told, mask
