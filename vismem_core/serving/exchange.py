"""One request on the web: its body in, its answer out; whoever leaves frees a place and rows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from vismem_core.errors import cut
from vismem_core.plugins import reason

from . import asking, replies
from .batcher import Batcher, Event, Job
from .refused import Limits, RefusedError
from .replies import Reply
from .writing import End, Piece


@dataclass
class Service:
    """What is served.

    Attributes:
        name: of the model.
        key: that clients must send, if any.
        urls: whether images may be fetched.
        report: gets a line about what failed.
        requests: how many there are now.
    """

    name: str
    batcher: Batcher
    limits: Limits
    key: str | None = None
    urls: bool = False
    report: Callable[[str], None] = lambda line: None
    requests: int = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests; until the context ends.

        Raises:
            RefusedError: there are as many as there may be.
        """
        if self.requests >= self.limits.requests:
            raise RefusedError(f"there are {self.requests} requests already: try again later", 429, code="queue_full")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1


class Answered(Response):
    """A response that is made while the request has its place: whoever leaves gives it back, and their rows."""

    def __init__(self, service: Service, request: Request) -> None:
        self.service, self.request, self.background = service, request, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self.service.place(), _Exchange(self.service, self.request) as own:
                if (response := await own.response()) is not None:
                    await response(scope, receive, send)
        except RefusedError as error:  # there was no place
            await refusal(error)(scope, receive, send)


def refusal(error: RefusedError) -> Response:
    """An error as a response."""
    return JSONResponse(error.to_dict(), error.status)


class _Exchange:
    """From a request's body to the response."""

    def __init__(self, service: Service, request: Request) -> None:
        self.service, self.request, self.until = service, request, time.monotonic() + service.limits.seconds
        self.events = asyncio.Queue[Event]()
        self.job: Job | None = None

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *error: object) -> None:
        if self.job is not None:
            self.job.gone = True

    async def response(self) -> Response | None:
        """What is answered; None where the client has gone."""
        try:
            return await self._answered(await self._read())
        except RefusedError as error:
            return refusal(error)
        except ClientDisconnect:
            return None
        except Exception as error:
            self.service.report(f"a request failed: {cut(reason(error), 300)}")
            return refusal(RefusedError("the server failed on this request", 500))

    async def _read(self) -> Job:
        service, loop = self.service, asyncio.get_running_loop()
        try:
            body = await asyncio.wait_for(_body(self.request, service.limits), service.limits.seconds)
        except asyncio.TimeoutError:
            raise RefusedError("the request took too long to come", 408) from None
        ask = await asyncio.to_thread(asking.read, body, service.name, service.limits, service.urls)
        self.job = Job(ask, lambda told: _pass(loop, self.events, told), self.until)
        return self.job

    async def _answered(self, job: Job) -> Response | None:
        service, leaving = self.service, asyncio.create_task(_left(self.request))
        reply = Reply(job, service.name, job.ask.trigger or service.batcher.trigger)
        try:
            service.batcher.submit(job)
            while (told := await _next(self.events, leaving)) is not None:
                if isinstance(told, RefusedError):
                    raise told
                reply.add(told)
                if job.ask.stream:  # from here on it looks for itself whether the client is there
                    return _streamed(reply, told, self.events)
                if reply.over:
                    return JSONResponse(reply.whole())
            return None
        finally:
            leaving.cancel()


async def _body(request: Request, limits: Limits) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a page in a browser cannot send elsewhere unasked
        raise RefusedError("send JSON, with content-type: application/json", 415)
    told = request.headers.get("content-length", "")
    most = RefusedError(f"the body has more than {limits.body:,} bytes", 413, code="request_too_large")
    if told.isdigit() and int(told[:20]) > limits.body:
        raise most
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limits.body:
            raise most
    return bytes(body)


def _pass(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], told: Event) -> None:
    """From a lane's thread to the request's task."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(events.put_nowait, told)


async def _left(request: Request) -> None:
    """Returns when the client has gone; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next(events: asyncio.Queue[Event], leaving: asyncio.Task[None]) -> Event | None:
    """What comes next, or None where the client leaves before."""
    coming = asyncio.create_task(events.get())
    await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
    if coming.done():
        return coming.result()
    coming.cancel()
    return None


def _streamed(reply: Reply, first: Piece | End, events: asyncio.Queue[Event]) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        for own in reply.begin():
            yield own
        yield reply.chunk(first)
        while not reply.over:
            told = await events.get()
            if isinstance(told, RefusedError):
                yield replies.event(told.to_dict())
                return
            reply.add(told)
            yield reply.chunk(told)
        for own in reply.finish():
            yield own

    return StreamingResponse(chunks(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
