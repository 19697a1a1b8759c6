"""What the generic backbone finds, what it refuses, and that it comes last."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from model_types import build
from survey import contract
from torch import nn
from transformers import LlavaConfig, Mistral3Config
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import vismem_core as vismem
from vismem_backbones.generic import Generic
from vismem_core.base.backbone import head_of
from vismem_core.base.families import find_backbone
from vismem_core.base.loading import backbone_of
from vismem_core.base.vision import VisionStates
from vismem_core.config import FormerConfig, MemoryConfig
from vismem_core.decoding.replay import read_prompts
from vismem_core.errors import AttachError
from vismem_core.plugins import Registry, registry


def test_a_familys_own_adapter_wins() -> None:
    for make in (tiny.qwen, tiny.llava, tiny.internvl):
        model, _ = make()
        assert Generic.matches(model)
        assert find_backbone(model) is not Generic
        assert find_backbone(model, "generic") is Generic


def test_it_comes_last_wherever_it_was_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = sorted(registry("backbones").entries(), key=lambda entry: entry.name != "generic")
    assert entries[0].name == "generic"
    monkeypatch.setattr("vismem_core.memory.memory.registry", lambda kind: Registry(kind, entries))
    model, processor = tiny.llava()
    assert find_backbone(model).name == "llava"
    model.config.vision_config.model_type = "of no family"
    assert find_backbone(model)(model, processor).name == "generic"


def test_it_is_found_by_the_type_of_a_checkpoint(tmp_path: Path) -> None:
    for config, name in ((Mistral3Config(), "generic"), (LlavaConfig(), "llava")):
        config.save_pretrained(tmp_path)
        assert backbone_of(str(tmp_path))[1] == name


def test_it_says_what_it_found() -> None:
    backbone = Generic(*tiny.internvl())
    assert backbone.found == {
        "language model": "model.language_model",
        "vision encoder": "model.vision_tower",
        "blocks": "2 in model.vision_tower.encoder.layer",
        "projector": "reads block 1, 4 patches to a token",
    }
    assert Generic(*tiny.llava()).found["projector"] == "reads block 1, 1 patches to a token"


@pytest.mark.parametrize("make", [tiny.llava, tiny.internvl, tiny.qwen])
@torch.no_grad()
def test_it_carries_and_projects_as_the_familys_own_adapter_does(make: Any) -> None:
    model, processor = make()
    own, generic = find_backbone(model)(model, processor), Generic(model, processor)
    inputs = own.inputs(["what ?", "a boot ?"], [[tiny.picture(32, 32, 0)], [tiny.picture(24, 56, 1)]])
    found = []
    for backbone in (own, generic):
        states = VisionStates()
        with backbone.record(states, keep=True, inputs=False):
            model(**inputs)
        counts = [(inputs["input_ids"] == token).sum(-1).tolist() for token in own.placeholders.values()]
        states.assign(counts)
        torch.manual_seed(0)
        extra = torch.randn(2, 4 * own.merge, own.vision_width)
        carried = backbone.carry(extra, states, [1, 0])
        found.append((carried, backbone.project(carried)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert own.merge == generic.merge


def refused(reason: str, model: Any, processor: Any) -> None:
    with pytest.raises(AttachError, match=rf"cannot work with model type .*: .*{reason}") as failure:
        vismem.attach(model, processor, backbone="generic")
    assert "\n" not in str(failure.value)


def test_refusals_name_the_reason() -> None:
    model, processor = tiny.llava()
    model.config.is_encoder_decoder = True
    refused("it is an encoder-decoder", model, processor)

    model, processor = tiny.llava()
    processor.chat_template = None
    refused("its processor makes no inputs of a blank image", model, processor)


def test_without_a_way_through_the_encoder_short_memory_stands_alone() -> None:
    model, processor = tiny.llava()
    model.model.multi_modal_projector = Mixing(model.model.multi_modal_projector)
    why = "its projector makes no language token of patches that are its own"
    assert Generic(model, processor).blind == why
    with pytest.warns(UserWarning, match=f"no way through this vision encoder .{why}.: short memory is formed of"):
        memory = vismem.attach(model, processor, backbone="generic")
    assert type(memory.short).__name__ == "TransformerFormer" and memory.config.short.name == "transformer"
    assert type(memory.long).__name__ == "LanguageLora"


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("qwen3_vl", {"long": FormerConfig(length=16, context="recompute")}, r"use memory\.long\.context=cache"),
        ("gemma3", {"long": FormerConfig(length=16, context="recompute")}, r"use memory\.long\.context=cache"),
        ("qwen3_5", {"drop_image_after_invocation": True}, r"images cannot leave the states of 'qwen3_5'"),
    ],
)
def test_settings_that_layers_cannot_follow(model_type: str, settings: dict[str, Any], reason: str) -> None:
    model, processor = build(model_type)
    with pytest.raises(AttachError, match=reason):
        vismem.attach(model, processor, config=MemoryConfig(**settings))
    vismem.attach(model, processor).detach()  # nothing was left behind


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gemma4", "its language model takes more than embeddings: per_layer_inputs"),
        ("llama4", r"its forward\(\) fails on whatever it is given, text too: AttributeError"),
        ("mistral4", "it takes no images"),
        ("nemotron_h_omni", "without the least time step that longer passes have"),
        ("minimax_m3_vl", "cuts its sparse attention into blocks by columns"),
        ("unlimited_ocr", "shows padded prompts their padding"),
        ("janus", r"its class has a generate\(\) of its own"),
        ("hunyuan_vl", "other positions in a batch than alone"),
    ],
)
def test_types_that_would_break_a_promise(model_type: str, reason: str) -> None:
    model, processor = build(model_type)
    before = {name: id(module) for name, module in model.named_modules()}
    refused(reason, model, processor)
    assert {name: id(module) for name, module in model.named_modules()} == before


@torch.no_grad()
def test_logits_that_the_model_scales_down() -> None:
    model, processor = build("granite_docling")
    backbone = Generic(model, processor)
    told = model(**backbone.inputs(["a boot ?"]), output_hidden_states=True)
    assert model.config.get_text_config().logits_scaling != 1
    torch.testing.assert_close(backbone.logits(told.hidden_states[-1]), told.logits)


@torch.no_grad()
def test_logits_that_the_model_rules_out() -> None:
    model, processor = build("chameleon")
    backbone = Generic(model, processor)
    told = model(**backbone.inputs(["a boot ?"]), output_hidden_states=True)
    images = model.model.vocabulary_mapping.image_tokens
    assert (told.logits[..., images] == torch.finfo(told.logits.dtype).min).all()
    assert backbone.logits(told.hidden_states[-1]).equal(told.logits)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["granite4_vision", "chameleon"])
def test_visual_tokens_that_enter_behind_the_embeddings(model_type: str) -> None:
    model, processor = build(model_type)
    memory = vismem.attach(model, processor, config=MemoryConfig())
    inputs = memory.backbone.inputs(["a boot ?", "?"], [[tiny.picture(32, 32, 0)], [tiny.picture(24, 56, 1)]])
    names = inspect.signature(model.model.get_image_features).parameters
    made = model.model.get_image_features(**{name: own for name, own in inputs.items() if name in names})
    # Granite's first layer adds its own to nothing.
    expected = dict(made.deepstack_features)[0] if model_type == "granite4_vision" else made.pooler_output
    found, seen = read_prompts(memory, inputs).session.visual([0, 1])
    for row, own in enumerate(expected):
        torch.testing.assert_close(found[row, seen[row]], own)
    assert not memory.backbone.rereads


@torch.no_grad()
def test_a_base_whose_last_bits_hang_on_what_needs_gradients() -> None:
    """torch multiplies by a weight that needs gradients in another order, without gradients too."""
    model, processor = build("cohere2_vision")
    backbone = Generic(model, processor)
    inputs = backbone.inputs(["a boot ?", "?"], [[tiny.picture(16, 16, 0)], [tiny.picture(16, 16, 1)]])
    plain = {}
    for needed in (False, True):
        model.requires_grad_(needed)
        plain[needed] = model(**inputs).logits
    memory = vismem.attach(model, processor)
    assert all(own.requires_grad for name, own in model.named_parameters() if "vismem" not in name)
    with memory.off():
        assert model(**inputs).logits.equal(plain[True])
        memory.freeze()
        assert model(**inputs).logits.equal(plain[False])
    memory.detach()
    assert model(**inputs).logits.equal(plain[True])


@pytest.mark.parametrize("check", ["ragged_insertion_equals_one_pass", "rows_alone_and_together"])
def test_chunks_of_attention_count_from_each_rows_own_beginning(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whose own class of outputs lacks what it reads of it.
    monkeypatch.setattr(MoeCausalLMOutputWithPast, "image_outputs", None, raising=False)
    suite = contract("generic", "llama4")
    base = suite.base()
    lengths = base.inputs(*suite.questions())["attention_mask"].sum(-1)
    assert base.model.config.text_config.attention_chunk_size < lengths.min()
    settings = {"context": "cache"} if check.startswith("rows") else {}
    getattr(suite, f"test_{check}")(**settings, packs=False)


def test_a_head_that_the_language_model_alone_knows() -> None:
    model, _ = build("nemotron_h_omni")
    assert model.get_output_embeddings() is None
    assert head_of(model) is model.language_model.lm_head


class Mixing(nn.Module):
    """A projector in which all patches meet."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, patches: torch.Tensor) -> Any:
        return self.inner(patches + patches.mean(1, keepdim=True))
