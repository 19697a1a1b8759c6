"""A server on the embedded model, in a thread of the tests' own process, and what its clients say."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import httpx
import openai
from PIL import Image

from vismem_core.answers.inference import Answer, answers
from vismem_core.files.samples import Sample
from vismem_core.memory.memory import Memory
from vismem_core.serving import server
from vismem_core.serving.refused import Limits

NAME = "mini"


@dataclass
class Served:
    """A server that runs.

    Attributes:
        lines: what it reported.
    """

    memory: Memory
    address: str
    lines: list[str]

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="any", max_retries=0, timeout=60)

    @cached_property
    def web(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, verify=False)

    def ask(self, sample: Sample, **fields: Any) -> Any:
        return self.client.chat.completions.create(model=NAME, messages=messages(sample), **fields)

    def post(self, body: Any, **headers: str) -> httpx.Response:
        """A request as it stands; bytes are sent as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        told = {"content-type": "application/json"} | headers
        return self.web.post("/v1/chat/completions", content=data, headers=told)

    def alone(self, sample: Sample, trigger: str | None = None, most: int = 64) -> Answer:
        """The answer that vismem itself gives to it."""
        (answer,) = answers(self.memory, [sample], trigger=trigger, max_new_tokens=most)
        return answer


@contextmanager
def served(memory: Memory, limits: Limits | None = None, **options: Any) -> Iterator[Served]:
    lines: list[str] = []
    with server.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        built = server.build(memory, NAME, limits or Limits(tokens=64), report=lines.append, **options)
        thread = threading.Thread(target=built.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Served(memory, f"http://127.0.0.1:{port}", lines)
        finally:
            built.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def data_url(image: Image.Image | bytes, kind: str = "PNG") -> str:
    if not isinstance(image, bytes):
        held = BytesIO()
        image.save(held, kind)
        image = held.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(image).decode()}"


def part(image: Image.Image | bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def messages(sample: Sample) -> list[dict[str, Any]]:
    """A question as clients send it, its images where they stand."""
    turns: Sequence[tuple[str, str]] = [*sample.turns, ("user", sample.prompt)]
    images = iter(sample.load_images())
    placed = any("<image>" in text for _, text in turns)
    told = []
    for role, text in turns:
        pieces = text.split("<image>")
        content = [] if placed else [part(own) for own in images]
        for at, piece in enumerate(pieces):
            content += [part(next(images))] if at else []
            content += [{"type": "text", "text": piece}] if piece else []
        told.append({"role": role, "content": content if role == "user" else text})
    return told


def streamed(chunks: Any) -> tuple[str, list[Any]]:
    """The text of a stream, and its chunks."""
    told = list(chunks)
    return "".join(own.choices[0].delta.content or "" for own in told if own.choices), told
