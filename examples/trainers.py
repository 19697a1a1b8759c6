"""Train memory by other people's trainers: transformers' Trainer, TRL's SFTTrainer and GRPOTrainer.

    python examples/trainers.py --by sft --steps 60

The questions are those of ``mosaic`` that the embedded base was never asked: which class is right of, below or diagonal
to another. With ``trainer`` and ``sft`` memory is invoked at the start of every answer and learns from the answers'
likelihood; with ``grpo`` the policy of a trained memory asks by itself, and learns from the reward.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

import vismem_core as vismem
from vismem_core.base.loading import load_base
from vismem_plugins.mini import path
from vismem_plugins.mosaic import mosaic

TYPES = ["right", "below", "diagonal"]


def rows(count: int, opening: str) -> list[dict[str, Any]]:
    """Questions with their answers, memory invoked at the start."""
    samples = mosaic("train", types=TYPES)[:count]
    return [{"prompt": own.prompt, "images": own.load_images(), "answer": f"{opening} {own.answer}"} for own in samples]


def by_trainer(memory: vismem.Memory, steps: int, folder: str) -> Trainer:
    """transformers' own."""
    settings = TrainingArguments(folder, max_steps=steps, learning_rate=4e-3, **COMMON)
    data: Any = rows(BATCH * steps, "<ms_I><ms_E>")
    return Trainer(
        vismem.trainable(memory), settings, train_dataset=data, data_collator=partial(vismem.collate, memory)
    )


def by_sft(memory: vismem.Memory, steps: int, folder: str) -> Trainer:
    """TRL's trainer for supervised fine-tuning."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        folder, max_steps=steps, learning_rate=4e-3, dataset_kwargs={"skip_prepare_dataset": True}, **COMMON
    )
    return SFTTrainer(
        vismem.trainable(memory),
        settings,
        train_dataset=Dataset.from_list(rows(BATCH * steps, "<ms_I><ms_E>")),
        data_collator=partial(vismem.collate, memory),
        processing_class=memory.backbone.processor,
    )


def by_grpo(memory: vismem.Memory, steps: int, folder: str) -> Trainer:
    """TRL's trainer for group-relative policy optimisation."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        return [float(own in told[0]["content"]) for told, own in zip(completions, answer, strict=True)]

    told = [
        {
            "prompt": [{"role": "user", "content": own["prompt"]}],
            "image": own["images"][0],
            "answer": own["answer"].strip(),
        }
        for own in rows(2 * steps, "")
    ]
    settings = GRPOConfig(
        folder, max_steps=steps, learning_rate=1e-4, num_generations=4, max_completion_length=12, **COMMON
    )
    return GRPOTrainer(
        vismem.trainable(memory),
        right,
        settings,
        train_dataset=Dataset.from_list(told),
        processing_class=memory.backbone.processor,
    )


BATCH = 8
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "remove_unused_columns": False,
    "use_cpu": True,
    "bf16": False,
}
WAYS = {"trainer": by_trainer, "sft": by_sft, "grpo": by_grpo}


def main() -> None:
    """Train, save, and say what changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=WAYS, default="sft", help="whose trainer")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, help="folder for the memory")
    options = parser.parse_args()
    model, processor, _ = load_base("qwen2_5_vl")
    memory = vismem.attach(model, processor, path("qwen2_5_vl") / "memory" if options.by == "grpo" else None)
    before = {name: tensor.detach().clone() for name, tensor in memory.trained().items()}
    with tempfile.TemporaryDirectory() as folder:
        trainer = WAYS[options.by](memory, options.steps, folder)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    moved = sum(not tensor.equal(before[name]) for name, tensor in memory.trained().items())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {moved} of {len(before)} tensors of memory changed")
    if options.output:
        memory.save(options.output)


if __name__ == "__main__":
    main()
