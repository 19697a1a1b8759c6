"""Memory beside the user's own adapters and programs: each acts, trains, is saved and taken off as if alone."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from bases import QUESTIONS, Base, config, mini, tied
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import vismem_core as vismem
from vismem_core.errors import AttachError
from vismem_core.memory.memory import Memory
from vismem_plugins.mini import path as shipped

ADAPTERS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "dora": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[], init_ia3_weights=False),
}


def own_adapter(base: Base, kind: str = "lora") -> Any:
    torch.manual_seed(0)
    return get_peft_model(base.model, ADAPTERS[kind]())


def latents(base: Base, memory: Memory) -> list[torch.Tensor]:
    """What is formed when both kinds are forced; the answers are not compared."""
    with memory.triggered("schedule:0=short,3=long"):
        base.generate(*QUESTIONS, max_new_tokens=8)
    return [own.latents.clone() for own in memory.trace.invocations]


def losses(model: Any, base: Base, steps: int = 3) -> list[float]:
    inputs = base.inputs(QUESTIONS[0])
    labels = inputs["input_ids"].clone()
    trained = [own for own in model.parameters() if own.requires_grad]
    optimizer, told = torch.optim.SGD(trained, lr=0.1), []
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
    return told


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("order", ["adapter first", "memory first"])
def test_the_users_adapter_acts_trains_and_is_saved_as_alone(kind: str, order: str, tmp_path: Path) -> None:
    alone = tied()
    expected = losses(own_adapter(alone, kind), alone)
    assert expected[0] != expected[-1]
    base = tied()
    if order == "adapter first":
        model = own_adapter(base, kind)
        memory = vismem.attach(model, base.processor, config=config())
    else:
        memory = base.attach()
        model = own_adapter(base, kind)
    assert losses(model, base) == expected
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored and not any("vismem" in name for name in stored)
    memory.detach()
    again = model(**base.inputs(QUESTIONS[0])).logits
    assert again.equal(own_model(alone)(**alone.inputs(QUESTIONS[0])).logits)


def own_model(base: Base) -> Any:
    return base.model


def test_memory_forms_on_the_model_as_it_behaves_and_outlives_the_adapter() -> None:
    base = tied()
    memory = base.attach(config())
    before = latents(base, memory)
    model = own_adapter(base)
    with_adapter = latents(base, memory)
    assert not all(map(torch.equal, before, with_adapter))
    with model.disable_adapter():
        assert all(map(torch.equal, before, latents(base, memory)))
    merged = model.merge_and_unload()
    assert merged is base.model
    for ours, theirs in zip(latents(base, memory), with_adapter, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_unload_leaves_memory_alone() -> None:
    base = tied()
    memory = base.attach(config())
    before = latents(base, memory)
    own_adapter(base).unload()
    assert all(map(torch.equal, before, latents(base, memory)))


def test_a_trained_memory_attaches_to_what_peft_and_compile_wrap() -> None:
    base = mini()
    plain = vismem.attach(base.model, base.processor, shipped("qwen2_5_vl") / "memory")
    expected = latents(base, plain)
    plain.detach()
    compiled = torch.compile(base.model, backend="eager")
    memory = vismem.attach(compiled, base.processor, shipped("qwen2_5_vl") / "memory")
    assert memory.model is base.model
    assert all(map(torch.equal, expected, latents(base, memory)))
    memory.detach()
    wrapped: PeftModel = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"]))  # acts as nothing yet
    memory = vismem.attach(wrapped, base.processor, shipped("qwen2_5_vl") / "memory")
    assert all(map(torch.equal, expected, latents(base, memory)))
    wrapped.generate(**base.inputs(QUESTIONS[0]), max_new_tokens=4)
    memory.detach()


def test_states_are_the_models_own() -> None:
    base = tied()
    base.attach()
    told = base.model.load_state_dict(base.model.state_dict())
    assert not told.missing_keys and not told.unexpected_keys
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(base.model)
    weight = next(model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1.0)
        accelerator.load_state(folder)
    assert weight.equal(before)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [by_pickle, by_torch, copy.deepcopy])
def test_copies_are_the_plain_model_and_can_have_memory_of_their_own(way: Any) -> None:
    base = tied()
    plain = base.generate(*QUESTIONS)
    memory = base.attach(config(trigger="anywhere:0.5"))
    assert not base.generate(*QUESTIONS).sequences.equal(plain.sequences)
    copied = Base(way(base.model), base.processor)
    with memory.off():
        assert copied.generate(*QUESTIONS).sequences.equal(plain.sequences)
    assert not base.generate(*QUESTIONS).sequences.equal(plain.sequences)  # and the original goes on
    other = copied.attach(config(trigger="anywhere:0.5"))
    assert not copied.generate(*QUESTIONS).sequences.equal(plain.sequences)
    other.detach()
    memory.detach()


@pytest.mark.parametrize("name", ["generate_batch", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_by_name(name: str) -> None:
    base = tied()
    own = getattr(base.model, name)
    memory = base.attach()
    with pytest.raises(AttachError, match=rf"memory does not work with {name}\(\): use generate\(\)"):
        getattr(base.model, name)([[1, 2]])
    memory.detach()
    assert getattr(base.model, name) == own
