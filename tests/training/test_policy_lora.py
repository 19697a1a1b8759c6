"""The policy's own LoRA: where it acts, where it does not, and that what it learns is right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, internvl, llava, mini, tied, untied
from reference import one_pass
from replays import gradients, recorded, told
from samples import SAMPLES
from transformers import DynamicCache

import vismem_core as vismem
from vismem_core import Memory
from vismem_core.config import Config, MemoryConfig, PolicyConfig, TrainConfig
from vismem_core.decoding.replay import read_prompts
from vismem_core.errors import CheckpointError, ConfigError
from vismem_core.training.batches import make_batch
from vismem_core.training.invocation_grpo import InvocationGrpo
from vismem_core.training.replay import TrajectoryReplay as Replay
from vismem_core.training.rollout import Sampling, rollouts
from vismem_core.training.run import train


def settings(*args: Any, **memory: Any) -> MemoryConfig:
    return config(*args, policy=PolicyConfig("lora", rank=4, alpha=8), **memory)


def attached(base: Base, *args: Any, **memory: Any) -> Memory:
    own = base.attach(settings(*args, **memory))
    base.model.generation_config.eos_token_id = None
    return own


def with_lora(pristine: Any, memory: Memory) -> Any:
    """A copy of the base with the policy's LoRA added into its weights."""
    assert memory.policy
    model, matrices = copy.deepcopy(pristine), memory.policy.parameters()
    for name in {name.rpartition(".")[0] for name in matrices}:
        model.get_submodule(name).weight.data += 2.0 * (matrices[f"{name}.lora_B"] @ matrices[f"{name}.lora_A"])
    return model


@pytest.mark.parametrize("make", [tied, untied, mini, llava, internvl])
@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_it_acts_on_what_follows_the_prompt_and_on_no_memory(make: Any, packs: bool) -> None:
    """Prompt through the base, the rest through a base with the LoRA in its weights, in one pass each."""
    base = make()
    pristine = copy.deepcopy(base.model)
    memory = attached(base, trigger="anywhere:0.3")
    memory.backbone.packs &= packs
    output = base.generate(*QUESTIONS)
    assert {own.kind for own in memory.trace.invocations} == {"short", "long"}
    adapted = with_lora(pristine, memory)
    for row, question in enumerate(QUESTIONS):
        inputs = base.inputs(question)
        whole = one_pass(memory, inputs, output.answers[row].tolist(), row)
        length, cache = inputs["input_ids"].shape[1], DynamicCache()
        pieces = []
        for model, part in ((pristine, slice(0, length)), (adapted, slice(length, None))):
            pieces.append(
                model.model.language_model(
                    inputs_embeds=whole.embeds[:, part],
                    position_ids=whole.positions[..., part],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
            )
        states = torch.cat(pieces, dim=1)[0, [length - 1, *whole.places[:-1]]]
        got = torch.stack([logits[row] for logits in output.logits])
        expected = states @ pristine.lm_head.weight.T
        torch.testing.assert_close(got[:, : expected.shape[1]], expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(expected, whole.logits, atol=1e-2)


@pytest.mark.parametrize("context", ["cache", "recompute"])
def test_both_routes_form_the_same_memory(context: str) -> None:
    base = tied()
    memory = attached(base, context=context, trigger="anywhere:0.3")
    base.generate(*QUESTIONS)
    packed = memory.trace.invocations
    memory.backbone.packs = False
    base.generate(*QUESTIONS)
    for one, other in zip(packed, memory.trace.invocations, strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=1e-4)


def test_off_never_and_detached_are_the_base() -> None:
    base = tied()
    plain = base.generate(*QUESTIONS)
    modules = {name: id(own) for name, own in base.model.named_modules()}
    memory = attached(base, trigger="policy")
    base.model.generation_config.eos_token_id = tied().model.generation_config.eos_token_id
    for context in (memory.off(), memory.triggered("never")):
        with context:
            quiet = base.generate(*QUESTIONS)
        assert quiet.sequences.equal(plain.sequences) and all(map(torch.equal, quiet.logits, plain.logits))
    read = read_prompts(memory, base.inputs(*QUESTIONS))
    with memory.triggered("never"):  # tau_base
        greedy = rollouts(memory, read, [0, 1, 2, 3], [0] * 4, Sampling(0.0, 1.0, 16))
    for own, answer in zip(greedy, plain.answers.tolist(), strict=True):
        assert own.ids == answer[: len(own.ids)]
    memory.detach()
    assert {name: id(own) for name, own in base.model.named_modules()} == modules


@pytest.mark.parametrize("own", [settings(), settings(context="recompute"), settings("transformer", builder="cross")])
@pytest.mark.parametrize("make", [tied, mini])
def test_a_replay_says_what_the_rollout_said(make: Any, own: MemoryConfig) -> None:
    memory = make().attach(own)
    read, trajectories = told(memory, "anywhere:0.2", 1.5, 0.5)
    for form in (True, False):
        replayed = Replay(memory, read, trajectories, 1.5).logprobs(form=form)
        torch.testing.assert_close(replayed, recorded(trajectories), atol=1e-4, rtol=1e-4)
    assert memory.policy
    for tensor in memory.policy.parameters().values():
        tensor.data *= 2.0
    assert not torch.allclose(Replay(memory, read, trajectories, 1.5).logprobs(form=False), replayed, atol=1e-2)


def test_gradients_with_and_without_checkpointing_are_those_of_finite_differences() -> None:
    memory = tied().attach(settings())
    read, trajectories = told(memory, "anywhere:0.2")

    def total(checkpointing: bool = False) -> torch.Tensor:
        return Replay(memory, read, trajectories, checkpointing=checkpointing).logprobs(form=False).double().sum()

    grads, again = gradients(memory, total()), gradients(memory, total(True))
    assert memory.policy
    for name, tensor in memory.policy.parameters().items():
        grad = grads[f"policy.adapter.{name}"]
        torch.testing.assert_close(again[f"policy.adapter.{name}"], grad, atol=1e-4, rtol=1e-3)
        slope, step = grad.norm(), 1e-3 * tensor.detach().norm()
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                tensor += sign * step * grad / slope
                values.append(total())
            tensor += step * grad / slope
        assert ((values[0] - values[1]) / (2 * step)).item() == pytest.approx(slope.item(), rel=0.05, abs=2e-2), name


def test_the_reference_is_a_lora_of_nothing() -> None:
    memory = vismem.attach(*vars(tied()).values(), config=settings())
    stage = InvocationGrpo(memory, TrainConfig())
    assert memory.policy
    ups = [name for name in stage.reference if name.startswith("policy.") and name.endswith("lora_B")]
    assert ups and not any(stage.reference[name].any() for name in ups)
    read = read_prompts(memory, make_batch(memory.backbone, SAMPLES).inputs)
    trajectories = rollouts(memory, read, [0, 1], [1, 2], Sampling(1.0, 1.0, 8))
    before = Replay(memory, read, trajectories).logprobs(form=False)
    for name, tensor in memory.policy.parameters().items():
        if name.endswith("lora_B"):
            tensor.data.normal_()
    with stage.as_reference():
        torch.testing.assert_close(Replay(memory, read, trajectories).logprobs(form=False), before)
    assert not torch.allclose(Replay(memory, read, trajectories).logprobs(form=False), before, atol=1e-2)


def test_a_checkpoint_holds_it_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    base = tied()
    memory = attached(base)
    expected = base.generate(*QUESTIONS)
    memory.save(tmp_path)
    memory.detach()
    again = vismem.attach(base.model, base.processor, tmp_path)
    assert again.policy and again.config.policy.trains == "lora"
    assert torch.stack(base.generate(*QUESTIONS).logits).equal(torch.stack(expected.logits))
    again.detach()
    about = tmp_path / "vismem.json"
    whole = about.read_text()
    for wrong in (
        whole.replace('"lora",\n      "rank": 4', '"lora",\n      "rank": 2'),
        whole.replace('"trains": "lora"', '"trains": "rows"'),
    ):
        assert wrong != whole
        about.write_text(wrong)
        with pytest.raises(CheckpointError, match=r"policy\.adapter\."):
            vismem.attach(base.model, base.processor, tmp_path)


def test_cross_entropy_does_not_train_it(tmp_path: Path) -> None:
    memory = tied().attach(settings())
    with pytest.raises(ConfigError, match="only GRPO trains it"):
        train(memory, SAMPLES, SAMPLES, Config(memory.config), tmp_path / "run")
