"""An engine in a thread of its own, for many clients on one event loop.

The engine is not thread-safe: one thread submits to it, steps it and cancels. The event loop's side hands requests over
and receives streams of outputs; nothing else is shared.
"""

import asyncio
import collections
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Protocol

from orogen.infer.batch import Stepped
from orogen.infer.request import CANCELLED, ERROR, Full, Output, Request


class Served(Stepped, Protocol):
    """What the service needs of an engine; `infer/engine.py` has it."""

    def submit(self, request: Request, *, salt: str = "") -> int:
        """As a batch needs it. Requests of different salts share no cached prefix."""
        ...

    def cancel(self, number: int) -> None:
        """Ends a request; one that has ended already is no error."""
        ...


CLOSING = "the server is shutting down"


class ClosedError(Exception):
    """The service takes no more requests: it drains, or its engine failed."""


class Stream:
    """The outputs of one request, as an asynchronous iterator that ends after the one with `finish`.

    Whoever opened a stream closes it, also after its end; closing one that still runs cancels the request.
    """

    def __init__(self, service: "Service", arrived: "asyncio.Queue[Output] | None" = None) -> None:
        self._service = service
        self._arrived: asyncio.Queue[Output] = asyncio.Queue() if arrived is None else arrived
        self._ended = False
        self.number: int | None = None

    def __aiter__(self) -> AsyncIterator[Output]:
        return self

    async def __anext__(self) -> Output:
        if self._ended:
            raise StopAsyncIteration
        output = await self._arrived.get()
        self._ended = output.finish is not None
        return output

    def put(self, output: Output) -> None:
        """Adds an output, on the event loop."""
        self._arrived.put_nowait(output)

    def close(self) -> None:
        """Cancels the request if it still runs."""
        self._service.forget(self)


class Service:
    """Runs an engine for the event loop on which it was started.

    limit: how many requests may be open at a time, waiting ones included; one more raises Full. A step that raises ends
    every open request with that error, and the service takes no more.
    """

    def __init__(self, engine: Served, *, limit: int) -> None:
        self._engine, self.limit = engine, limit
        self._commands: collections.deque[Callable[[], None] | None] = collections.deque()
        self._wake = threading.Condition()
        self._streams: dict[int, Stream] = {}
        self._opening: set[Stream] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.closing = asyncio.Event()  # what is prepared for the engine then is prepared in vain
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Starts the engine's thread; outputs arrive on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken, since the server ends."""
        return self.closing.is_set()

    @property
    def open(self) -> int:
        """How many requests are open."""
        return len(self._streams) + len(self._opening)

    async def submit(
        self,
        request: Request,
        arrived: "asyncio.Queue[Output] | None" = None,
        *,
        salt: str = "",
        counted: Callable[[], None] = lambda: None,
    ) -> Stream:
        """The stream of a request that the engine has taken.

        arrived: where its outputs go in place of a queue of its own, as for several requests whose outputs are merged.
        salt: requests of different ones share no cached prefix. counted: called when the request is counted as open.
        Raises ConfigError for one that can never run, Full if too many are open, ClosedError while the service drains
        and after its engine failed, and what else the engine raises.
        """
        if self.draining or self.failure is not None:
            raise ClosedError(CLOSING if self.draining else "the engine failed")
        if self.open >= self.limit:
            raise Full(f"{self.open} requests are open; expected at most {self.limit}")
        stream = Stream(self, arrived)
        taken: Future[int] = Future()
        self._opening.add(stream)
        counted()
        self._idle.clear()
        try:
            self._command(lambda: self._take(request, salt, stream, taken))
            # Shielded: a client that vanishes here must not leave a request behind that nobody knows of.
            await asyncio.shield(asyncio.wrap_future(taken))
        except asyncio.CancelledError:
            taken.add_done_callback(self._abandon)
            raise
        finally:
            self._opening.discard(stream)
            self._check_idle()
        return stream

    async def between(self, action: Callable[[], None]) -> None:
        """Carries out what concerns the engine between two of its steps. Raises what the action raises."""
        done: Future[None] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():  # who asked for it has gone
                return
            try:
                done.set_result(action())
            except Exception as error:  # of any type: whoever waits is told
                done.set_exception(error)

        self._command(run)
        await asyncio.wrap_future(done)

    def forget(self, stream: Stream) -> None:
        """Lets go of a stream, and cancels its request unless it has ended. On the event loop."""
        number = stream.number
        if number is not None and self._streams.pop(number, None) is not None:
            self._command(lambda: self._cancel(number))
            self._check_idle()

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, waits up to `seconds` for those that run, then cancels what is left."""
        self.closing.set()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            for number, stream in list(self._streams.items()):
                stream.put(Output(number, finish=CANCELLED, error="the server shut down"))
                self.forget(stream)

    async def close(self) -> None:
        """Ends the thread after its step."""
        self.closing.set()
        self._command(None)
        await asyncio.to_thread(self._thread.join)

    def _command(self, command: Callable[[], None] | None) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _check_idle(self) -> None:
        if not self.open:
            self._idle.set()

    # The engine's thread.

    def _run(self) -> None:
        while self._obey():
            try:
                outputs = self._engine.step()
            except Exception as error:
                self._break(error)
                continue
            if outputs:
                self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _obey(self) -> bool:
        """Carries out what was commanded, waiting for something to do; whether to step on."""
        while True:
            with self._wake:
                while not self._commands and not self._runs():
                    self._wake.wait()
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                if command is None:
                    return False
                command()
            if self._runs():
                return True

    def _runs(self) -> bool:
        return self.failure is None and self._engine.busy

    def _take(self, request: Request, salt: str, stream: Stream, taken: "Future[int]") -> None:
        if self.failure is not None:
            return taken.set_exception(ClosedError("the engine failed"))
        try:
            number = self._engine.submit(request, salt=salt)
        except Exception as error:  # a request that is not taken changes nothing for the others
            return taken.set_exception(error)
        # Comes before any output of it, for the loop calls in order.
        self._loop.call_soon_threadsafe(self._opened, number, stream, taken)

    def _cancel(self, number: int) -> None:
        if self.failure is None:
            try:
                self._engine.cancel(number)
            except Exception as error:
                self._break(error)

    def _break(self, error: Exception) -> None:
        """The engine has a fault: every client hears of it, and nothing is run any more."""
        self.failure = error
        self._loop.call_soon_threadsafe(self._fail, error)

    # The event loop.

    def _opened(self, number: int, stream: Stream, taken: "Future[int]") -> None:
        stream.number = number
        self._opening.discard(stream)
        self._streams[number] = stream
        taken.set_result(number)

    def _abandon(self, taken: "Future[int]") -> None:
        """Cancels a request whose client vanished while it was handed over."""
        if taken.exception() is None and (stream := self._streams.get(taken.result())) is not None:
            self.forget(stream)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.number)
            if stream is None:  # cancelled while the step ran
                continue
            stream.put(output)
            if output.finish is not None:
                del self._streams[output.number]
        self._check_idle()

    def _fail(self, error: Exception) -> None:
        for number, stream in self._streams.items():
            stream.put(Output(number, finish=ERROR, error=f"the engine failed: {error}"))
        self._streams.clear()
        self._check_idle()
