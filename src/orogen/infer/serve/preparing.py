"""What is done for requests before the engine has them: bodies parsed, templates rendered, texts encoded."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from orogen.infer.request import Full
from orogen.infer.serve.errors import HttpError, closed, full
from orogen.infer.service import CLOSING, Service

T = TypeVar("T")
WORKERS = 4


class Preparing:
    """Threads for that work, which takes seconds for large bodies: the event loop must not wait for it.

    seconds: for each piece of work, waiting included. As many pieces as the service may have requests may be under way
    or wait, those with a chat template and the others each. A piece that is given up counts until its thread is done
    with it, for nothing can stop that.
    """

    def __init__(self, service: Service, *, seconds: float) -> None:
        self._service, self._seconds = service, seconds
        self._bodies = ThreadPoolExecutor(WORKERS, "bodies")
        # A thread of their own: a template that takes its time holds up no other route.
        self._chats = ThreadPoolExecutor(1, "prompts")
        self._pictures = ThreadPoolExecutor(1, "pictures")
        self._lock = threading.Lock()
        self._under_way = dict.fromkeys((self._bodies, self._chats, self._pictures), 0)
        self._reserved: set[Reservation] = set()

    def reserve(self, requests: int = 1) -> "Reservation":
        """Room among the engine's requests for so many that are prepared together."""
        return Reservation(self, min(requests, self._service.limit))  # more are refused by what would submit them

    async def run(self, work: Callable[..., T], *arguments: Any, reserved: "Reservation | None" = None) -> T:
        """`work(*arguments)`, which takes the reservation as it begins. Raises HttpError with status 429 if too much is
        under way, or there is no room; 503 as soon as the server shuts down; 504 if time is up."""
        return await self._run(self._bodies, _with(reserved, work), *arguments)

    async def run_chat(self, work: Callable[..., T], *arguments: Any, reserved: "Reservation | None" = None) -> T:
        """As `run`, for work with a chat template."""
        return await self._run(self._chats, _with(reserved, work), *arguments)

    async def run_seen(self, work: Callable[..., T], *arguments: Any, reserved: "Reservation | None" = None) -> T:
        """As `run`, for answers to images, which come one after another."""
        return await self._run(self._pictures, _with(reserved, work), *arguments)

    def take(self, reserved: "Reservation") -> None:
        """Counts a reservation. Raises HttpError with status 429 if there is no room for it."""
        with self._lock:
            count = self._service.open + sum(other.requests for other in self._reserved)
            if count + reserved.requests > (limit := self._service.limit):
                more = f", and {reserved.requests} more asked for" if reserved.requests > 1 else ""
                raise full(Full(f"{count} requests are open or prepared{more}; expected at most {limit}"))
            self._reserved.add(reserved)

    def give_back(self, reserved: "Reservation") -> None:
        """The engine has the request, or nobody wants it any more."""
        with self._lock:
            self._reserved.discard(reserved)

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
        with self._lock:
            if (count := self._under_way[pool]) >= (limit := self._service.limit):
                raise full(Full(f"{count} requests are being prepared; expected at most {limit}"))
            self._under_way[pool] += 1
        future = pool.submit(work, *arguments)
        future.add_done_callback(lambda future: self._ended(pool, future))
        wrapped, closing = asyncio.wrap_future(future), asyncio.ensure_future(self._service.closing.wait())
        try:
            done, _ = await asyncio.wait({wrapped, closing}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
            if wrapped in done:
                return wrapped.result()
        finally:
            closing.cancel()
            wrapped.cancel()  # what has not begun never does
        if closing in done:
            raise closed(CLOSING)
        raise HttpError(504, f"the request took more than {self._seconds:g} s to prepare", kind="timeout_error")

    def _ended(self, pool: ThreadPoolExecutor, _: "Future[Any]") -> None:
        with self._lock:
            self._under_way[pool] -= 1

    def close(self) -> None:
        """Ends the threads after what they are at."""
        for pool in self._under_way:
            pool.shutdown(wait=False, cancel_futures=True)


class Reservation:
    """Room among the engine's requests for those that are prepared, from the beginning of that work until the engine
    has them, or to the end of a `with` block. Work that waits for a thread has none, so that it keeps no other route
    from the engine; and nobody waits for a template to hear then that the queue is full.
    """

    def __init__(self, preparing: Preparing, requests: int) -> None:
        self._preparing, self.requests, self._left = preparing, requests, False

    def take(self) -> None:
        """In the thread that works. Raises HttpError with status 429 if there is no room."""
        self._preparing.take(self)
        if self._left:  # the client vanished as the work began
            self._preparing.give_back(self)

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def counted(self) -> None:
        """One of the requests is among the open ones, and needs no room here any more."""
        self.requests -= 1

    def leave(self) -> None:
        """Gives the room back. May be called again."""
        self._left = True
        self._preparing.give_back(self)


def _with(reserved: Reservation | None, work: Callable[..., T]) -> Callable[..., T]:
    if reserved is None:
        return work

    def with_room(*arguments: Any) -> T:
        reserved.take()
        return work(*arguments)

    return with_room
