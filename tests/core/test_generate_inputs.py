"""Promise 4: every way to call ``generate``, and the ways that memory refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from bases import QUESTIONS, Base, config, tied
from reference import one_pass, query, short_latents
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from vismem_core.errors import AttachError


def test_positional_and_configured() -> None:
    base = tied()
    memory = base.attach()
    inputs = dict(base.inputs(*QUESTIONS))
    expected = base.model.generate(**inputs, max_new_tokens=12, repetition_penalty=1.2)
    traces = [memory.trace]
    ids = inputs.pop("input_ids")
    settings = GenerationConfig(max_new_tokens=12, repetition_penalty=1.2)
    for call in (
        lambda: base.model.generate(ids, max_new_tokens=12, repetition_penalty=1.2, **inputs),
        lambda: base.model.generate(ids, settings, **inputs),
        lambda: base.model.generate(inputs=ids, generation_config=settings, **inputs),
    ):
        assert call().equal(expected)
        traces.append(memory.trace)
    assert len(traces[0])
    assert all(trace == traces[0] for trace in traces)


def test_text_without_a_mask() -> None:
    base = tied()
    base.attach()
    inputs = base.inputs(QUESTIONS[2])
    with_mask = base.model.generate(**inputs, max_new_tokens=12)
    assert base.model.generate(inputs["input_ids"], max_new_tokens=12).equal(with_mask)


def video_inputs(base: Base) -> Any:
    """A row with two images and a video between them, and a row with a video of another size."""
    image, video = (f"<|vision_start|><|{medium}_pad|><|vision_end|>" for medium in ("image", "video"))
    texts = [f"{image} a {video}{image} what ?", f"{video} is it a bag ?"]
    videos = [
        torch.stack([pil_to_tensor(tiny.picture(width, height, seed + frame)) for frame in range(4)])
        for width, height, seed in [(16, 32, 20), (32, 24, 30)]
    ]
    return base.processor(
        text=texts,
        images=[[tiny.picture(32, 16, 1), tiny.picture(16, 24, 2)]],
        videos=videos,
        videos_kwargs={"do_sample_frames": False},
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def only_row(inputs: Any, row: int) -> dict[str, Any]:
    """One row of :func:`video_inputs` by itself."""
    kept = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, kept] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    videos = inputs["video_grid_thw"].prod(-1).tolist()
    alone["pixel_values_videos"] = inputs["pixel_values_videos"].split(videos)[row]
    alone["video_grid_thw"] = inputs["video_grid_thw"][row : row + 1]
    if "second_per_grid_ts" in inputs:
        alone["second_per_grid_ts"] = inputs["second_per_grid_ts"][row : row + 1]
    if row == 0:
        alone |= {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    return alone


@pytest.mark.parametrize("context", ["cache", "recompute"])
@pytest.mark.parametrize("copies", [1, 2])
def test_videos_and_images(context: str, copies: int) -> None:
    base = tied()
    pristine = copy.deepcopy(base.model)
    memory = base.attach(config(context=context, trigger="schedule:1=short,5=long"))
    inputs = video_inputs(base)
    output = base.model.generate(
        **inputs,
        max_new_tokens=10,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        do_sample=copies > 1,
        num_return_sequences=copies,
    )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    for row, answer in enumerate(answers):
        alone = only_row(inputs, row // copies)
        sequence = one_pass(memory, alone, answer, row)
        got = torch.stack([step[row, : sequence.logits.shape[1]] for step in output.logits])
        torch.testing.assert_close(got, sequence.logits, atol=1e-4, rtol=1e-4)
        asked = query(memory, sequence, sequence.places[0], sequence.places[1])
        expected = short_latents(pristine, memory, alone, asked, context)
        torch.testing.assert_close(memory.trace.row(row)[0].latents, expected, atol=1e-4, rtol=1e-3)


def test_a_second_turn_after_memory() -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=long,5=short"))
    first = base.generate(QUESTIONS[0], max_new_tokens=8, eos_token_id=None)
    inputs = base.inputs(QUESTIONS[0])
    more = base.processor.tokenizer(" and a coat ?", return_tensors="pt")["input_ids"]
    inputs["input_ids"] = torch.cat([first.sequences, more], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    grown = inputs["input_ids"].shape[1] - inputs["mm_token_type_ids"].shape[1]
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, grown))
    assert memory.tokens.contains(inputs["input_ids"]).sum() == 4
    for spec, count in (("schedule:0=long,5=short", 2), ("never", 0)):
        memory.trigger = spec
        output = base.model.generate(
            **inputs, max_new_tokens=8, repetition_penalty=1.2, output_logits=True, return_dict_in_generate=True
        )
        answer = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert len(memory.trace) == count
        expected = one_pass(memory, inputs, answer)
        got = torch.cat(output.logits)[:, : expected.logits.shape[1]]
        torch.testing.assert_close(got, expected.logits, atol=1e-4, rtol=1e-4)
    with memory.off(), pytest.raises(AttachError, match="the prompt holds memory tokens"):
        base.model.generate(**inputs)


def test_text_that_spells_the_tokens_is_text() -> None:
    base = tied()
    question = ("a <ml_I><ml_E> b ?", [])
    plain = base.inputs(question)["input_ids"]
    memory = base.attach()
    assert base.inputs(question)["input_ids"].equal(plain)
    ids = memory.encode("a <ml_I><ml_E> b ?")
    assert [token for token in ids if token >= memory.tokens.first] == [
        memory.tokens.invocation("long"),
        memory.tokens.end("long"),
    ]
    assert memory.decode(ids) == "a <ml_I><ml_E> b ?"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 3}, "not with beam search"),
    ({"num_beams": 2, "do_sample": True}, "not with beam sample"),
    ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
    ({"assistant_model": ...}, "assistant_model"),
    ({"custom_generate": lambda model, input_ids, **kwargs: input_ids}, "custom_generate"),
    ({"use_cache": False}, "use_cache=True"),
    ({"past_key_values": ...}, "past_key_values"),
    ({"generation_config": GenerationConfig(num_beams=2)}, "not with beam search"),
    ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)}, "not with assisted generation"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[f"{options}"[:28] for options, _ in REFUSED])
def test_refused_with_memory_and_fine_without(options: dict[str, Any], message: str) -> None:
    base = tied()
    inputs = base.inputs(QUESTIONS[2])

    def call() -> Any:
        own = dict(options)
        if "assistant_model" in own:
            own["assistant_model"] = tied(seed=1).model
        if "past_key_values" in own:
            own["past_key_values"] = DynamicCache()
            base.model(input_ids=inputs["input_ids"][:, :4], past_key_values=own["past_key_values"])
        torch.manual_seed(0)
        return base.model.generate(**inputs, max_new_tokens=6, **own)

    expected = call()
    memory = base.attach()
    with pytest.raises(AttachError, match=message):
        call()
    with memory.off():
        assert call().equal(expected)
    memory.trigger = "never"
    assert call().equal(expected)
    assert base.model.generate(**inputs, max_new_tokens=6).shape[0] == 1  # a refusal breaks nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"generation_config": GenerationConfig(cache_implementation="paged")}, "continuous batching"),
        ({"prefill_chunk_size": 4}, "one piece"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    base = tied()
    base.attach()
    with pytest.raises(AttachError, match=message):
        base.model.generate(**base.inputs(QUESTIONS[2]), max_new_tokens=6, **options)


def test_embeddings_instead_of_ids() -> None:
    base = tied()
    memory = base.attach()
    embeds = base.model.get_input_embeddings()(base.inputs(QUESTIONS[2])["input_ids"])
    with pytest.raises(AttachError, match="memory needs the prompt's input_ids"):
        base.model.generate(inputs_embeds=embeds, max_new_tokens=6)
    with memory.off():
        assert base.model.generate(inputs_embeds=embeds, max_new_tokens=6).shape[1] == 6


def test_going_on_from_a_cache_without_memory() -> None:
    """With memory off, a cache that took in latents is one like any other."""
    base = tied()
    memory = base.attach(config(trigger="schedule:1=long"))
    first = base.generate(QUESTIONS[2], max_new_tokens=6, eos_token_id=None)
    cache, new = first.past_key_values, first.sequences[:, -1:]
    width = cache.get_seq_length() + 1
    kwargs = {"attention_mask": torch.ones(1, width, dtype=torch.long), "max_new_tokens": 4, "eos_token_id": None}
    with memory.off():
        more = base.model.generate(new, past_key_values=cache, **kwargs)
    whole = base.generate(QUESTIONS[2], max_new_tokens=10, eos_token_id=None)
    assert more[0, 1:].tolist() == whole.answers[0, 6:].tolist()


def test_a_chat_template_without_images_is_told_in_one_line() -> None:
    base = tied()
    base.processor.chat_template = "{% for message in messages %}{{ message.content[-1].text }}{% endfor %}"
    with pytest.raises(AttachError, match=r"^the processor takes no such prompts and images: \S+Error: [^\n]+$"):
        base.inputs(QUESTIONS[0])
    base.processor.chat_template = None
    with pytest.raises(AttachError, match="chat template"):
        base.inputs(QUESTIONS[0])


def test_prompts_padded_on_the_right_are_refused() -> None:
    base = tied()
    base.attach()
    inputs = base.inputs(*QUESTIONS[:2])
    wrong: dict[str, Any] = {}
    for name, own in inputs.items():
        if own.shape == inputs["input_ids"].shape:
            pieces = [(row[~seen], row[seen]) for row, seen in zip(own, inputs["attention_mask"].bool(), strict=True)]
            wrong[name] = torch.stack([torch.cat([told, padding]) for padding, told in pieces])
    with pytest.raises(AttachError, match=r"padded on the left: set tokenizer.padding_side"):
        base.model.generate(**dict(inputs) | wrong, max_new_tokens=4)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_ropes_that_depend_on_earlier_calls_are_refused(rope: str) -> None:
    base = tied()
    base.model.config.text_config.rope_parameters["rope_type"] = rope
    with pytest.raises(AttachError, match=f"rope_type '{rope}' hang on the lengths"):
        base.attach()


class Once(StoppingCriteria):  # type: ignore[misc]
    """True for one step alone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.step -= 1
        return torch.full((len(input_ids),), self.step == -1)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_what_stops_a_row_once_stops_it(step: int) -> None:
    """Also while it invokes memory: then its end token is the last one."""
    base = tied()
    memory = base.attach(config(trigger="schedule:2=short"))
    inputs = base.inputs(QUESTIONS[0])
    told = base.model.generate(**inputs, max_new_tokens=12, stopping_criteria=StoppingCriteriaList([Once(step)]))
    answer = told[0, inputs["input_ids"].shape[1] :].tolist()
    ends = [memory.tokens.invocation("short"), memory.tokens.end("short")]
    assert len(answer) == (4 if step == 2 else step + 1)
    assert answer[2:4] == ends[: len(answer) - 2]
