"""Gemma 3, 3n and 4: what comes with tokens beside their embeddings, and layers that read what earlier ones keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config
from model_types import build
from replays import gradients, told
from transformers import CONFIG_MAPPING

from vismem_backbones.gemma import Gemma3, Gemma3n, Gemma4, PaliGemma
from vismem_core import attach
from vismem_core.base.backbone import NO_TOKEN
from vismem_core.base.outlook import outlook
from vismem_core.decoding.replay import read_prompts
from vismem_core.errors import AttachError
from vismem_core.memory.tokens import delimiter_ids
from vismem_core.testing.reference import listening
from vismem_core.training.replay import TrajectoryReplay

FAMILIES = {
    "gemma3": Gemma3,
    "shieldgemma2": Gemma3,
    "paligemma": PaliGemma,
    "gemma4": Gemma4,
    "gemma4_unified": Gemma4,
    "gemma3n": Gemma3n,
}
BLIND = ("gemma4_unified", "gemma3n")
LAYERED = ("gemma4", "gemma3n")
"""Those that look tokens up once more for each layer."""


@pytest.mark.filterwarnings("ignore:extra tokens have no way")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_is_found_by_the_model_and_by_its_configuration(model_type: str, tmp_path: Path) -> None:
    memory = attach(*build(model_type))
    assert type(memory.backbone) is FAMILIES[model_type]
    assert bool(memory.backbone.blind) == (model_type in BLIND)
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    found = outlook(str(tmp_path))
    assert found.backbone == FAMILIES[model_type].name and found.attaches
    refused = {"memory.long.context=recompute"} | ({"memory.short.name=lora"} if model_type in BLIND else set())
    assert set(found.without) == refused
    memory.detach()
    with pytest.raises(AttachError, match=r"memory\.long\.context=cache"):
        attach(memory.model, memory.backbone.processor, config=config(context="recompute"))


@pytest.mark.parametrize("model_type", LAYERED)
def test_what_is_no_token_gets_what_the_model_gives_images(model_type: str) -> None:
    model, processor = build(model_type)
    backbone = FAMILIES[model_type](model, processor)
    inputs = backbone.inputs([QUESTIONS[0][0]], [QUESTIONS[0][1]])
    ids = inputs["input_ids"]
    with torch.no_grad(), listening(backbone) as heard:
        model(**inputs)
    given = heard.beside[0]["per_layer_inputs"]
    assert backbone.companions(ids)["per_layer_inputs"].equal(given)
    image = ids == backbone.placeholders["image"]
    text = int((~image)[0].nonzero()[0])
    assert (given[image] == given[image][0]).all() and not given[0, text].equal(given[image][0])
    beyond = len(backbone.embeddings.weight) + 3  # where memory's ids are
    nothing = backbone.companions(torch.tensor([[NO_TOKEN, beyond]]))["per_layer_inputs"]
    assert (nothing == given[image][0]).all()


@pytest.mark.filterwarnings("ignore:extra tokens have no way")
@pytest.mark.parametrize("model_type", LAYERED)
def test_memory_tokens_in_a_prompt_are_read_as_tokens(model_type: str) -> None:
    """By their own rows, and with what comes with no token; text around them as it is."""
    memory = Base(*build(model_type)).attach()
    first, backbone = memory.tokens.first, memory.backbone
    ids = torch.tensor([[5, first, first + 2, 6, first + 1, first + 3, 7]])
    plain = torch.tensor([[5, 5, 5, 6, 6, 6, 7]])
    with memory.triggered("schedule:99=long"), listening(backbone) as heard:
        memory.model.generate(input_ids=ids, max_new_tokens=1, do_sample=False)
    with memory.off(), listening(backbone) as base, torch.no_grad():
        memory.model(input_ids=plain)
    mine = memory.tokens.contains(ids)
    rows = torch.cat([memory.tokens.invoke, memory.tokens.close])
    assert heard.embeds[0][mine].equal(rows[ids[mine] - first])
    assert heard.embeds[0][~mine].equal(base.embeds[0][~mine])
    given = heard.beside[0]["per_layer_inputs"]
    assert given[~mine].equal(base.beside[0]["per_layer_inputs"][~mine])
    assert given.equal(backbone.companions(ids.masked_fill(mine, NO_TOKEN))["per_layer_inputs"])


def test_words_of_the_encoders_enter_as_the_model_embeds_them() -> None:
    """Gemma 3n has rows of their own for what begins and ends an image and a sound; ids follow the text's."""
    model, processor = build("gemma3n")
    backbone, (vision, audio) = Gemma3n(model, processor), (model.model.embed_vision, model.model.embed_audio)
    ids = torch.tensor([[3, vision.vocab_offset + 1, 4, audio.vocab_offset + 2]])
    with torch.no_grad(), listening(backbone) as heard:
        model(input_ids=ids)
        assert heard.embeds[0].equal(backbone.embed(ids))
        assert not heard.embeds[0].equal(backbone.embeddings(ids))


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4"])
def test_memory_begins_at_the_size_of_what_tokens_enter_as(model_type: str) -> None:
    """Tables are multiplied where they are looked up."""
    memory = attach(*build(model_type))
    table = memory.backbone.embeddings
    factor = table.weight.shape[1] ** 0.5
    assert memory.backbone.embedding_scale() == pytest.approx(factor * float(table.weight.pow(2).mean().sqrt()))
    delimiter = delimiter_ids(memory.backbone.processor.tokenizer, memory.config.delimiters)[0]
    for row in (*memory.tokens.invoke, *memory.tokens.close):
        torch.testing.assert_close(row, factor * table.weight[delimiter], rtol=0.2, atol=0.2)


def test_prompts_are_read_to_the_end_of_every_layer() -> None:
    """The last layers of Gemma 4 compute the last token alone where a number of logits is asked for."""
    memory = attach(*build("gemma4"))
    inputs = memory.backbone.inputs([text for text, _ in QUESTIONS], [images for _, images in QUESTIONS])
    assert read_prompts(memory, inputs).session.hidden.shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4"])
def test_layers_may_be_computed_again(model_type: str) -> None:
    """Where some read what an earlier one gave, too: the same numbers and gradients."""
    memory = Base(*build(model_type)).attach(config(trigger="policy"))
    read, trajectories = told(memory, "anywhere:0.2", 1.0)
    assert sum(len(own.latents) for own in trajectories) > 4
    found = []
    for again in (False, True):
        logprobs = TrajectoryReplay(memory, read, trajectories[:3], 1.0, again).logprobs(form=True)
        found.append((logprobs.detach(), gradients(memory, logprobs.sum())))
    (plain, slopes), (again_, same) = found
    torch.testing.assert_close(again_, plain)
    assert slopes.keys() == same.keys() and any(name.startswith("long.") for name in slopes)
    for name, own in slopes.items():
        torch.testing.assert_close(same[name], own, rtol=1e-3, atol=1e-4 * float(own.abs().max()) + 1e-6)


@pytest.mark.filterwarnings("ignore:extra tokens have no way")
@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "gemma3n"])
def test_half_precision(model_type: str) -> None:
    base = Base(*build(model_type))
    base.model.to(torch.bfloat16)
    memory = base.attach()
    memory.trigger = "schedule:0=long,3=short,8=long"
    output: Any = base.generate(*QUESTIONS, max_new_tokens=12, eos_token_id=None)
    assert len(memory.trace) == 3 * len(QUESTIONS)
    assert all(own.latents.isfinite().all() for own in memory.trace.invocations)
    assert {own.latents.dtype for own in memory.trace.invocations} == {torch.bfloat16}
    assert all(logits[:, : memory.tokens.first].isfinite().all() for logits in output.logits)
