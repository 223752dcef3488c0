"""What an engine holds on its devices, and the calls on it, which a thread of its own dispatches in their order.

On a GPU XLA runs a `lax.while_loop` from the host, which reads the condition in every turn: to dispatch a call of
decoding takes as long as the call itself. A thread that waits there leaves the engine free to tell what came of the
call before, and to queue the next one.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax

from orogen.infer.forward import Caches, Report
from orogen.infer.knobs import Features
from orogen.infer.programs import Emitted, Held, Programs
from orogen.infer.sizes import Sizes

T = TypeVar("T")


class Lane:
    """The caches and states of one engine's slots, and its snapshots.

    Methods queue a call and return at once. Once a call has failed, no later one runs, and all raise its error where
    they are waited for: nobody knows what the caches are then.
    """

    def __init__(self, programs: Programs, sizes: Sizes) -> None:
        self._programs = programs
        self._held = Held(programs.start(sizes.slots, sizes.pages), programs.state())
        # With a page that nobody uses: jax forgets how arrays of no element are laid over devices.
        self._snapshots: Caches = programs.start(max(sizes.snapshots, 1), min(sizes.pages, 1))
        self._thread = ThreadPoolExecutor(1, "lane")
        self._error: BaseException | None = None
        self._last: Future[Any] | None = None
        self._last_before: Future[Any] | None = None  # of the round before

    def settled(self) -> tuple[Held, Caches]:
        """What slots hold, and snapshots, when all that is queued has been dispatched."""
        if self._last is not None:
            self._last.result()
        return self._held, self._snapshots

    def restore(self, into: Any, source: Any) -> None:
        """Copies a row of the snapshots, or zeros, to a slot; see `Stores.copy`."""

        def run() -> None:
            caches = self._programs.copy(self._held.caches, self._snapshots, into, source)
            self._held = self._held._replace(caches=caches)

        self._queue(run)

    def keep(self, into: Any, source: Any) -> None:
        """Copies what a slot has beside pages to a row of the snapshots."""

        def run() -> None:
            self._snapshots = self._programs.copy(self._snapshots, self._held.caches, into, source)

        self._queue(run)

    def write(self, text_dl: Any, into: Any) -> None:
        """Writes the text of a slot; see `Stores.write`."""

        def run() -> None:
            self._held = self._held._replace(caches=self._programs.write(self._held.caches, text_dl, into))

        self._queue(run)

    def read(self, inputs: tuple[Any, ...], *, logprobs: bool) -> tuple[Future[Emitted], Future[Any]]:
        """Reads pieces of prompts; see `Programs.read`. logprobs: whether they are wanted of what is emitted. Returns
        that, and the pieces' hidden states, which `score` takes."""
        hidden: Future[Any] = Future()

        def run() -> Emitted:
            held, (emitted, h_rtd) = self._programs.read(self._held, inputs)
            hidden.set_result(h_rtd)
            return self._take((held, emitted), logprobs=logprobs)

        return self._queue(run), hidden

    def score(self, hidden: Future[Any], next_rt: Any) -> Future[Report]:
        """Reports given tokens after the pieces that a call read; see `Programs.score`. To be queued behind it."""

        def run() -> Report:
            report = self._programs.score(hidden.result(), next_rt)
            for array in jax.tree.leaves(report):
                array.copy_to_host_async()
            return report

        return self._queue(run)

    def decode(self, inputs: tuple[Any, ...], *, features: Features, steps: int, logprobs: bool) -> Future[Emitted]:
        """Decodes; see `Programs.decode`."""
        run = lambda: self._programs.decode(self._held, inputs, features=features, steps=steps)  # noqa: E731
        return self._queue(lambda: self._take(run(), logprobs=logprobs))

    def end_round(self) -> None:
        """Waits until what was queued before this round has been dispatched, so that the queue stays short. Raises what
        went wrong there."""
        if self._last_before is not None:
            self._last_before.result()
        self._last_before = self._last

    def _take(self, results: tuple[Held, Emitted], *, logprobs: bool) -> Emitted:
        """What the host reads of what a call emitted, on its way to the host: each array takes a transfer."""
        self._held, emitted = results
        if not logprobs:
            emitted = emitted._replace(report=emitted.report._replace(logprob=None, top_ids=None, top_logprobs=None))
        for array in jax.tree.leaves(emitted):
            array.copy_to_host_async()
        return emitted

    def _queue(self, run: Callable[[], T]) -> Future[T]:
        def guarded() -> T:
            if self._error is not None:
                raise self._error
            try:
                return run()
            except BaseException as error:
                self._error = error
                raise

        self._last = future = self._thread.submit(guarded)
        return future
