"""One answer while it is being written, in a thread of its own, which stops when nobody reads on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from vismem_core.memory.memory import Memory
from vismem_core.memory.trace import Trace


@dataclass(frozen=True)
class Wish:
    """How an answer is asked for.

    Attributes:
        trigger: who invokes memory, as a spec; None switches memory off.
        budget: invocations allowed; None as the memory has it.
    """

    trigger: str | None = None
    budget: int | None = None
    max_new_tokens: int = 64


class Writing:
    """A greedy answer to one question; iterating over it gives the answer's ids so far, after each new one.

    What the wish asks for holds for this answer alone: others may be written on the same model meanwhile.

    Attributes:
        ids: with memory tokens.
        over: whether all of it is there.
        trace: of the call, once it is over.
    """

    def __init__(self, memory: Memory, inputs: Any, wish: Wish) -> None:
        self.memory, self.inputs, self.wish = memory, inputs, wish
        self.ids: list[int] = []
        self.trace, self.over = Trace(), False
        self._heard: SimpleQueue[list[int] | None] = SimpleQueue()
        self._left, self._error = Event(), list[BaseException]()

    def __iter__(self) -> Iterator[list[int]]:
        """Raises what ``generate`` raised; leaving the loop early ends the writing."""
        Thread(target=self._write, daemon=True).start()
        try:
            while (new := self._heard.get()) is not None:
                self.ids += new
                yield self.ids
        finally:
            self._left.set()
        if self._error:
            raise self._error[0]
        self.over = True

    def _write(self) -> None:
        ask: dict[str, Any] = {"max_new_tokens": self.wish.max_new_tokens, "do_sample": False}
        ask["stopping_criteria"] = StoppingCriteriaList([_Unread(self._left)])
        try:
            with torch.no_grad(), self._switched():
                self.memory.model.generate(**self.inputs, streamer=_Heard(self._heard), **ask)
                self.trace = self.memory.trace
        except BaseException as error:
            self._error.append(error)
        finally:
            self._heard.put(None)

    def _switched(self) -> AbstractContextManager[None]:
        if self.wish.trigger is None:
            return self.memory.off()
        return self.memory.triggered(self.wish.trigger, budget=self.wish.budget)


class _Heard(BaseStreamer):
    """Passes on what is written after the prompt, which comes first."""

    def __init__(self, heard: SimpleQueue[list[int] | None]) -> None:
        self.heard, self.prompt = heard, True

    def put(self, value: Tensor) -> None:
        if not self.prompt:
            self.heard.put(value.reshape(-1).tolist())
        self.prompt = False

    def end(self) -> None:
        """The thread says when it is over."""


class _Unread(StoppingCriteria):
    """True once nobody reads on."""

    def __init__(self, left: Event) -> None:
        self.left = left

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)
