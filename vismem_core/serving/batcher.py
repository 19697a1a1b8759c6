"""Requests that wait, and the batch that they join, each as soon as there is room for it, in the order they came."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import BatchFeature

from vismem_core.answers.checking import prepare
from vismem_core.errors import cut
from vismem_core.files.samples import Sample, Skipped
from vismem_core.memory import trigger as triggers
from vismem_core.memory.memory import Memory
from vismem_core.plugins import reason

from .asking import Ask
from .batch import Batch, Row, decode
from .refused import Limits, RefusedError
from .writing import Answer, End, Piece, Text

Event = Piece | End | RefusedError
FAILED = "the model failed on this request; the server's log says why"


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        tell: gets what becomes of it, from a thread of ours: for each answer pieces and an end, or one error.
        until: when it has to be over, by ``time.monotonic``.
        gone: set by who does not wait for it any more.
        prompt: tokens of its prompt, known before its first event.
    """

    ask: Ask
    tell: Callable[[Event], None]
    until: float
    gone: bool = False
    prompt: int = 0
    answers: list[Answer] = field(default_factory=list)

    @property
    def begun(self) -> bool:
        """Whether anything was written."""
        return any(own.written for own in self.answers)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to do for it."""
        return self.gone or (bool(self.answers) and all(own.end is not None for own in self.answers))

    def refuse(self, error: RefusedError) -> None:
        """It gets no answer."""
        self.tell(error)
        self.gone = True


class Batcher:
    """One batch after the other around one memory.

    Args:
        batch: answers that are written together.
        report: gets a line about what failed.
    """

    def __init__(
        self,
        memory: Memory,
        limits: Limits,
        *,
        batch: int = 32,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.memory, self.limits, self.batch, self.report = memory, limits, batch, report
        self.trigger = memory.trigger
        self._waiting, self._begun = deque[Job](), list[Job]()
        self._changed, self._closed = threading.Condition(), False
        text = memory.model.config.get_text_config(decoder=True)
        self._context = int(getattr(text, "max_position_embeddings", None) or 0)
        told = memory.model.generation_config.eos_token_id
        ends = [told] if isinstance(told, int) else told or [memory.backbone.end_of_turn]
        self._ends = frozenset(map(int, ends))
        self._working = threading.Thread(target=self._work, name="batch", daemon=True)
        self._working.start()

    def submit(self, job: Job) -> None:
        """Let it wait for its turn."""
        with self._changed:
            if self._closed:
                raise RefusedError("the server is shutting down", 503)
            self._waiting.append(job)
            self._changed.notify_all()

    def close(self) -> None:
        """Finish what waits and runs; nothing more is taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._working.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
            self._begun = self._taken(self.batch)
            self._decode(self._begun, self._join)

    def _join(self, batch: Batch) -> None:
        """Between two passes of a batch: who waits joins it."""
        if jobs := self._taken(self.batch - batch.busy, self._acts(batch.trigger)):
            self._begun[:] = [job for job in self._begun if not job.over] + jobs
            self._decode(jobs, host=batch)

    def _taken(self, room: int, acts: bool | None = None) -> list[Job]:
        """Who waits, in order, as far as there is room. Nobody overtakes one whom the batch cannot take.

        Args:
            acts: whether the policy's own weights act in the batch. They act on all of its rows, or on none.
        """
        taken: list[Job] = []
        with self._changed:
            while self._waiting:
                job, own = self._waiting[0], self._acts(triggers.parse(self._waiting[0].ask.trigger or self.trigger))
                if not job.gone and (job.ask.copies > room or acts not in (None, own)):
                    break
                self._waiting.popleft()
                if not job.gone:
                    taken.append(job)
                    room, acts = room - job.ask.copies, own
        return taken

    def _acts(self, trigger: triggers.Trigger) -> bool:
        return self.memory.policy is not None and trigger.active

    def _decode(self, jobs: list[Job], join: Callable[[Batch], None] | None = None, host: Batch | None = None) -> None:
        """Decode a batch; if it fails, each request alone, so that one that cannot be answered harms no other.

        Args:
            join, host: see :class:`~vismem_core.serving.batch.Batch`.
        """
        try:
            if told := self._prepared([job for job in jobs if not self._late(job)]):
                decode(self.memory, *told, join, host)
            return
        except Exception as error:  # a model's own code, or a device's
            failed = cut(reason(error), 300)
        several = len(jobs) > 1  # with those who joined
        for job in [job for job in jobs if not job.over]:
            if several and not job.begun:
                self._decode([job], host=host)
            else:
                self.report(f"a request failed: {failed}")
                job.refuse(RefusedError(FAILED, 500))

    def _late(self, job: Job) -> bool:
        """Whether a request has waited in vain, or is over already."""
        if not job.over and time.monotonic() > job.until:
            job.refuse(RefusedError("the request has waited too long for its turn", 503, code="timeout"))
        return job.over

    def _prepared(self, jobs: list[Job]) -> tuple[BatchFeature, list[Row]] | None:
        """What the model takes, and a row for each prompt; requests that it cannot take are refused."""
        while jobs:
            left_out: list[Skipped] = []
            samples = [job.ask.sample for job in jobs for _ in range(job.ask.copies)]
            usable, inputs = prepare(self.memory.backbone, samples, left_out)
            faults = _faults(samples, usable, left_out)
            if inputs is not None and not faults:
                faults = self._begin(jobs, inputs["attention_mask"].sum(1).tolist())
                if not faults:
                    return inputs, [row for job in jobs for row in self._rows(job)]
            for job in jobs:
                if (error := faults.get(id(job.ask.sample))) is not None:
                    job.refuse(error)
            jobs = [job for job in jobs if not job.over]
        return None

    def _begin(self, jobs: Sequence[Job], lengths: Sequence[int]) -> dict[int, RefusedError]:
        """Say what is to be written, where prompts are so long; the faults of those that are too long."""
        at, faults = 0, dict[int, RefusedError]()
        for job in jobs:
            job.prompt = lengths[at]
            at += job.ask.copies
            job.answers = self._answers(job)
            if not job.answers:
                told = f"the prompt has {job.prompt} tokens, and the model's context is {self._context} with the answer"
                code = "context_length_exceeded"
                faults[id(job.ask.sample)] = RefusedError(told, field="messages", code=code)
        return faults

    def _rows(self, job: Job) -> list[Row]:
        ask = job.ask
        told = ask.trigger or self.trigger, ask.temperature, ask.top_p, ask.seed, lambda: job.gone
        return [Row(own, *told) for own in job.answers]

    def _answers(self, job: Job) -> list[Answer]:
        """What is to be written, as far as the model's context goes; nothing where it does not go so far."""
        tokens, most = self.memory.tokens, job.ask.tokens or self.limits.tokens
        if self._context:
            spare, columns = self._context - job.prompt, self.memory.columns
            if job.ask.tokens is None:
                most = next((own for own in range(min(most, spare), 0, -1) if columns(own) <= spare), 0)
            if not most or columns(most) > spare:
                return []
        told = tokens, self._ends, most, job.until, job.tell, job.ask.stream
        return [Answer(index, Text(self._text, job.ask.stop), *told) for index in range(job.ask.copies)]

    def _text(self, ids: Sequence[int]) -> str:
        told: str = self.memory.backbone.processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return told


def _faults(
    samples: Sequence[Sample], usable: Sequence[Sample], left_out: Sequence[Skipped]
) -> dict[int, RefusedError]:
    """Why samples were left out, by identity."""
    kept = {id(own) for own in usable}
    lost = [own for own in samples if id(own) not in kept]
    return {
        id(own): RefusedError(skipped.reason.partition(": ")[2], field="messages")
        for own, skipped in zip(lost, left_out, strict=True)
    }
