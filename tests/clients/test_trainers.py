"""Other people's trainers train memory, by the example that says how; and the base alone where they were given it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import mini
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainingArguments

import vismem_core as vismem
from vismem_core.decoding.forward import UNLIKELY
from vismem_core.errors import DataError
from vismem_core.memory.memory import Memory
from vismem_plugins.mini import path

EXAMPLE = Path(__file__).parents[2] / "examples" / "trainers.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("trainers", EXAMPLE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attached(trained: bool) -> Memory:
    base = mini()
    return vismem.attach(base.model, base.processor, path("qwen2_5_vl") / "memory" if trained else None)


def tensors(memory: Memory) -> dict[str, Tensor]:
    return {name: own.detach().clone() for name, own in memory.trained().items()}


@pytest.mark.parametrize("way", ["trainer", "sft"])
def test_supervised(example: Any, way: str, tmp_path: Path) -> None:
    memory = attached(False)
    before, weights = tensors(memory), {name: own.clone() for name, own in memory.model.state_dict().items()}
    trainer = example.WAYS[way](memory, 20, str(tmp_path))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    changed = {name for name, own in memory.trained().items() if not own.equal(before[name])}
    assert {name for name in before if name.startswith(("short.", "builder."))} <= changed
    assert not any(name.startswith("long.") for name in changed)  # nobody asked for it
    assert all(own.equal(weights[name]) for name, own in memory.model.state_dict().items())
    trainer.save_model(str(tmp_path / "saved"))
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert len(stored) == len(before)  # of memory alone
    memory.save(tmp_path / "memory")
    base = mini()
    again = vismem.attach(base.model, base.processor, tmp_path / "memory")
    assert all(own.equal(tensors(memory)[name]) for name, own in again.trained().items())


def test_grpo_learns_from_the_log_probabilities_of_the_decoding(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOTrainer

    memory, temperature = attached(True), 0.7
    told: list[tuple[Tensor, Tensor]] = []
    generated: list[dict[tuple[int, ...], list[float]]] = []
    compute, generate = GRPOTrainer._get_per_token_logps_and_entropies, memory.model.generate

    def logps(self: Any, model: Any, ids: Tensor, mask: Tensor, keep: int, *args: Any, **rest: Any) -> Any:
        found = compute(self, model, ids, mask, keep, *args, **rest)
        told.append((ids[:, -keep:], found[0].detach()))
        return found

    def recorded(*args: Any, **rest: Any) -> Tensor:
        output = generate(*args, **rest, return_dict_in_generate=True, output_scores=True)
        scores = torch.stack(output.scores, 1).clamp(min=UNLIKELY).log_softmax(-1)
        ids: Tensor = output.sequences[:, -len(output.scores) :]
        own = scores.gather(2, ids[..., None]).squeeze(2)
        generated.append({tuple(row): own[at].tolist() for at, row in enumerate(ids.tolist())})
        return output.sequences

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", logps)
    memory.model.generate = recorded
    monkeypatch.setitem(example.COMMON, "temperature", temperature)
    before = tensors(memory)
    trainer = example.by_grpo(memory, 4, str(tmp_path))
    trainer.train()
    assert any(row.get("grad_norm") for row in trainer.state.log_history)
    assert len(memory.trace) and any(not own.equal(before[name]) for name, own in memory.trained().items())
    ids, logprobs = told[0]  # the first step's, before anything has changed
    seen = 0
    for row, own in zip(ids.tolist(), logprobs, strict=True):
        (expected,) = (values for key, values in generated[0].items() if list(key)[: len(row)] == row[: len(key)])
        ended = row.index(2) + 1 if 2 in row else len(row)
        torch.testing.assert_close(own[:ended], torch.tensor(expected[:ended]), atol=1e-3, rtol=1e-3)
        seen += sum(token >= memory.tokens.first for token in row[:ended])
    assert seen  # memory tokens among them


def test_rows_that_are_no_rows_are_told() -> None:
    memory = attached(False)
    with pytest.raises(DataError, match="row 1: 'answer' must be a text"):
        vismem.collate(memory, [{"prompt": "what ?", "answer": "a"}, {"prompt": "what ?"}])
    with pytest.raises(DataError, match="row 0: 'prompt' must be a text"):
        vismem.collate(memory, [{"prompt": [{"role": "user"}], "answer": "a"}])


def test_all_trainers_count_the_same_labels(example: Any, tmp_path: Path) -> None:
    """What nobody could choose, the end tokens, is in no loss and in no mean."""
    memory = attached(False)
    batch = vismem.collate(memory, example.rows(8, "<ms_I><ms_E>"))
    assert not (batch["labels"] >= memory.tokens.end("short")).any()
    model = vismem.trainable(memory)
    mean = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss, mean)
    scores = model(**batch, fused_lm_head=True)
    torch.testing.assert_close(scores.loss, mean)
    assert scores.is_top1.dtype == torch.bool == scores.label_mask.dtype
    assert scores.label_mask.sum() == (batch["labels"] != -100).sum()


def test_a_trainer_of_the_model_trains_the_model_as_without_memory(example: Any, tmp_path: Path) -> None:
    told = []
    for attach in (False, True):
        base = mini()
        memory = vismem.attach(base.model, base.processor)
        rows = [vismem.collate(memory, [row]) for row in example.rows(4, "")]
        if not attach:
            memory.detach()
        settings = TrainingArguments(str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=1,
                                     **{k: v for k, v in example.COMMON.items() if "batch" not in k})  # fmt: skip
        trainer = Trainer(base.model, settings, train_dataset=rows, data_collator=lambda own: own[0])
        trainer.train()
        told.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert told[0] == told[1] and told[0][0] != told[0][-1]


def test_what_it_does_not_know_is_the_models(tmp_path: Path) -> None:
    memory = attached(False)
    model = vismem.trainable(memory)
    assert model.config is memory.model.config and model.device == memory.model.device
    assert {id(own) for own in model.parameters()} == {id(own) for own in memory.trained().values()}
    model.save_pretrained(tmp_path)
    assert (tmp_path / "vismem.json").is_file()
    with pytest.raises(AttributeError, match="nobody"):
        _ = model.nobody
