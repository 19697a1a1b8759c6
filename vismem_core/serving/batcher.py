"""Requests that wait, and the lanes that decode them: whoever comes together is decoded together.

A lane takes what waits (up to a batch, all with one trigger), decodes it, and takes again; rows that are done leave its
batch, and rows do not join one. Several lanes take turns, a step each, so that what comes while one is busy does not
wait for the end of its longest answer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vismem_core.answers.checking import prepare
from vismem_core.errors import cut
from vismem_core.files.samples import Sample, Skipped
from vismem_core.memory.memory import Memory
from vismem_core.plugins import reason

from .asking import Ask
from .batch import Row, decode
from .lanes import Baton
from .refused import Limits, RefusedError
from .writing import Answer, End, Piece, Text

Event = Piece | End | RefusedError
GATHER, PATIENCE = 0.01, 0.1
"""Seconds without anybody new, after which all who came together are there; and that the first waits at most."""
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
    """Lanes around one memory.

    Args:
        batch: answers that a lane writes together.
        lanes: that take turns.
        report: gets a line about what failed.
    """

    def __init__(
        self,
        memory: Memory,
        limits: Limits,
        *,
        batch: int = 32,
        lanes: int = 2,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.memory, self.limits, self.batch, self.report = memory, limits, batch, report
        self.trigger = memory.trigger
        self._baton, self._taking = Baton(), threading.Lock()
        self._waiting: deque[Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        text = memory.model.config.get_text_config(decoder=True)
        self._context = int(getattr(text, "max_position_embeddings", None) or 0)
        told = memory.model.generation_config.eos_token_id
        ends = [told] if isinstance(told, int) else told or [memory.backbone.end_of_turn]
        self._ends = frozenset(map(int, ends))
        self._lanes = [threading.Thread(target=self._work, name=f"lane {at}", daemon=True) for at in range(lanes)]
        for lane in self._lanes:
            lane.start()

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
        for lane in self._lanes:
            lane.join()

    def _work(self) -> None:
        while jobs := self._next():
            with self._baton:
                self._decode(jobs)

    def _next(self) -> list[Job]:
        """The next batch; empty when the server closes and nothing waits."""
        with self._taking:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._closed)
                    if not self._waiting:
                        return []
                self._gather()
                with self._changed:
                    if taken := self._taken():
                        return taken

    def _gather(self) -> None:
        """Wait for others while they come, and there is room for them."""
        until, seen = time.monotonic() + PATIENCE, 0
        while seen < (now := len(self._waiting)) < self.batch and time.monotonic() < until:
            seen = now
            time.sleep(GATHER)

    def _taken(self) -> list[Job]:
        """The first that waits, and others with its trigger, in order."""
        taken, left, room = list[Job](), deque[Job](), self.batch
        for job in self._waiting:
            alike = not taken or job.ask.trigger == taken[0].ask.trigger
            if job.gone:
                continue
            if alike and job.ask.copies <= room:
                taken.append(job)
                room -= job.ask.copies
            else:
                left.append(job)
        self._waiting = left
        return taken

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Decode a batch; if it fails, each request alone, so that one that cannot be answered harms no other."""
        failed = None
        try:
            self._together([job for job in jobs if not self._late(job)])
        except Exception as error:  # a model's own code, or a device's
            failed = cut(reason(error), 300)
        if failed is None:
            return
        for job in [job for job in jobs if not job.over]:
            if len(jobs) > 1 and not job.begun:
                self._decode([job])
            else:
                self.report(f"a request failed: {failed}")
                job.refuse(RefusedError(FAILED, 500))

    def _late(self, job: Job) -> bool:
        """Whether a request has waited in vain, or is over already."""
        if not job.over and time.monotonic() > job.until:
            job.refuse(RefusedError("the request has waited too long for its turn", 503, code="timeout"))
        return job.over

    def _together(self, jobs: Sequence[Job]) -> None:
        left_out: list[Skipped] = []
        samples = [job.ask.sample for job in jobs for _ in range(job.ask.copies)]
        if not samples:
            return None
        usable, inputs = prepare(self.memory.backbone, samples, left_out)
        if inputs is None or len(usable) < len(samples):
            return self._without(jobs, _faults(samples, usable, left_out))
        lengths = inputs["attention_mask"].sum(1).tolist()
        at, faults = 0, dict[int, RefusedError]()
        for job in jobs:
            job.prompt = lengths[at]
            at += job.ask.copies
            job.answers = self._answers(job)
            if not job.answers:
                told = f"the prompt has {job.prompt} tokens, and the model's context is {self._context} with the answer"
                code = "context_length_exceeded"
                faults[id(job.ask.sample)] = RefusedError(told, field="messages", code=code)
        if faults:
            return self._without(jobs, faults)
        rows = [
            Row(own, job.ask.temperature, job.ask.top_p, job.ask.seed, lambda job=job: job.gone)  # type: ignore[misc]
            for job in jobs
            for own in job.answers
        ]
        decode(self.memory, inputs, rows, jobs[0].ask.trigger or self.trigger, self._baton)
        return None

    def _without(self, jobs: Sequence[Job], faults: dict[int, RefusedError]) -> None:
        """Refuse some, and go on with the others."""
        for job in jobs:
            if (error := faults.get(id(job.ask.sample))) is not None:
                job.refuse(error)
        self._together([job for job in jobs if id(job.ask.sample) not in faults])

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
