"""``forward`` on sequences that hold memory tokens: what decoding had, whoever asks and however they are padded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, mini, tied, untied
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache

import vismem_core as vismem
from vismem_core.decoding.forward import UNLIKELY, forward
from vismem_core.errors import AttachError
from vismem_core.memory.memory import Memory

EAGER = {"trigger": "policy", "distance": 1}


def asking(base: Base, **settings: Any) -> Memory:
    """Memory whose policy asks often."""
    memory = base.attach(config(**(EAGER | settings)))
    with torch.no_grad():
        memory.tokens.head.mul_(1.5)
    return memory


def written(base: Base, **options: Any) -> tuple[Any, dict[str, Any], int]:
    """An answered batch, as sequences for ``forward``, and where answers begin in it."""
    output = base.generate(*QUESTIONS, **{"max_new_tokens": 20, "do_sample": False} | options)
    inputs, ids = dict(base.inputs(*QUESTIONS)), output.answers
    told = base.model.generation_config.eos_token_id
    ended = torch.isin(ids, torch.tensor(told if isinstance(told, list) else [-1 if told is None else told]))
    real = (ended.cumsum(1) - ended.long() == 0).long()
    begin = inputs["input_ids"].shape[1]
    for name, tail in (("attention_mask", real), ("mm_token_type_ids", 0 * real), ("token_type_ids", 0 * real)):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], tail.to(inputs[name])], dim=1)
    return output, inputs | {"input_ids": output.sequences}, begin


def scores(output: Any) -> Tensor:
    """What decoding chose from, (B, A, W), with finite numbers for what could not be."""
    return torch.stack(output.scores, dim=1).clamp(min=UNLIKELY).log_softmax(-1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"context": "recompute"}, {"drop_image_after_invocation": True}, {"trigger": "schedule:0=long,6=short"}],
    ids=str,
)
@pytest.mark.parametrize("make", [untied, mini])
def test_logits_are_those_of_the_decoding(make: Callable[[], Base], settings: dict[str, Any]) -> None:
    base = make()
    memory = asking(base, **settings)
    output, inputs, begin = written(base)
    assert len(memory.trace)
    with torch.no_grad():
        told = forward(memory, **inputs, finished=True).logits
        assert told.shape == (*inputs["input_ids"].shape, memory.tokens.width)
        real = inputs["attention_mask"][:, begin:].bool()
        got = told[:, begin - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(got[real], scores(output)[real], atol=2e-4, rtol=1e-4)
        whole = base.model(**inputs).logits
        torch.testing.assert_close(whole[:, begin - 1 : -4], told[:, begin - 1 : -4])
        for keep in (5, torch.tensor([begin, begin + 3])):
            part = base.model(**inputs, logits_to_keep=keep).logits
            torch.testing.assert_close(part, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep])
        trace = memory.trace
        with memory.recalled(trace):
            torch.testing.assert_close(forward(memory, **inputs, finished=True).logits, told, atol=2e-4, rtol=1e-4)
        for own in trace.invocations:  # what is recorded is used
            own.latents.zero_()
        with memory.recalled(trace):
            assert not torch.allclose(forward(memory, **inputs, finished=True).logits, told, atol=1e-2)


@pytest.mark.parametrize("trigger", ["never", "policy@short"])
def test_the_trigger_does_not_say_what_a_sequence_holds(trigger: str) -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=long,4=short"))
    _, inputs, _ = written(base)
    expected = base.model(**inputs).logits[..., : memory.tokens.first]
    memory.trigger = trigger
    told = base.model(**inputs).logits[..., : memory.tokens.first]
    free = (expected > UNLIKELY).any(-1) & (told > UNLIKELY).any(-1)
    assert free.float().mean() > 0.8
    torch.testing.assert_close(told[free], expected[free])


def test_padding_on_either_side_is_the_same() -> None:
    base = tied()
    asking(base)
    _, inputs, begin = written(base)
    kept = inputs["attention_mask"].bool()
    order = (~kept).int().argsort(dim=1, stable=True)
    moved = {name: own.gather(1, order) if own.shape == kept.shape else own for name, own in inputs.items()}
    assert not moved["attention_mask"].equal(inputs["attention_mask"])
    with torch.no_grad():
        left, right = base.model(**inputs).logits, base.model(**moved).logits
    for row in range(len(QUESTIONS)):
        count = int(kept[row].sum())
        torch.testing.assert_close(right[row, :count], left[row, kept[row]], atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_likelihood_of_what_was_free() -> None:
    base = tied()
    memory = asking(base, trigger="policy")
    output, inputs, begin = written(base)
    labels = inputs["input_ids"].clone()
    labels[:, :begin] = -100
    with torch.no_grad():
        loss = base.model(**inputs, labels=labels).loss
        told = forward(memory, **inputs).logits[:, begin - 1 : -1]
    own = told.log_softmax(-1).gather(2, output.answers[..., None]).squeeze(2)
    free = (told > UNLIKELY).sum(-1) > 1
    assert (~free).sum() == len(memory.trace) and own[~free].eq(0).all()
    torch.testing.assert_close(loss, -own[free].mean())
    counted = base.model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7.0)).loss
    torch.testing.assert_close(counted, -own[free].sum() / 7)


def steep(tensor: Tensor) -> float:
    return 0.0 if tensor.grad is None else float(tensor.grad.abs().sum())


@pytest.mark.parametrize("kind", ["short", "long"])
def test_gradients_of_formation_are_those_of_small_steps(kind: str) -> None:
    base = tied()
    memory = base.attach(config(trigger=f"schedule:0={kind}"))
    _, inputs, begin = written(base, max_new_tokens=6)
    labels = inputs["input_ids"].clone()
    labels[:, :begin] = -100
    base.model(**inputs, labels=labels).loss.backward()
    for name in (f"{kind}.adapter.", "builder."):
        tensor = max((own for key, own in memory.trained().items() if key.startswith(name)), key=steep)
        direction, step, losses = tensor.grad / tensor.grad.norm(), 3e-3, []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(direction, alpha=sign * step)
                losses.append(base.model(**inputs, labels=labels).loss)
                tensor.add_(direction, alpha=-sign * step)
        slope = (tensor.grad * direction).sum()
        assert slope > 1e-3
        torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), slope, rtol=5e-2, atol=0.0)


def test_other_sequences_are_the_bases() -> None:
    base = tied()
    inputs = base.inputs(*QUESTIONS)
    plain = base.model(**inputs, labels=inputs["input_ids"])
    memory = asking(base)
    told = base.model(**inputs, labels=inputs["input_ids"])
    assert told.logits.equal(plain.logits) and told.loss.equal(plain.loss)
    _, sequences, _ = written(base)
    assert base.model(**sequences).logits.shape[-1] != plain.logits.shape[-1]
    memory.detach()
    assert base.model(**inputs).logits.equal(plain.logits)


def test_gradients_reach_an_open_base_and_a_frozen_one_gets_none() -> None:
    base = tied()
    memory = asking(base)
    _, inputs, _ = written(base)
    base.model(**inputs, labels=inputs["input_ids"]).loss.backward()
    weight = base.model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.grad is not None and all(own.grad is not None for own in memory.trained().values())
    model = vismem.trainable(memory)
    weight.grad = None
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert weight.grad is None
    memory.detach()
    assert weight.requires_grad


def test_checkpointing_changes_no_gradient() -> None:
    base = tied()
    memory = asking(base)
    _, inputs, _ = written(base)
    found = []
    for way in ("plain", "ours", "the model's"):
        base.model.train(way == "the model's")
        if way == "the model's":
            base.model.gradient_checkpointing_enable()
        for own in memory.trained().values():
            own.grad = None
        loss = forward(memory, **inputs, labels=inputs["input_ids"], checkpointing=way == "ours").loss
        loss.backward()
        found.append([own.grad.clone() for own in memory.trained().values()])
    assert base.model.is_gradient_checkpointing
    for other in found[1:]:
        for one, own in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, own, atol=1e-5, rtol=1e-4)


def refused(base: Base, inputs: dict[str, Any], told: str, **more: Any) -> None:
    with pytest.raises(AttachError, match=told):
        base.model(**(inputs | more))


def test_what_cannot_be_is_said() -> None:
    base = tied()
    memory = asking(base)
    _, inputs, begin = written(base)
    with memory.off():
        refused(base, inputs, "the sequence holds memory tokens, which the base model does not know")
    refused(base, inputs, "takes no position_ids", position_ids=torch.zeros_like(inputs["input_ids"]))
    refused(base, inputs, "takes no output_hidden_states", output_hidden_states=True)
    ids = inputs["input_ids"].clone()
    images = ids == base.model.config.image_token_id
    ids[0, -1] = base.model.config.image_token_id  # written as a token like any other
    assert base.model(**(inputs | {"input_ids": ids})).logits.shape[1] == ids.shape[1]
    ids[0, images[0].nonzero()[0]] = 0  # a picture's place, in the answer
    refused(base, inputs | {"input_ids": ids}, "row 0: an image stands behind the beginning of the answer")
    with memory.recalled(vismem.Trace()):
        refused(base, inputs, "the trace has no latents for the invocation at")
    for text, odd in (
        ("<ms_I> a", "<ms_I> at id 0 is not followed by its end token"),
        ("<ms_I><ml_E> a", "<ms_I> at id 0 is not followed by its end token"),
        ("<ms_E> a", "<ms_E> at id 0 ends nothing"),
    ):
        refused(base, {"input_ids": torch.tensor([memory.encode(text)])}, f"row 0: {odd}")
    cache = DynamicCache(config=base.model.config.get_text_config())
    cache.update(*torch.zeros(2, 1, 2, 1, 8), 0)
    for name in ("past_key_values", "cache"):
        refused(base, inputs, f"takes no {name}: pass the whole of it", **{name: cache})
    bare = memory.encode("a bag <ms_I><ms_E> boot")
    alone = torch.tensor([bare])
    refused(base, {"input_ids": alone}, "row 0: nothing says where the answer begins")
    labels = alone.clone()
    labels[0, :1] = -100
    assert base.model(input_ids=alone, labels=labels).loss.isfinite()
    assert base.model(input_ids=alone, logits_to_keep=len(bare)).logits.shape[1] == len(bare)
    with pytest.raises(AttachError, match=r"memory tokens came to Qwen2_5_VLModel past model\.forward"):
        base.model.model(**inputs)


def test_a_trainer_that_can_train_nothing_hears_of_it_once() -> None:
    base = tied()
    memory = asking(base)
    _, inputs, _ = written(base)
    base.model.requires_grad_(False).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            base.model(**inputs, labels=inputs["input_ids"])
    told = [str(own.message) for own in caught if "trainable" in str(own.message)]
    rest = (
        ", and its memory's are not among them: to train memory, give the trainer "
        "vismem_core.trainable(memory) instead of the model"
    )
    assert told == ["no parameter of this model trains" + rest]
    base.model.requires_grad_(True)
    with pytest.warns(UserWarning, match="the base's own parameters train here, and its memory's are not among them"):
        base.model(**inputs, labels=inputs["input_ids"])
    base.model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"])).train()
        base.model(**inputs, labels=inputs["input_ids"])
    memory.detach()
