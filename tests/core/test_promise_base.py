"""Promise 1: off or never invoked, the base model bit for bit; detached, the model as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, mini, tied
from torch import nn

import vismem_core as vismem
from vismem_backbones.qwen2_5_vl import Qwen2_5_VL
from vismem_core.config import FormerConfig, MemoryConfig, PolicyConfig
from vismem_core.errors import AttachError, ConfigError, VismemError
from vismem_core.memory.memory import Memory

HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def photograph(base: Base) -> dict[str, Any]:
    """Everything about a model and its tokenizer that attaching could change."""
    model, tokenizer = base.model, base.processor.tokenizer
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: (id(own), own.requires_grad, own.dtype) for name, own in model.named_parameters()},
        "weights": [own.clone() for own in model.state_dict().values()],
        "keys": list(model.state_dict()),
        "hooks": {(name, kind): len(getattr(own, kind)) for name, own in model.named_modules() for kind in HOOKS},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
        "backend": id(tokenizer._tokenizer),
        "vocabulary": tokenizer.get_vocab(),
        "length": len(tokenizer),
        "generate": getattr(model.generate, "__func__", type(model.generate)),
    }


def same(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(before[key], after[key]) for key in before)
    if isinstance(before, list) and before and isinstance(before[0], torch.Tensor):
        return all(map(torch.equal, before, after))
    return bool(before == after)


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "top_p": 0.9, "temperature": 0.8}], ids=["greedy", "sample"]
)
def test_off_and_never_are_the_base(any_base: Base, sampling: dict[str, Any]) -> None:
    def answer(memory: Memory | None = None) -> Any:
        torch.manual_seed(3)
        return any_base.generate(*QUESTIONS, **sampling)

    plain = answer()
    memory = any_base.attach(config(trigger="anywhere:0.5", delimiters=(",",)))
    assert not answer().answers.equal(plain.answers)  # memory does change the answers
    assert len(memory.trace)
    for context in (memory.off(), memory.triggered("never")):
        with context:
            quiet = answer()
        assert len(memory.trace) == 0
        assert quiet.sequences.equal(plain.sequences)
        for name in ("logits", "scores"):
            assert all(map(torch.equal, quiet[name], plain[name]))
    memory.detach()
    assert answer().sequences.equal(plain.sequences)


@pytest.mark.parametrize("settings", [{"budget": 0}, {"trigger": "random:0"}, {"trigger": "schedule:99=long"}])
def test_the_loop_itself_is_the_base(any_base: Base, settings: dict[str, Any]) -> None:
    plain = any_base.generate(*QUESTIONS)
    memory = any_base.attach(config(**({"trigger": "policy"} | settings)))
    quiet = any_base.generate(*QUESTIONS)
    assert len(memory.trace) == 0
    assert quiet.sequences.equal(plain.sequences)
    for before, after in zip(plain.logits, quiet.logits, strict=True):
        assert after[:, : before.shape[1]].equal(before)
        assert after[:, before.shape[1] :].eq(float("-inf")).all()


@pytest.mark.parametrize("end", [None, 286])
def test_rows_that_stopped_are_padded_as_the_base_does(end: int | None) -> None:
    base = tied()
    width = base.inputs(*QUESTIONS)["input_ids"].shape[1]

    def one_by_one(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= width + 3 + row for row in range(len(input_ids))])

    options = {"stopping_criteria": [one_by_one], "eos_token_id": end, "pad_token_id": 3}
    plain = base.generate(*QUESTIONS, **options).answers
    assert plain.shape[1] < 16
    assert plain.eq(3).any() == (end is not None)
    base.attach(config(budget=0))
    assert base.generate(*QUESTIONS, **options).answers.equal(plain)


def test_policy_that_never_samples_its_tokens(any_base: Base) -> None:
    plain = any_base.generate(*QUESTIONS)
    memory = any_base.attach(config(trigger="policy"))
    with torch.no_grad():
        memory.tokens.head.zero_()
    quiet = any_base.generate(*QUESTIONS, suppress_tokens=[memory.tokens.first, memory.tokens.first + 1])
    assert quiet.sequences.equal(plain.sequences)
    for before, after in zip(plain.logits, quiet.logits, strict=True):
        assert after[:, : before.shape[1]].equal(before)
    assert quiet.logits[0][:, memory.tokens.first :].isfinite().tolist() == [[True, True, False, False]] * 4


@pytest.mark.parametrize("settings", [config(), config(context="recompute"), config("transformer")])
def test_detached_as_it_was(any_base: Base, settings: MemoryConfig) -> None:
    parameters = list(any_base.model.parameters())
    parameters[0].requires_grad_(False)
    any_base.generate(QUESTIONS[0])  # what any call of the base's own ``generate`` leaves behind is there already
    before = photograph(any_base)
    memory = any_base.attach(settings)
    during = photograph(any_base)
    kept = ("modules", "parameters", "keys", "training", "backend", "vocabulary", "length")
    assert [part for part in kept if not same(before[part], during[part])] == []
    any_base.generate(QUESTIONS[0])
    assert same(before["weights"], list(any_base.model.state_dict().values()))
    memory.detach()
    after = photograph(any_base)
    assert [part for part in before if not same(before[part], after[part])] == []
    memory.detach()  # a second time does nothing
    assert same(before, photograph(any_base))


def test_what_is_saved_while_attached_is_the_base(any_base: Base, tmp_path: Path) -> None:
    model = any_base.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(own) for name, own in model.named_parameters()}
    memory = any_base.attach(config(policy=PolicyConfig("lora", rank=4)))
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: id(own) for name, own in model.named_parameters()} == parameters
    assert list(model.state_dict()) == list(before)
    assert not model.load_state_dict(model.state_dict()).missing_keys
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert saved.keys() == before.keys()
    assert all(saved[name].equal(tensor) for name, tensor in before.items())
    memory.detach()


@pytest.mark.parametrize(
    ("swapped", "told"),
    [
        (lambda base: (base.processor, base.model), "the model is one of transformers, no Qwen2_5_VLProcessor"),
        (lambda base: ("qwen", base.processor), "no str"),
        (lambda base: (nn.Linear(2, 2), base.processor), "no Linear"),
        (lambda base: (base.model, None), "NoneType has none"),
    ],
)
def test_what_is_no_model_or_processor_is_told(swapped: Any, told: str) -> None:
    with pytest.raises(AttachError, match=told):
        vismem.attach(*swapped(tied()))


def test_prompts_and_images_are_lists() -> None:
    backbone, image = tied().attach().backbone, QUESTIONS[0][1][0]
    for prompts, images in (("what is it ?", [[image]]), (["what is it ?"], [image])):
        with pytest.raises(AttachError, match=r"inputs\(\[text\], \[\[image\]\]\)"):
            backbone.inputs(prompts, images)
    with pytest.raises(AttachError, match="2 prompts, and lists of images for 1"):
        backbone.inputs(["a bag ?", "a boot ?"], [[image]])


def test_hooks_live_as_long_as_a_call() -> None:
    base = tied()
    base.attach()
    before = photograph(base)["hooks"]
    base.generate(QUESTIONS[0])
    with pytest.raises(AttachError):
        base.generate(QUESTIONS[0], num_beams=2)
    assert photograph(base)["hooks"] == before


def test_a_generate_of_the_users_own_comes_back() -> None:
    base = tied()
    own = base.model.generate = lambda *args, **kwargs: type(base.model).generate(base.model, *args, **kwargs)
    memory = base.attach()
    assert base.model.generate is not own
    memory.detach()
    assert base.model.generate is own


def test_attach_twice() -> None:
    base = tied()
    memory = base.attach()
    before = photograph(base)
    with pytest.raises(AttachError, match="attached already"):
        base.attach()
    assert same(before, photograph(base))
    memory.detach()
    base.attach().detach()


class Misfit(Qwen2_5_VL):
    """Targets a norm beside a linear layer: adapters fail half-way."""

    lora_targets = Qwen2_5_VL.lora_targets | {
        "long": r"model\.language_model\.layers\.\d+\.(self_attn\.q_proj|\w+norm)"
    }


class Nowhere(Qwen2_5_VL):
    lora_targets = Qwen2_5_VL.lora_targets | {"long": "nothing"}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (Misfit, config()),
        (Nowhere, config()),
        (Qwen2_5_VL, config("nobody")),
        (Qwen2_5_VL, MemoryConfig(long=FormerConfig(name="nobody"))),
        (Qwen2_5_VL, config(builder="nobody")),
        (Qwen2_5_VL, config(trigger="nobody")),
        (Qwen2_5_VL, config(delimiters=("☃",))),
    ],
)
def test_a_failure_leaves_the_model_alone(family: type[Qwen2_5_VL], settings: MemoryConfig) -> None:
    base = tied()
    before = photograph(base)
    with pytest.raises((VismemError, ConfigError)):
        Memory(family(base.model, base.processor), settings)
    assert same(before, photograph(base))


def test_models_of_no_known_family() -> None:
    base = tied()
    base.model.config.model_type = "unheard_of"
    with pytest.raises(AttachError, match="no backbone knows model type 'unheard_of'; known: "):
        base.attach()
    with pytest.raises(AttachError, match="backbone 'qwen2_5_vl' does not know model type 'unheard_of'"):
        vismem.attach(base.model, base.processor, backbone="qwen2_5_vl")


def test_tokenizers_without_a_fast_backend() -> None:
    base = tied()
    fast = base.processor.tokenizer
    names = ("all_special_ids", "get_vocab", "convert_tokens_to_string")
    slow = SimpleNamespace(**{name: getattr(fast, name) for name in names}, decode=lambda ids: names[ids[0]])
    before = photograph(base)
    with pytest.raises(AttachError, match="memory needs a tokenizer that leaves out ids it does not know"):
        vismem.attach(base.model, SimpleNamespace(tokenizer=slow))
    with pytest.raises(AttachError, match="what AutoProcessor"):
        vismem.attach(base.model, fast)
    assert same(before, photograph(base))


@pytest.mark.parametrize("make", [tied, mini])
def test_off_restores_what_was_before(make: Any) -> None:
    base = make()
    memory = base.attach()
    with pytest.raises(RuntimeError), memory.off(), memory.off():
        raise RuntimeError
    assert memory.enabled
    with pytest.raises(RuntimeError), memory.triggered("never"):
        raise RuntimeError
    assert memory.trigger == "anywhere:0.3"
