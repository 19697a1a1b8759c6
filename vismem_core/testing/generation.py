"""Promise 4: what ``generate`` promises its callers holds with memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from vismem_core.errors import AttachError
from vismem_core.memory.memory import Memory

from .base import NO_END, staggered
from .contract import Contract, holds

GENERATE = "vismem_core.decoding.injection.InjectionHook.generate"


class Generation(Contract):
    """The ordinary call, with memory."""

    @holds(
        "promise 4: latents must cost none of max_new_tokens, and the returned ids hold the four tokens and no filler",
        GENERATE,
    )
    def test_latents_cost_no_tokens(self) -> None:
        base, questions = self.base(), self.questions()
        memory = base.attach("anywhere:1", distance=0)
        for length in (1, 2, 3, 9):
            answers = base.generate(*questions, max_new_tokens=length).answers
            assert answers.shape == (len(questions), length), f"{tuple(answers.shape)} new ids for {length}"
            assert (len(memory.trace) > 0) == (length >= 3), f"{len(memory.trace)} invocations in {length} ids"
            for own in memory.trace.invocations:
                pair = [memory.tokens.invocation(own.kind), memory.tokens.end(own.kind)]
                assert answers[own.row, own.position : own.position + 2].tolist() == pair
            assert _written(memory, answers) == len(memory.trace) * 2, "ids hold memory tokens that nothing invoked"
            names = [memory.decode(row) for row in answers.tolist()]
            assert any("<ms_I><ms_E>" in own or "<ml_I><ml_E>" in own for own in names) == (length >= 3)
            texts = [base.processor.tokenizer.decode(row) for row in answers.tolist()]
            assert not any("<ms_" in own or "<ml_" in own for own in texts), "the tokenizer writes memory tokens"

    @holds("promise 4: each row must stop at its own end of turn and be padded after it", GENERATE)
    def test_end_of_turn_per_row(self) -> None:
        base, questions = self.base(), self.questions()
        memory = base.attach(staggered())
        whole = base.generate(*questions).answers.tolist()
        ends = [_ordinary(memory, row, 6 + index) for index, row in enumerate(whole)]
        pad = _never(memory, whole)
        output = base.generate(*questions, eos_token_id=ends, pad_token_id=pad)
        cut = [next((at for at, token in enumerate(row) if token in ends), len(row) - 1) + 1 for row in whole]
        assert min(cut) < len(whole[0]), "no row met its end"
        expected = [row[:count] + [pad] * (max(cut) - count) for row, count in zip(whole, cut, strict=True)]
        assert output.answers.tolist() == expected
        assert all(own.position < cut[own.row] for own in memory.trace.invocations), "a row that had ended invoked"

    @holds("promise 4: logits processors must see and change what the policy chooses from, and nothing else", GENERATE)
    def test_logits_processors(self) -> None:
        base, questions = self.base(), self.questions()
        memory = base.attach(staggered())
        whole = base.generate(*questions).answers
        forbid = _Forbid(whole[whole < memory.tokens.first].unique())
        output = base.generate(*questions, logits_processor=LogitsProcessorList([forbid]))
        assert len(memory.trace), "memory was not invoked"
        assert not torch.isin(output.answers, forbid.tokens).any(), "it wrote what was forbidden"
        for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
            free = output.answers[:, step] < memory.tokens.first
            assert scores[free].equal(forbid(output.sequences, logits)[free]), f"scores differ at step {step}"
            assert scores[~free].isfinite().sum() == (~free).sum(), "a forced row has a choice"

    @holds("promise 4: stopping criteria must stop each row where they say", GENERATE)
    def test_stopping_criteria(self) -> None:
        base, questions = self.base(), self.questions()
        memory = base.attach(staggered())
        whole = base.generate(*questions).answers.tolist()
        stops = [_ordinary(memory, row, 5 + index) for index, row in enumerate(whole)]
        end = _never(memory, whole)
        options = {"eos_token_id": end, "pad_token_id": end, "stopping_criteria": [_StopAt(stops)]}
        answers = base.generate(*questions, **options).answers.tolist()
        for row, (own, stop) in enumerate(zip(whole, stops, strict=True)):
            cut = own.index(stop) + 1
            assert answers[row][:cut] == own[:cut], f"row {row} writes something else"
            assert set(answers[row][cut:]) <= {end}, f"row {row} goes on"

    @holds("promise 4: a streamer must get every id that is returned, and its end", GENERATE)
    def test_streamer(self) -> None:
        base, question = self.base(), self.questions()[0]
        memory, streamer = base.attach(staggered()), _Recorder()
        output = base.generate(question, streamer=streamer)
        assert len(memory.trace), "memory was not invoked"
        assert torch.cat(streamer.pieces, dim=1).equal(output.sequences.cpu()), "it got other ids"
        assert streamer.ended, "it was not told that the answer ended"

    @holds("promise 4: sampling must follow torch's seed", GENERATE)
    def test_sampling(self) -> None:
        base, questions = self.base(), self.questions()
        memory, answers = base.attach(staggered()), []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            answers.append(base.generate(*questions, do_sample=True, temperature=2.0, top_k=0).answers)
            assert {own.row for own in memory.trace.invocations} == set(range(len(questions))), "a row did not invoke"
        assert answers[0].equal(answers[1]), "one seed, two answers"
        assert not answers[0].equal(answers[2]), "two seeds, one answer"

    @holds("promise 4: prompts that are padded on the right must be refused, for they would be read wrongly", GENERATE)
    def test_right_padding_is_refused(self) -> None:
        base, questions = self.base(), self.questions()
        base.attach(staggered())
        inputs = base.inputs(*questions)
        shape, padding = inputs["attention_mask"].shape, inputs["attention_mask"].argmax(1).tolist()
        for name, own in inputs.items():
            if own.shape == shape:
                inputs[name] = torch.stack([row.roll(-count) for row, count in zip(own, padding, strict=True)])
        try:
            base.model.generate(**inputs, max_new_tokens=4, **NO_END)
        except AttachError as error:
            assert "left" in str(error), f"it is said that {error}"
        else:
            raise AssertionError("they are answered")


class _Forbid:
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, self.tokens, float("-inf"))


class _StopAt(StoppingCriteria):
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == self.tokens.to(input_ids.device)


class _Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value if value.ndim == 2 else value[:, None])

    def end(self) -> None:
        self.ended = True


def _written(memory: Memory, answers: Tensor) -> int:
    return int(memory.tokens.contains(answers).sum())


def _ordinary(memory: Memory, answer: list[int], start: int) -> int:
    """The first token from ``start`` on that is not memory's."""
    return next(token for token in answer[start:] if token < memory.tokens.first)


def _never(memory: Memory, answers: list[list[int]]) -> int:
    """A token that no answer holds."""
    return next(token for token in range(memory.tokens.first) if not any(token in answer for answer in answers))
