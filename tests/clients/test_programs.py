"""Programs around a model with memory: what they read, write, resize, constrain and score is the base's, or is said."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, mini, tied
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

import vismem_core as vismem
from vismem_core.errors import AttachError
from vismem_core.memory.memory import Memory
from vismem_plugins.mini import path

NO_END: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}


def asking(base: Base, **settings: Any) -> Memory:
    """Memory whose policy asks often."""
    memory = base.attach(config(**({"trigger": "policy", "distance": 2} | settings)))
    with torch.no_grad():
        memory.tokens.head.mul_(1.5)
    return memory


# Texts and vocabularies


def test_nobodys_text_becomes_an_invocation() -> None:
    base = mini()
    spelt = "what is <ms_I> <ml_E> most frequent ?"
    inputs = base.inputs((spelt, QUESTIONS[0][1]))
    plain = base.model.generate(**inputs, max_new_tokens=4)
    memory = vismem.attach(base.model, base.processor, path("qwen2_5_vl") / "memory")
    asked = memory.backbone.inputs([spelt], [QUESTIONS[0][1]])
    assert all(own.equal(inputs[name]) for name, own in asked.items())
    with memory.off():
        assert base.model.generate(**asked, max_new_tokens=4).equal(plain)
    base.model.generate(**asked, max_new_tokens=8)


def test_a_history_has_no_memory_tokens() -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=short,4=long"))
    ids = base.generate(QUESTIONS[0], **NO_END).answers[0]
    assert len(memory.trace) == 2 and memory.tokens.contains(ids).sum() == 4
    for skip in (True, False):
        text = base.processor.decode(ids, skip_special_tokens=skip)
        assert "<m" not in text
        kept = ids[ids < memory.tokens.first]
        assert text == base.processor.decode(kept, skip_special_tokens=skip)
    assert "<ms_I><ms_E>" in memory.decode(ids)


def test_a_saved_processor_is_the_bases(tmp_path: Path) -> None:
    base = tied()
    base.processor.save_pretrained(tmp_path / "before")
    size = len(base.processor.tokenizer)
    memory = base.attach()
    base.processor.save_pretrained(tmp_path / "during")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "during" / file.name).read_bytes() == file.read_bytes()
    assert len(AutoProcessor.from_pretrained(tmp_path / "during").tokenizer) == size
    assert len(base.processor.tokenizer) == size <= base.model.get_input_embeddings().num_embeddings
    memory.detach()


def test_resizing_is_refused_while_memory_is_there() -> None:
    base = tied()
    rows = base.model.get_input_embeddings().num_embeddings
    memory = asking(base)
    expected = base.generate(*QUESTIONS).sequences
    with pytest.raises(AttachError, match=r"memory\.detach\(\) before resizing"):
        base.model.resize_token_embeddings(rows + 4)
    base.model.resize_token_embeddings(rows)  # nothing to do
    assert base.generate(*QUESTIONS).sequences.equal(expected)
    memory.detach()
    base.model.resize_token_embeddings(rows + 4)
    assert base.model.get_input_embeddings().num_embeddings == rows + 4


# Logits and scores


class Noted(LogitsProcessor):
    """A processor of a user: made for the vocabulary, and it notes what it sees."""

    def __init__(self, width: int) -> None:
        self.bias = torch.linspace(-1, 1, width)
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(input_ids.clone())
        return scores + self.bias


class OnlyFirst(LogitsProcessor):
    """An allow-list of some of the vocabulary."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, float("-inf"))
        mask[:, : self.allowed] = 0
        return scores + mask


def test_processors_of_users_see_the_base() -> None:
    base = tied()
    width = base.model.config.get_text_config().vocab_size
    memory = asking(base)
    noted = Noted(width)
    output = base.generate(*QUESTIONS, logits_processor=LogitsProcessorList([noted]), **NO_END)
    assert len(memory.trace) >= 4
    for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        free = output.answers[:, step] < memory.tokens.first
        assert scores[free, :width].equal((logits[:, :width] + noted.bias)[free])
        assert scores[free, width:].equal(logits[free, width:])
    asked = output.sequences.shape[1] - output.answers.shape[1]
    for step, seen in enumerate(noted.seen):
        sofar = output.sequences[:, : asked + step]
        assert not memory.tokens.contains(seen).any()
        for row, own in zip(sofar, seen, strict=True):
            text = row[row < memory.tokens.first]
            assert own[-len(text) :].equal(text)
            assert own[: -len(text)].eq(own[0]).all()


def test_allow_lists_leave_memory_its_tokens() -> None:
    base = tied()
    memory = asking(base)
    allowed = 40
    for options in (
        {"logits_processor": LogitsProcessorList([OnlyFirst(allowed)])},
        {"prefix_allowed_tokens_fn": lambda row, ids: [*range(allowed), memory.tokens.first]},
    ):
        output = base.generate(*QUESTIONS, **options, **NO_END)
        assert len(memory.trace)
        written = output.answers[~memory.tokens.contains(output.answers)]
        assert (written < allowed).all()


def test_prefix_functions_see_the_text_alone() -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=short,4=long"))
    seen: list[tuple[int, list[int]]] = []

    def allowed(row: int, ids: Tensor) -> list[int]:
        seen.append((row, ids.tolist()))
        return list(range(100))

    output = base.generate(*QUESTIONS[:2], prefix_allowed_tokens_fn=allowed, **NO_END)
    start = output.sequences.shape[1] - output.answers.shape[1]
    assert [row for row, _ in seen[:4]] == [0, 1, 0, 1]
    for at, (row, ids) in enumerate(seen):
        whole = output.sequences[row, : start + at // 2].tolist()
        assert ids == [token for token in whole if token < memory.tokens.first]


def test_grammars_are_kept_and_memory_is_offered() -> None:
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor as Grammar

    base = tied()
    memory = base.attach(config(trigger="schedule:0=short,4=long"))
    tokenizer = base.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    size = base.model.config.get_text_config().vocab_size
    about = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size, stop_token_ids=[end])
    compiled = xgrammar.GrammarCompiler(about).compile_regex("(ab){3}c")
    output = base.generate(QUESTIONS[0], logits_processor=[Grammar(compiled)], eos_token_id=end, pad_token_id=0)
    assert len(memory.trace) == 2
    assert tokenizer.decode(output.answers[0], skip_special_tokens=True) == "abababc"
    with pytest.raises(AttachError, match="memory works with xgrammar one row at a time"):
        base.generate(*QUESTIONS[:2], logits_processor=[Grammar(compiled)])
    with memory.off():
        output = base.generate(QUESTIONS[0], logits_processor=[Grammar(compiled)], eos_token_id=end, pad_token_id=0)
    assert tokenizer.decode(output.answers[0], skip_special_tokens=True) == "abababc"


@pytest.mark.parametrize("normalized", [False, True])
def test_transition_scores(normalized: bool) -> None:
    base = tied()
    memory = asking(base)
    output = base.generate(*QUESTIONS, do_sample=True, temperature=0.8)
    assert len(memory.trace)
    got = base.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=normalized)
    for step, scores in enumerate(output.scores):
        assert scores.shape[1] == memory.tokens.width
        own = scores.log_softmax(-1) if normalized else scores
        for row, token in enumerate(output.answers[:, step].tolist()):
            torch.testing.assert_close(got[row, step], own[row, token])
    beams = base.inputs(QUESTIONS[2])
    with memory.off():
        output = base.model.generate(
            **beams, num_beams=2, max_new_tokens=4, return_dict_in_generate=True, output_scores=True
        )
        got = base.model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    memory.detach()
    assert got.equal(base.model.compute_transition_scores(output.sequences, output.scores, output.beam_indices))


# What keeps memory from being invoked


@pytest.mark.parametrize("length", [1, 2])
def test_no_room_is_counted(length: int) -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=short"))
    base.generate(*QUESTIONS, max_new_tokens=length)
    assert memory.trace.blocked == {"room": len(QUESTIONS)} and len(memory.trace) == 0
    assert memory.trace.why() == (
        "memory was not invoked: max_new_tokens left no room for an invocation and a token after it (4 times)"
    )
    base.generate(*QUESTIONS, max_new_tokens=3)
    assert len(memory.trace) == 4 and memory.trace.why() is None and not memory.trace.blocked


def test_what_a_schedule_could_not_have_is_counted() -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=short,3=long,9=short", distance=4, budget=1))
    base.generate(QUESTIONS[0], **NO_END)
    assert len(memory.trace) == 1 and memory.trace.blocked == {"budget": 2}
    memory.detach()
    memory = base.attach(config(trigger="schedule:0=short,3=long", distance=4))
    base.generate(QUESTIONS[0], **NO_END)
    assert memory.trace.blocked == {"distance": 1}
    with memory.off():
        base.generate(QUESTIONS[0])
        assert memory.trace.why() == "memory was not invoked: memory is off (1 times)"


def test_forbidden_tokens_are_counted() -> None:
    base = tied()
    memory = asking(base, distance=0)
    first = memory.tokens.first
    base.generate(QUESTIONS[0], max_new_tokens=6, suppress_tokens=[first, first + 1], **NO_END)
    assert len(memory.trace) == 0 and memory.trace.blocked == {"forbidden": 4, "room": 2}
    base.generate(QUESTIONS[0], max_new_tokens=6, do_sample=True, top_k=1, **NO_END)
    assert memory.trace.blocked["forbidden"] == 0  # what sampling leaves out was not forbidden


@pytest.mark.parametrize("owner", [GenerationMixin, None], ids=["mixin", "class"])
def test_generate_called_on_the_class_is_told(owner: Any) -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=short"))
    base.generate(*QUESTIONS)
    assert len(memory.trace) == 4
    inputs = base.inputs(*QUESTIONS)
    with pytest.warns(UserWarning, match="past memory .*: call model.generate"):
        (owner or type(base.model)).generate(base.model, **inputs, max_new_tokens=4)
    assert len(memory.trace) == 0
    assert memory.trace.why() == (
        "memory was not invoked: generate was called on the class, type(model).generate(model), past memory (1 times)"
    )


def test_a_model_that_drafts_for_another() -> None:
    plain, drafting = tied(), tied()
    memory = drafting.attach(config(trigger="schedule:0=short"))
    inputs = plain.inputs(QUESTIONS[2])
    expected = plain.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert plain.model.generate(**inputs, max_new_tokens=8, do_sample=False, assistant_model=drafting.model).equal(
        expected
    )
    assert memory.trace.blocked == {"drafts": 1}


def test_settings_by_configuration_are_settings() -> None:
    base = tied()
    memory = asking(base)
    output = base.generate(*QUESTIONS, repetition_penalty=1.3, no_repeat_ngram_size=3)
    given = GenerationConfig(repetition_penalty=1.3, no_repeat_ngram_size=3, max_new_tokens=16,
                             eos_token_id=base.model.generation_config.eos_token_id)  # fmt: skip
    again = base.model.generate(**base.inputs(*QUESTIONS), generation_config=given)
    assert again.equal(output.sequences) and len(memory.trace)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_memory_is_not_copied_by_itself(way: Any) -> None:
    memory = tied().attach()
    for own in (memory, vismem.trainable(memory)) if way is not copy.copy else (memory,):
        with pytest.raises(AttachError, match="a memory belongs to its model and is not copied"):
            way(own)


def test_what_cannot_be_decoded_is_told() -> None:
    memory = tied().attach()
    for ids in ([[1, 2]], torch.tensor([[1, 2]]), [memory.tokens.width], [-1], ["a"]):
        with pytest.raises(AttachError, match="decode takes the ids of one row, from 0 to"):
            memory.decode(ids)
