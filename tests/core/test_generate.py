"""Promise 4: what ``generate`` promises its callers holds with memory."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from bases import QUESTIONS, Base, config, mini, tied, untied
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from vismem_core import Memory
from vismem_core.decoding import loop, room

NO_END: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}


def well_formed(memory: Memory, answer: list[int]) -> bool:
    """Each invocation token is followed by its end token, and no end token stands alone."""
    first = memory.tokens.first
    pairs = list(zip(answer, [*answer[1:], -1], strict=True))
    opened = all(after == token + 2 for token, after in pairs if token in (first, first + 1))
    count = sum(token in (first, first + 1) for token in answer)
    return opened and count == sum(token in (first + 2, first + 3) for token in answer)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("spec", ["anywhere:1", "policy"])
def test_latents_cost_no_tokens(spec: str, length: int) -> None:
    base = tied()
    memory = base.attach(config(trigger=spec, distance=0))
    with torch.no_grad():
        memory.tokens.head *= 20.0
    for limit in ({"max_new_tokens": length}, {"max_new_tokens": None, "max_length": None}):
        if limit["max_new_tokens"] is None:
            limit["max_length"] = base.inputs(*QUESTIONS)["input_ids"].shape[1] + length
        output = base.generate(*QUESTIONS, **limit, **NO_END)
        assert output.answers.shape[1] == length
        assert all(well_formed(memory, answer) for answer in output.answers.tolist())
        assert (len(memory.trace) > 0) == (length >= 3)


@pytest.mark.parametrize(("budget", "distance"), [(0, 0), (1, 0), (3, 0), (8, 4), (2, 7)])
def test_budget_and_distance(budget: int, distance: int) -> None:
    base = tied()
    memory = base.attach(config(trigger="anywhere:1", budget=budget, distance=distance))
    base.generate(*QUESTIONS, max_new_tokens=24, **NO_END)
    for row in range(len(QUESTIONS)):
        places = [own.position for own in memory.trace.row(row)]
        assert places == list(range(0, 22, 2 + distance))[:budget]
        assert memory.columns(24) == 24 + len(places) * memory.longest


@pytest.mark.parametrize(("budget", "distance"), [(8, 2), (2, 0), (99, 0)])
def test_room_is_reserved_once(budget: int, distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tied()
    base.attach(config(trigger="anywhere:1@long", budget=budget, distance=distance))
    rooms: list[int] = []
    own = room.RoomLayer.reserve
    monkeypatch.setattr(room.RoomLayer, "reserve", lambda *args: (rooms.append(args[1]), own(*args)))
    base.generate(*QUESTIONS, max_new_tokens=24, **NO_END)
    assert not rooms
    monkeypatch.setattr(loop, "BLOCK", 1)
    monkeypatch.setattr(room, "STEP", 1)
    base.generate(*QUESTIONS, max_new_tokens=24, **NO_END)
    assert rooms


def test_end_tokens_are_never_sampled(base: Base) -> None:
    memory = base.attach(config(trigger="policy", distance=0, budget=99))
    torch.manual_seed(0)
    output = base.generate(*QUESTIONS, do_sample=True, temperature=100.0, top_k=0, max_new_tokens=200, **NO_END)
    assert len(memory.trace) >= 2
    assert all(well_formed(memory, answer) for answer in output.answers.tolist())
    assert output.answers.max() < memory.tokens.first + 4


def test_end_of_turn_per_row(base: Base) -> None:
    memory = base.attach()
    whole = base.generate(*QUESTIONS, max_new_tokens=20, **NO_END).answers.tolist()
    ends = [
        next(token for token in row[at:] if token < memory.tokens.first) for at, row in ((6, whole[0]), (9, whole[1]))
    ]
    output = base.generate(*QUESTIONS, max_new_tokens=20, eos_token_id=ends, pad_token_id=5)
    cut = [next((at for at, token in enumerate(row) if token in ends), 19) + 1 for row in whole]
    assert len(set(cut)) > 1
    width = max(cut)
    assert output.answers.tolist() == [row[:n] + [5] * (width - n) for row, n in zip(whole, cut, strict=True)]
    assert all(own.position < cut[own.row] for own in memory.trace.invocations)


class Forbid:
    """A user's own logits processor."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.arange(100, 250), float("-inf"))


WARPED: list[tuple[dict[str, Any], list[Any]]] = [
    ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    ({"no_repeat_ngram_size": 2}, [NoRepeatNGramLogitsProcessor(2)]),
    ({"suppress_tokens": [7, 8]}, [SuppressTokensLogitsProcessor([7, 8])]),
    ({"logits_processor": LogitsProcessorList([Forbid()])}, [Forbid()]),
    ({"do_sample": True, "temperature": 0.7, "top_k": 0}, [TemperatureLogitsWarper(0.7)]),
    ({"do_sample": True, "top_k": 5}, [TopKLogitsWarper(5)]),
    ({"do_sample": True, "top_k": 0, "top_p": 0.6}, [TopPLogitsWarper(0.6)]),
]


@pytest.mark.parametrize(("options", "processors"), WARPED, ids=[",".join(options) for options, _ in WARPED])
@pytest.mark.parametrize("spec", ["anywhere:0.3", "policy"])
def test_logits_processors(spec: str, options: dict[str, Any], processors: list[Any]) -> None:
    base = tied()
    memory = base.attach(config(trigger=spec))
    with torch.no_grad():
        memory.tokens.head *= 6.0
    torch.manual_seed(1)
    output = base.generate(*QUESTIONS, **options, **NO_END)
    start = output.sequences.shape[1] - output.answers.shape[1]
    forced = 0
    for step, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        expected = logits.clone()
        for processor in processors:
            expected = processor(output.sequences[:, : start + step], expected)
        for row, token in enumerate(output.answers[:, step].tolist()):
            choices = scores[row].isfinite().nonzero().flatten().tolist()
            assert token in choices
            if choices == [token] and scores[row, token] == 0 and token >= memory.tokens.first:
                forced += 1
            else:
                torch.testing.assert_close(scores[row], expected[row])
                assert options.get("do_sample") or token == int(expected[row].argmax())
    assert forced >= len(memory.trace) > 0


def test_min_new_tokens() -> None:
    base = tied()
    memory = base.attach()
    whole = base.generate(*QUESTIONS, **NO_END).answers
    ends = whole[:, 1:5].flatten().tolist()
    ends = [token for token in ends if token < memory.tokens.first]
    output = base.generate(*QUESTIONS, eos_token_id=ends, min_new_tokens=10)
    assert not torch.isin(output.answers[:, :10], torch.tensor(ends)).any()
    processor = MinNewTokensLengthLogitsProcessor(0, 1, ends, device="cpu")
    assert processor(output.answers[:, :0], output.logits[0])[:, ends].eq(float("-inf")).all()


class StopAt(StoppingCriteria):  # type: ignore[misc]
    """Stops each row at its own token."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == self.tokens


def test_stopping_criteria_of_the_users_own() -> None:
    base = tied()
    memory = base.attach()
    whole = base.generate(*QUESTIONS[:2], **NO_END).answers.tolist()
    end = base.model.generation_config.eos_token_id
    ends = [whole[0][5], memory.tokens.invocation("long")]  # the second row stops while it owes an end token
    base.model.generation_config.pad_token_id = 3
    output = base.generate(*QUESTIONS[:2], eos_token_id=end, stopping_criteria=[StopAt(ends)])
    stops = [whole[0].index(ends[0]) + 1, whole[1].index(ends[1]) + 1]
    assert output.answers[0, : stops[0]].tolist() == whole[0][: stops[0]]
    assert output.answers[0, stops[0] :].eq(3).all()
    assert output.answers[1].tolist()[: stops[1] + 1] == whole[1][: stops[1] + 1]
    assert well_formed(memory, output.answers[1].tolist())


@pytest.mark.parametrize("through", ["argument", "generation_config", "model"])
def test_stop_strings(through: str) -> None:
    base = tied()
    memory = base.attach()
    tokenizer = base.processor.tokenizer
    whole = base.generate(QUESTIONS[0], max_new_tokens=24, **NO_END).answers[0].tolist()
    at = next(i for i, token in enumerate(whole) if i > 2 and token < 256 and tokenizer.decode(token).isascii())
    stop, options = [tokenizer.decode(whole[at])], dict[str, Any]()
    if through == "argument":
        options["stop_strings"] = stop
    else:
        settings = base.model.generation_config
        settings.stop_strings = stop
        if through == "generation_config":
            options["generation_config"], settings.stop_strings = type(settings)(**settings.to_dict()), None
    found = base.generate(QUESTIONS[0], max_new_tokens=24, tokenizer=tokenizer, **options, **NO_END).answers[0]
    assert stop[0] in tokenizer.decode(found)
    assert found.tolist() == whole[: len(found)]
    assert len(found) <= at + 1
    assert memory.enabled


class Recorder(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.pieces: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value if value.ndim == 2 else value[:, None])

    def end(self) -> None:
        self.ended = True


def test_streamers(base: Base) -> None:
    memory = base.attach()
    recorder = Recorder()
    output = base.generate(QUESTIONS[1], streamer=recorder)
    assert recorder.ended
    assert torch.cat(recorder.pieces, dim=1).equal(output.sequences)
    assert len(memory.trace)
    streamer = TextIteratorStreamer(base.processor.tokenizer, skip_prompt=True)
    call = Thread(target=base.generate, args=[QUESTIONS[1]], kwargs={"streamer": streamer})
    call.start()
    text = "".join(streamer)
    call.join()
    assert text == base.processor.tokenizer.decode(output.answers[0])


def test_same_seed_same_answer() -> None:
    base = tied()
    base.attach()
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(base.generate(*QUESTIONS, do_sample=True, num_return_sequences=2).answers)
    assert answers[0].equal(answers[1])
    assert answers[0].shape[0] == 2 * len(QUESTIONS)
    assert answers[0].shape != answers[2].shape or not answers[0].equal(answers[2])


@pytest.mark.parametrize("rows", [1, 4], ids=["alone", "ragged"])
@pytest.mark.parametrize("make", [tied, untied, mini])
def test_everything_in_the_dict(make: Any, rows: int) -> None:
    base = make()
    base.model.set_attn_implementation("eager")
    memory = base.attach(config(trigger="schedule:2=long,6=short"))
    output = base.generate(
        *QUESTIONS[:rows], max_new_tokens=10, output_attentions=True, output_hidden_states=True, **NO_END
    )
    assert len(memory.trace) == 2 * rows
    layers = base.model.config.text_config.num_hidden_layers
    prompt, width = base.inputs(*QUESTIONS[:rows])["input_ids"].shape[1], base.model.get_input_embeddings().weight.shape
    for name, depth in (("hidden_states", layers + 1), ("attentions", layers)):
        assert len(output[name]) == 10
        assert all(len(step) == depth and isinstance(step, tuple) for step in output[name])
        assert [step[-1].shape[-2] for step in output[name]] == [prompt] + [1] * 9
    last = torch.stack([step[-1][:, -1] for step in output.hidden_states])
    logits = torch.stack(output.logits)[..., : width[0]]
    torch.testing.assert_close(base.model.lm_head(last), logits, atol=1e-4, rtol=1e-4)
    assert [step[0].shape[-1] for step in output.attentions][-1] == prompt + 9 + 8
    assert output.past_key_values.get_seq_length() == prompt + 9 + 8
    assert all(own.shape[-1] == memory.tokens.first + 4 for own in (*output.scores, *output.logits))


def test_names_of_the_tokens_in_texts() -> None:
    base = tied()
    memory = base.attach(config(trigger="schedule:0=long,4=short"))
    answers = base.generate(*QUESTIONS[:2], max_new_tokens=8, **NO_END).answers
    tokenizer = base.processor.tokenizer
    for row in answers.tolist():
        kept = [token for token in row if token < memory.tokens.first]
        for skip in (True, False):
            text = memory.decode(row, skip_special_tokens=skip)
            assert text.startswith("<ml_I><ml_E>")
            assert "<ms_I><ms_E>" in text
            plain = tokenizer.decode(row, skip_special_tokens=skip)
            assert plain == tokenizer.decode(kept, skip_special_tokens=skip)
            assert text.replace("<ml_I><ml_E>", "").replace("<ms_I><ms_E>", "") == plain
