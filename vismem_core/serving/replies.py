"""What is answered, in the form of OpenAI's chat completions: whole, or in chunks."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .batcher import Job
from .writing import End, Piece

DONE = b"data: [DONE]\n\n"


def event(told: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return f"data: {json.dumps(told)}\n\n".encode()


@dataclass
class Reply:
    """The answers to one request.

    Args:
        model: its name.
        trigger: who invokes memory, as a spec.
    """

    job: Job
    model: str
    trigger: str
    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, End] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}

    def add(self, told: Piece | End) -> None:
        """What came."""
        if isinstance(told, End):
            self.ends[told.index] = told
        else:
            self.texts[told.index] = self.texts.get(told.index, "") + told.text

    @property
    def over(self) -> bool:
        """Whether all answers are there."""
        return len(self.ends) == self.job.ask.copies

    def whole(self) -> dict[str, Any]:
        """All of it, once it is over."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": self.texts.get(index, ""), "refusal": None},
                "logprobs": None,
                "finish_reason": self.ends[index].why,
            }
            for index in range(self.job.ask.copies)
        ]
        ends = [self.ends[index] for index in sorted(self.ends)]
        told = self._head | {"object": "chat.completion", "choices": choices}
        return told | {"usage": self._usage(), "vismem": self._memory(ends)}

    def begin(self) -> Iterator[bytes]:
        """The chunks in front of a stream."""
        for index in range(self.job.ask.copies):
            yield event(self._chunk(index, {"role": "assistant", "content": ""}))

    def chunk(self, told: Piece | End) -> bytes:
        """The chunk for what came."""
        if isinstance(told, End):
            return event(self._chunk(told.index, {}, told.why) | {"vismem": self._memory([told])})
        return event(self._chunk(told.index, {"content": told.text}))

    def finish(self) -> Iterator[bytes]:
        """What ends a stream."""
        if self.job.ask.usage:
            yield event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(self, index: int, delta: dict[str, Any], why: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": why}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def _usage(self) -> dict[str, int]:
        written = sum(end.tokens for end in self.ends.values())
        return {
            "prompt_tokens": self.job.prompt,
            "completion_tokens": written,
            "total_tokens": self.job.prompt + written,
        }

    def _memory(self, ends: Sequence[End]) -> dict[str, Any]:
        """Which memory was invoked where, and whether time was up."""
        places = [{"choice": end.index} | asdict(place) for end in ends for place in end.invocations]
        late = any(end.late for end in ends)
        return {"trigger": self.trigger, "invocations": places} | ({"timed_out": True} if late else {})
