"""Server-sent events: a stream as it is written, ended by its client, its time or an error."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orogen.infer.serve.errors import HttpError

LAST_SECONDS = 5.0  # for the end of a stream to reach its client


class Framing(NamedTuple):
    """How a stream is written. event: the text of an object. failure: the object that tells an error. done: the last
    text."""

    event: Callable[[dict[str, Any]], str]
    failure: Callable[[HttpError], dict[str, Any]]
    done: str


PLAIN = Framing(lambda event: f"data: {json.dumps(event, ensure_ascii=False)}\n\n", HttpError.body, "data: [DONE]\n\n")


class Events(Response):
    """Server-sent events. events: the objects to send; an HttpError that they raise is sent as one too. close: called
    at the end, whatever happened."""

    def __init__(
        self, events: AsyncIterator[dict[str, Any]], *, timeout: float, close: Callable[[], None],
        headers: dict[str, str], framing: Framing,
    ) -> None:  # fmt: skip
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._events, self._timeout, self._close, self._framing = events, timeout, close, framing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the events end, the client vanishes or time is up."""
        work, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(vanished(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            self._close()
            await ended(work, gone)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with asyncio.timeout(self._timeout):
                async for event in self._events:
                    await _send_text(send, self._framing.event(event))
            await self._end(send)
        except TimeoutError:
            late = HttpError(504, f"the request took more than {self._timeout:g} s", kind="timeout_error")
            await self._end(send, late)
        except HttpError as error:
            await self._end(send, error)

    async def _end(self, send: Send, error: HttpError | None = None) -> None:
        self._close()
        # A client that reads nothing any more may be what took so long.
        with anyio.move_on_after(LAST_SECONDS):
            if error is not None:
                await _send_text(send, self._framing.event(self._framing.failure(error)))
            await _send_text(send, self._framing.done)
            await send({"type": "http.response.body", "body": b""})


async def _send_text(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def vanished(receive: Receive) -> None:
    """Returns once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def ended(*tasks: "asyncio.Future[Any]") -> None:
    """Cancels tasks and waits for them; what they raise has been told or has no one to hear it."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
