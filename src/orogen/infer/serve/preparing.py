"""What is done for requests before the engine has them: bodies parsed, templates rendered, texts encoded."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from orogen.infer.request import Full
from orogen.infer.serve.errors import HttpError, full

T = TypeVar("T")
WORKERS = 4


class Preparing:
    """Threads for that work, which takes seconds for large bodies: the event loop must not wait for it.

    limit: how many pieces of work may be under way or wait for a thread at a time. seconds: for each, waiting included.
    A piece that is given up counts until its thread is done with it, for nothing can stop that.
    """

    def __init__(self, *, limit: int, seconds: float) -> None:
        self._limit, self._seconds = limit, seconds
        self._bodies = ThreadPoolExecutor(WORKERS, "bodies")
        # A thread of their own: a template that takes its time holds up no other route.
        self._chats = ThreadPoolExecutor(1, "prompts")
        self._lock, self._open = threading.Lock(), 0

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work(*arguments)`. Raises HttpError with status 429 if too much is under way, 504 if time is up."""
        return await self._run(self._bodies, work, *arguments)

    async def run_chat(self, work: Callable[..., T], *arguments: Any) -> T:
        """As `run`, for work with a chat template."""
        return await self._run(self._chats, work, *arguments)

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
        with self._lock:
            if self._open >= self._limit:
                raise full(Full(f"{self._open} requests are being prepared; expected at most {self._limit}"))
            self._open += 1
        future = pool.submit(work, *arguments)
        future.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            message = f"the request took more than {self._seconds:g} s to prepare"
            raise HttpError(504, message, kind="timeout_error") from None

    def _ended(self, _: "Future[Any]") -> None:
        with self._lock:
            self._open -= 1

    def close(self) -> None:
        """Ends the threads after what they are at."""
        for pool in (self._bodies, self._chats):
            pool.shutdown(wait=False, cancel_futures=True)
