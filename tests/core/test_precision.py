"""Half precision and quantised models: memory attaches, answers are finite, the base keeps its types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, mini, tied, untied
from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

FORMERS = [config(), config(context="recompute"), config("transformer")]


def answers(base: Base, settings: Any) -> Any:
    memory = base.attach(settings)
    memory.trigger = "schedule:0=long,3=short,8=long"
    output = base.generate(*QUESTIONS, max_new_tokens=12, eos_token_id=None)
    assert len(memory.trace) == 3 * len(QUESTIONS)
    assert all(own.latents.isfinite().all() for own in memory.trace.invocations)
    assert all(logits[:, : memory.tokens.first].isfinite().all() for logits in output.logits)
    return memory, output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", FORMERS, ids=["cache", "recompute", "transformer"])
@pytest.mark.parametrize("make", [tied, untied])
def test_half_precision(make: Callable[[], Base], settings: Any, dtype: torch.dtype) -> None:
    base = make()
    base.model.to(dtype)
    types = {name: own.dtype for name, own in base.model.named_parameters()}
    memory, _ = answers(base, settings)
    assert all(own.latents.dtype == dtype for own in memory.trace.invocations)
    assert all(own.dtype == torch.float32 for own in memory.trained().values())
    assert base.model(**base.inputs(*QUESTIONS)).logits.dtype == dtype
    memory.detach()
    assert {name: own.dtype for name, own in base.model.named_parameters()} == types


def test_half_precision_is_near_full_precision() -> None:
    half, full = mini(), mini()
    half.model.to(torch.bfloat16)
    latents = []
    for base in (half, full):
        memory = base.attach()
        memory.trigger = "schedule:0=long,2=short"
        base.generate(QUESTIONS[0], max_new_tokens=4)
        latents.append([own.latents.float() for own in memory.trace.invocations])
    for rough, exact in zip(*latents, strict=True):
        assert torch.cosine_similarity(rough, exact, dim=-1).min() > 0.98


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("settings", FORMERS, ids=["cache", "recompute", "transformer"])
def test_quantised_by_bitsandbytes(bits: int, settings: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = tied(width=64)  # the smallest that has whole blocks of 4 bits
    base.model.save_pretrained(tmp_path)
    options = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    base.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, quantization_config=options)
    linear = base.model.get_decoder().layers[0].self_attn.q_proj
    assert type(linear).__module__.startswith("bitsandbytes")
    plain = base.generate(*QUESTIONS)
    memory, _ = answers(base, settings)
    with memory.off():
        assert base.generate(*QUESTIONS).sequences.equal(plain.sequences)
    memory.detach()
    assert base.model.get_decoder().layers[0].self_attn.q_proj is linear
