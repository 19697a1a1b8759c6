"""Requests that nobody should send, from seeds."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import tiny
from served import data_url, part

IMAGE = tiny.picture(28, 28, 0)
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**70, 1e308, float("nan"), float("-inf"), "", " ", "a", "\x00", "\ud800", "<image>", "é" * 9,
    "<|im_end|>", "<|image_pad|>", "<ms_I>", [], [[]], {}, {"a": 1}, [None], "../../etc/passwd", "file:///etc/passwd",
    "http://127.0.0.1/", "data:image/png;base64,", "data:image/png;base64,AAAA", "policy", "random:nan", "schedule:0=",
    "never@", "{{ 7 * 7 }}", "%s%n", "0" * 4000,
]  # fmt: skip
FIELDS = (
    "model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "n", "seed", "stream",
    "stream_options", "vismem", "tools", "logprobs", "response_format", "generation_config", "user", "extra",
)  # fmt: skip


def request(chance: Random) -> dict[str, Any]:
    """A request that is right."""
    content: list[Any] = [{"type": "text", "text": "what is a bag ?"}]
    if chance.random() < 0.5:
        content.insert(chance.randrange(2), part(IMAGE))
    turns = [{"role": "user", "content": content}]
    if chance.random() < 0.3:
        turns = [{"role": "system", "content": "be brief"}, *turns, {"role": "assistant", "content": "a"}, *turns]
    own: dict[str, Any] = {"model": "mini", "messages": turns, "max_tokens": chance.randrange(1, 8)}
    if chance.random() < 0.3:
        own |= {"stream": True}
    return own


def mutated(chance: Random) -> bytes:
    """A request with one to three things changed, or bytes changed."""
    own: Any = request(chance)
    for _ in range(chance.randrange(1, 4)):
        own = _changed(own, chance) if chance.random() < 0.6 else own | {chance.choice(FIELDS): chance.choice(ODD)}
        if not isinstance(own, dict):
            break
    sent = bytearray(json.dumps(own).encode())
    if chance.random() < 0.2:
        for _ in range(chance.randrange(1, 20)):
            sent[chance.randrange(len(sent))] = chance.randrange(256)
    if chance.random() < 0.05:
        sent = sent[: chance.randrange(len(sent))]
    return bytes(sent)


def _changed(own: Any, chance: Random) -> Any:
    """Something inside is another thing, or gone, or there many times."""
    if isinstance(own, dict) and own and chance.random() < 0.9:
        key = chance.choice(list(own))
        if chance.random() < 0.1:
            return {name: value for name, value in own.items() if name != key}
        return own | {key: _changed(own[key], chance)}
    if isinstance(own, list) and own and chance.random() < 0.9:
        at = chance.randrange(len(own))
        if chance.random() < 0.1:
            return own * chance.choice((0, 2, 30))
        return [*own[:at], _changed(own[at], chance), *own[at + 1 :]]
    if isinstance(own, str) and own.startswith("data:") and chance.random() < 0.7:
        held = bytearray(data_url(IMAGE).encode())
        for _ in range(chance.randrange(1, 30)):
            held[chance.randrange(len(held))] = chance.randrange(32, 127)
        return held.decode()
    return chance.choice(ODD)
