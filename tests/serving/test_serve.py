"""OpenAI's own client against a real server: each answer is the one vismem gives alone, whoever else is asking."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import httpx
import openai
import pytest
import tiny
from bases import config, mini
from fuzz import mutated
from served import Served, messages, part, served, streamed

import vismem_core as vismem
from vismem_core.config import PolicyConfig
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory
from vismem_core.serving import batch as batches
from vismem_core.serving.refused import Limits
from vismem_plugins.mini import path
from vismem_plugins.mosaic import mosaic

TRIGGERS = (None, "never", "schedule:0=long,3=short", "anywhere:0.4")


@pytest.fixture(scope="module")
def memory() -> Memory:
    base = mini()
    return vismem.attach(base.model, base.processor, path("qwen2_5_vl") / "memory")


@pytest.fixture(scope="module")
def server(memory: Memory) -> Iterator[Served]:
    with served(memory, Limits(tokens=200, pixels=100_000)) as own:
        yield own
        assert own.lines == []  # nothing failed on the way


def samples(count: int) -> list[Sample]:
    return list(mosaic("heldout", types=["most", "right", "read", "list"])[:count])


def trigger(spec: str | None) -> dict[str, Any]:
    return {} if spec is None else {"extra_body": {"vismem": {"trigger": spec}}}


@pytest.fixture
def endless(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers take their time, and no end token ends them."""
    take = batches.Row.take

    def later(row: Any, token: int) -> bool:
        time.sleep(0.005)
        return take(row, 5 if token == end else token)

    end = memory.model.generation_config.eos_token_id
    monkeypatch.setattr(batches.Row, "take", later)
    monkeypatch.setattr(memory.model.generation_config, "eos_token_id", None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[batches.Row]]:
    """The rows of each batch that is decoded."""
    told: list[list[batches.Row]] = []
    usual = batches.decode

    def noted(memory: Any, inputs: Any, rows: Any, *rest: Any) -> None:
        told.append(rows)
        usual(memory, inputs, rows, *rest)

    monkeypatch.setattr("vismem_core.serving.batcher.decode", noted)
    return told


def wait(until: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not until():
        assert time.monotonic() < begun + 20
        time.sleep(0.01)


def places(told: Any) -> list[tuple[str, int]]:
    return [(own["kind"], own["position"]) for own in told["invocations"]]


@pytest.mark.parametrize("spec", [None, *(pytest.param(own, marks=pytest.mark.long) for own in TRIGGERS[1:])])
def test_answers_are_those_of_vismem(server: Served, spec: str | None) -> None:
    invoked = 0
    for sample in samples(4)[::2]:
        alone = server.alone(sample, spec, most=20)
        told = server.ask(sample, max_tokens=20, **trigger(spec))
        (choice,) = told.choices
        assert choice.message.content == alone.text
        assert places(told.vismem) == [(own.kind, own.position) for own in alone.invocations]
        assert told.vismem["trigger"] == (spec or "policy")
        assert told.usage.completion_tokens == alone.tokens
        assert choice.finish_reason == ("length" if alone.tokens == 20 else "stop")
        invoked += len(alone.invocations)
    assert bool(invoked) == (spec != "never")


def test_streams_are_the_same_in_pieces(server: Served) -> None:
    for sample, spec in zip(samples(4)[1::2], TRIGGERS[1::2], strict=True):
        whole = server.ask(sample, max_tokens=20, **trigger(spec))
        options = {"stream": True, "stream_options": {"include_usage": True}}
        text, chunks = streamed(server.ask(sample, max_tokens=20, **options, **trigger(spec)))
        assert text == whole.choices[0].message.content and "<m" not in text
        assert chunks[0].choices[0].delta.role == "assistant"
        last = chunks[-2]
        assert last.choices[0].finish_reason == whole.choices[0].finish_reason and last.vismem == whole.vismem
        assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert len(chunks) > 5  # it did come in pieces


@pytest.mark.long
def test_conversations_and_images_in_their_places(server: Served) -> None:
    first, second = (own.load_images()[0] for own in samples(2))
    turns = (("system", "answer with one word"), ("user", "what is <image> ?"), ("assistant", "a bag"))
    sample = Sample("own", (first, second), "and what is <image> ?", turns=turns)
    told = server.ask(sample, max_tokens=9)
    assert told.choices[0].message.content == server.alone(sample, most=9).text
    bare = Sample("own", (), "what is a bag ?")
    assert server.ask(bare, max_tokens=9).choices[0].message.content == server.alone(bare, most=9).text
    swapped = Sample("own", (second, first), "and what is <image> ?", turns=turns)
    assert server.ask(swapped, max_tokens=9).choices[0].message.content == server.alone(swapped, most=9).text


@pytest.mark.long
def test_where_answers_end(server: Served) -> None:
    sample, spec = samples(4)[3], trigger("anywhere:0.4")
    full = server.ask(sample, max_tokens=40, **spec).choices[0].message.content
    words = full.split()
    assert len(words) > 5
    stop = " ".join(words[3:5])
    for own in ({"stop": stop}, {"stop": [stop, "never said"], "stream": True}):
        told = server.ask(sample, max_tokens=40, **own, **spec)
        text = streamed(told)[0] if "stream" in own else told.choices[0].message.content
        assert text == full[: full.find(stop)].strip()
    cut = server.ask(sample, max_completion_tokens=3, **spec)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    assert full.startswith(cut.choices[0].message.content) or cut.vismem["invocations"] == []


@pytest.mark.long
def test_sampling_is_by_the_requests_own_seed(server: Served) -> None:
    sample, how = samples(1)[0], {"temperature": 2.0, "top_p": 0.99, "seed": 7, "n": 4, "max_tokens": 8}
    first, again, other = server.ask(sample, **how), server.ask(sample, **how), server.ask(sample, **how | {"seed": 8})
    texts = [[own.message.content for own in told.choices] for told in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1
    assert first.usage.prompt_tokens == server.ask(sample).usage.prompt_tokens
    invoked = server.ask(sample, n=4, max_tokens=20, **trigger("anywhere:0.4")).vismem["invocations"]
    assert len({str([own | {"choice": 0} for own in invoked if own["choice"] == at]) for at in range(4)}) > 1
    cold = server.ask(sample, temperature=2.0, top_p=0.0, seed=7)
    assert cold.choices[0].message.content == server.ask(sample).choices[0].message.content


def test_who_asks_together_is_answered_together(server: Served, calls: list[list[batches.Row]]) -> None:
    some, lengths = samples(4), (3, 5, 20, 40)
    pairs = list(zip(some, lengths, strict=True))
    alone = [server.alone(own, "anywhere:0.4", most) for own, most in pairs]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.ask, own, max_tokens=most, **trigger("anywhere:0.4")) for own, most in pairs]
        told = [own.result() for own in asked]
    assert [own.choices[0].message.content for own in told] == [own.text for own in alone]
    assert [places(own.vismem) for own in told] == [[(p.kind, p.position) for p in own.invocations] for own in alone]
    assert sum(map(len, calls)) == 4 and max(map(len, calls)) > 1


def test_a_client_that_leaves_frees_its_row(server: Served, endless: None, calls: list[list[batches.Row]]) -> None:
    sample = samples(1)[0]
    chunks = server.ask(sample, max_tokens=200, stream=True)
    next(iter(chunks))
    chunks.close()
    patient = server.client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):  # and one that did not stream
        patient.chat.completions.create(model="mini", messages=messages(sample), max_tokens=200)
    rows = [row for own in calls for row in own]
    wait(lambda: all(own.gone() for own in rows))
    time.sleep(0.1)
    written = [own.answer.written for own in rows]
    assert len(rows) == 2 and all(own.answer.end is None for own in rows)
    time.sleep(0.1)
    assert [own.answer.written for own in rows] == written


def test_a_short_answer_does_not_wait_for_a_long_one(
    server: Served, endless: None, calls: list[list[batches.Row]]
) -> None:
    long, short = samples(2)
    with server.ask(long, max_tokens=200, stream=True) as chunks:
        next(iter(chunks))
        told = server.ask(short, max_tokens=4)
        assert told.usage.completion_tokens == 4
        assert calls[0][0].answer.end is None and calls[1][0].answer.end is not None


@pytest.mark.parametrize(
    ("status", "fields", "message"),
    [
        (404, {"model": "gpt-4o"}, "there is no model 'gpt-4o' here; there is 'mini'"),
        (400, {"logprobs": True}, "logprobs is not supported here"),
        (400, {"extra_body": {"vismem": {"trigger": "now"}}}, "unknown trigger 'now'"),
        (400, {"messages": [{"role": "user", "content": "a bag " * 2100}]}, "the model's context is 2048"),
        (400, {"messages": [{"role": "user", "content": "a <|image_pad|> ?"}]}, "this model's own mark of an image"),
        (400, {"messages": [{"role": "user", "content": [part(tiny.picture(900, 900, 0))]}]}, "900 x 900 pixels"),
        (400, {"messages": [{"role": "user", "content": [part(tiny.picture(400, 1, 0))]}]}, "400 x 1 pixels"),
    ],
)
def test_errors_are_told(server: Served, status: int, fields: dict[str, Any], message: str) -> None:
    asked = {"model": "mini", "messages": messages(samples(1)[0])} | fields
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as error:
            server.client.chat.completions.create(**asked, stream=stream)
        assert error.value.status_code == status and message in str(error.value)


@pytest.mark.long
def test_a_bad_request_does_not_harm_its_neighbours(server: Served) -> None:
    good = samples(3)
    alone = [server.alone(own).text for own in good]
    bad = {"model": "mini", "messages": [{"role": "user", "content": [part(tiny.picture(400, 1, 0))]}]}
    with ThreadPoolExecutor(6) as pool:
        wrong = [pool.submit(server.post, bad) for _ in range(3)]
        right = [pool.submit(server.ask, own, max_tokens=64) for own in good]
        assert [own.result().status_code for own in wrong] == [400] * 3
        assert [own.result().choices[0].message.content for own in right] == alone


@pytest.mark.long
def test_the_policys_weights_act_on_its_own_answers() -> None:
    memory = mini().attach(config(policy=PolicyConfig(trains="lora")))
    asked = [(own, spec) for own in samples(3) for spec in ("never", "anywhere:0.4")]
    with served(memory) as own, ThreadPoolExecutor(6) as pool:
        alone = [own.alone(sample, spec, most=12).text for sample, spec in asked]
        told = [pool.submit(own.ask, sample, max_tokens=12, **trigger(spec)) for sample, spec in asked]
        assert [one.result().choices[0].message.content for one in told] == alone


@pytest.mark.long
def test_a_model_that_fails_harms_one_request(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, good = batches.decode, samples(2)

    def failing(memory: Any, inputs: Any, rows: Any, *rest: Any) -> None:
        if any(row.answer.most == 13 for row in rows):
            raise RuntimeError("out of memory\nsomewhere")
        usual(memory, inputs, rows, *rest)

    monkeypatch.setattr("vismem_core.serving.batcher.decode", failing)
    with served(memory) as own, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(own.ask, sample, max_tokens=12) for sample in good]
        with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
            own.ask(good[0], max_tokens=13)
        assert [told.result().choices[0].message.content for told in asked] == [own.alone(one).text for one in good]
    assert own.lines == ["a request failed: RuntimeError: out of memory somewhere"]


@pytest.mark.long
def test_roads_and_keys_and_crowds(memory: Memory) -> None:
    limits = Limits(tokens=64, body=5000, requests=1)
    with served(memory, limits, key="a secret") as own:
        key = {"authorization": "Bearer a secret"}
        question = {"model": "mini", "messages": [{"role": "user", "content": "what is a bag ?"}]}
        assert own.post(question).status_code == 401
        assert own.post(question, authorization="Bearer a secre").status_code == 401
        assert own.post(question, **key).status_code == 200
        assert own.post(question | {"user": "a" * 5000}, **key).status_code == 413
        assert own.post(question, **key | {"content-type": "text/plain"}).status_code == 415
        assert own.post(b"{", **key).json()["error"]["code"] == "invalid_json"
        assert own.web.get("/health").json() == {"status": "ok"}
        assert own.web.get("/v1/models").status_code == 401
        assert own.web.get("/v1/models", headers=key).json()["data"][0]["id"] == "mini"
        assert own.web.get("/v1/models/other", headers=key).status_code == 404
        for road in ("/", "/docs", "/openapi.json", "/v1/../etc/passwd", "/v1/completions"):
            assert set(own.web.get(f"{road}", headers=key).json()) == {"error"}
        with ThreadPoolExecutor(8) as pool:
            codes = [told.status_code for told in pool.map(lambda _: own.post(question, **key), range(8))]
        assert set(codes) == {200, 429}


@pytest.mark.long
def test_time_is_limited(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, begun = batches.decode, threading.Event()

    def slow(*told: Any) -> None:
        begun.set()
        time.sleep(0.6)
        usual(*told)

    monkeypatch.setattr("vismem_core.serving.batcher.decode", slow)
    question = {"model": "mini", "messages": [{"role": "user", "content": "what is a bag ?"}]}
    with served(memory, Limits(tokens=64, seconds=0.3)) as own, ThreadPoolExecutor(2) as pool:
        first = pool.submit(own.post, question)
        begun.wait()
        late = own.post(question)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        told = first.result().json()
        assert told["choices"][0]["finish_reason"] == "length" and told["vismem"]["timed_out"]
        assert told["usage"]["completion_tokens"] == 1


@pytest.mark.long
def test_hostile_requests(server: Served) -> None:
    chance = Random(0)
    for at in range(200):
        told = server.post(mutated(chance))
        assert told.status_code in (200, 400, 404, 413, 415), (at, told.text)
        assert told.status_code == 200 or set(told.json()["error"]) == {"message", "type", "param", "code"}
    sample = samples(1)[0]
    assert server.ask(sample, max_tokens=20).choices[0].message.content == server.alone(sample, most=20).text


def asks(count: int, seed: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths, some sampled, some with another trigger."""
    chance, some = Random(seed), samples(8)
    told = []
    for at in range(count):
        own = {"model": "mini", "messages": messages(some[at % 8]), "max_tokens": chance.choice((2, 5, 9, 20, 40))}
        if chance.random() < 0.5:
            own["vismem"] = {"trigger": "anywhere:0.3"}
        if chance.random() < 0.3:
            own |= {"temperature": 1.5, "seed": chance.randrange(3)}
        told.append(own)
    return told


def said(answer: dict[str, Any]) -> Any:
    return [answer[name] for name in ("choices", "usage", "vismem")]


@pytest.mark.long
def test_many_clients_at_once(memory: Memory) -> None:
    wanted, chance = asks(32, 0), Random(1)
    with served(memory, Limits(tokens=64), batch=8) as own:
        alone = [said(own.post(one).json()) for one in wanted]
        assert len({str(one) for one in alone}) > 15

        def client(at: int) -> Any:
            if leaves[at]:
                with own.web.stream("POST", "/v1/chat/completions", json=wanted[at] | {"stream": True}) as told:
                    next(told.iter_lines())
                return None
            return said(own.post(wanted[at]).json())

        for _ in range(2):
            leaves = [chance.random() < 0.2 for _ in wanted]
            with ThreadPoolExecutor(32) as pool:
                got = list(pool.map(client, range(32)))
            assert got == [None if left else one for left, one in zip(leaves, alone, strict=True)]
        assert own.lines == []


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_let_answers_end(number: int, code: int) -> None:
    command = [sys.executable, "-m", "vismem_cli", "serve", "--port", "0", "--trigger", "anywhere:0.2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next(own for own in process.stderr if own.startswith("serving "))
    address = line.split()[-1]
    question = {"model": line.split()[1], "messages": messages(samples(4)[3]), "max_tokens": 40, "stream": True}
    with httpx.stream("POST", f"{address}/chat/completions", json=question, timeout=60) as told:
        lines = told.iter_lines()
        next(lines)
        process.send_signal(number)
        rest = list(lines)
    assert rest[-2] == "data: [DONE]" and '"finish_reason": "stop"' in "".join(rest)
    assert process.wait(60) == code
    left = process.stderr.read()
    assert left == ("" if code == 0 else "error: interrupted\n")
