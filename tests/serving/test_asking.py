"""Every field of a request is honoured or refused by name, and images are nothing but what was sent."""

from __future__ import annotations

import base64
import json
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
from PIL import Image
from served import data_url, part

from vismem_core.errors import DataError
from vismem_core.serving.asking import Ask, read
from vismem_core.serving.refused import Limits, RefusedError

SMALL = Limits(body=10_000, images=2, pixels=1000, characters=500, tokens=64, copies=4)
IMAGE = tiny.picture(16, 16, 0)
USER = {"role": "user", "content": "what is it ?"}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "mini", "messages": [USER]} | fields).encode()


def ask(urls: bool = False, **fields: Any) -> Ask:
    return read(body(**fields), "mini", SMALL, urls)


def shown(*urls: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": own}} for own in urls]}]


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that says it has side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_fields_are_what_they_say() -> None:
    usual = ask()
    assert (usual.temperature, usual.top_p, usual.copies, usual.stream, usual.trigger) == (0.0, 1.0, 1, False, "")
    told = ask(temperature=0.5, top_p=0.9, max_tokens=7, max_completion_tokens=9, stop="x", n=2, seed=-3, stream=True,
               stream_options={"include_usage": True}, vismem={"trigger": "schedule:0=long"}, user="me")  # fmt: skip
    assert (told.temperature, told.top_p, told.tokens, told.stop, told.copies) == (0.5, 0.9, 9, ("x",), 2)
    assert (told.seed, told.stream, told.usage, told.trigger) == (-3, True, True, "schedule:0=long")
    nothing = ask(logprobs=False, tools=[], response_format={"type": "text"}, presence_penalty=0, seed=None)
    assert nothing == usual


def test_conversations_with_images_in_their_places() -> None:
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": ["look:", part(IMAGE), {"type": "text", "text": "and"}, part(IMAGE)]},
        {"role": "assistant", "content": "yes"},
        USER,
    ]
    told = ask(messages=turns).sample
    assert told.turns == (("system", "be brief"), ("user", "look:<image>and<image>"), ("assistant", "yes"))
    assert told.prompt == "what is it ?" and [own.size for own in told.load_images()] == [(16, 16)] * 2


def test_what_transformers_chat_sends() -> None:
    config = {"do_sample": True, "max_new_tokens": 12, "transformers_version": "5", "eos_token_id": None}
    told = ask(generation_config=json.dumps(config))
    assert (told.tokens, told.temperature) == (12, 1.0)
    assert ask(generation_config=json.dumps(config | {"do_sample": False, "temperature": 2.0})).temperature == 0.0
    with pytest.raises(RefusedError, match="'num_beams' is not supported"):
        ask(generation_config=json.dumps(config | {"num_beams": 2}))


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"temperatur": 1}, "temperatur", "did you mean 'temperature'"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"temperature": True}, "temperature", "from 0 to 2"),
        ({"temperature": float("nan")}, "temperature", "from 0 to 2"),
        ({"temperature": 10**400}, "temperature", "from 0 to 2"),
        ({"top_p": -0.1}, "top_p", "from 0 to 1"),
        ({"max_tokens": 65}, "max_tokens", "from 1 to 64"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "from 1 to 64"),
        ({"max_tokens": "7"}, "max_tokens", "from 1 to 64"),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"seed": 2**64}, "seed", "whole number"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [""]}, "stop", "1 to 256"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "goes with stream"),
        ({"vismem": {"trigger": "sometimes"}}, "vismem.trigger", "unknown trigger"),
        ({"vismem": {"trigger": "random:2"}}, "vismem.trigger", "takes a probability"),
        ({"vismem": {"triger": "never"}}, "vismem", "did you mean 'trigger'"),
        ({"model": "gpt-4o"}, "model", "there is no model 'gpt-4o'"),
        ({"model": None}, "model", "model is missing"),
        ({"messages": []}, "messages", "not empty"),
        ({"messages": [USER, {"role": "assistant", "content": "a"}]}, "messages", "must be a user's"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages", "parts are text, image"),
        ({"messages": [USER | {"content": [{"type": "video", "video": "a.mp4"}]}]}, "messages", "videos are not"),
        ({"messages": [USER | {"tool_calls": [1]}]}, "messages", "tool_calls is not supported"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "is empty"),
        ({"messages": [{"role": "user", "content": "an <image>"}]}, "messages", "write it otherwise"),
        ({"messages": [{"role": "user", "content": "a" * 501}]}, "messages", "more than 500 characters"),
        ({"messages": [{"role": "user", "content": [part(IMAGE)] * 3}]}, "messages", "at most 2"),
        ({"messages": shown("https://example.org/a.png")}, "messages", "fetches no images"),
        ({"messages": shown("file:///etc/passwd")}, "messages", "paths are not read"),
        ({"messages": shown(str(Path(__file__)))}, "messages", "paths are not read"),
        ({"messages": shown("../../a.png")}, "messages", "paths are not read"),
        ({"messages": shown(base64.b64encode(bytes(200)).decode())}, "messages", "paths are not read"),
        ({"messages": shown("data:,hello")}, "messages", "without base64"),
        ({"messages": shown("data:image/png;base64,!!!!")}, "messages", "does not decode"),
        ({"messages": shown(data_url(b"no image at all"))}, "messages", "damaged, or none of"),
        ({"messages": shown(data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n"))}, "messages", "none of PNG"),
        ({"messages": shown(data_url(tiny.picture(40, 40, 0)))}, "messages", "40 x 40 pixels"),
        ({"messages": shown(data_url(bomb(9_000)))}, "messages", "9000 x 9000 pixels"),
        ({"messages": shown(data_url(bomb(100_000)))}, "messages", "far more than"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message) as told:
        ask(**fields)
    assert told.value.field == field
    assert told.value.status == (404 if "no model" in message else 400)
    assert set(told.value.to_dict()["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("sent", [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_request(sent: bytes) -> None:
    with pytest.raises(RefusedError) as told:
        read(sent, "mini", SMALL)
    assert told.value.code == "invalid_json"


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "10.0.0.1", "169.254.169.254", "localhost", "0.0.0.0", "2130706433"]
)
def test_private_addresses_are_never_fetched(host: str) -> None:
    with pytest.raises(RefusedError, match="public"):
        ask(urls=True, messages=shown(f"http://{host}/a.png"))


def test_images_are_fetched_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    held = BytesIO()
    IMAGE.save(held, "JPEG")
    asked: list[Any] = []

    def fetch(url: str, *, seconds: float = 10.0, limit: int = 20_000_000) -> bytes:
        asked.append((url, limit))
        if "large" in url:
            return bomb(9_000)
        if "gone" in url:
            raise DataError("the URL gives status 404")
        return held.getvalue()

    urls = ModuleType("vismem_core.files.urls")
    urls.fetch = fetch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vismem_core.files.urls", urls)
    told = ask(urls=True, messages=shown("https://example.org/a.jpg")).sample
    assert told.load_images()[0].size == Image.open(held).size and asked == [("https://example.org/a.jpg", SMALL.body)]
    for name, why in (("large", "9000 x 9000"), ("gone", "status 404")):
        with pytest.raises(RefusedError, match=why):
            ask(urls=True, messages=shown(f"https://example.org/{name}"))
