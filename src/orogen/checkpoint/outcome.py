"""The outcome of a checkpoint's write, on which all processes of a run agree within seconds.

Without this, orbax lets a process wait for one whose part failed: 5 minutes for folders that are not created, 20 for
arrays that are not written.
"""

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator

import orbax.checkpoint as ocp
from orbax.checkpoint._src.futures import future, synchronization  # what orbax waits for, which it exports to nobody

from orogen.parallel import distributed

FAILED = -1  # settled in place of the step
ABANDONED_SECONDS = 60  # of waiting for what is already being written
LOOK_SECONDS = 0.5  # between looks at the others, while this process writes
ELSEWHERE = "another process could not do its part"


class ElsewhereError(RuntimeError):
    """Another process could not do its part of a write."""


@contextlib.contextmanager
def shared(done: str, step: int) -> Iterator[None]:
    """Around each process's part of the write of checkpoint `step`; that of the first completes it. However a part
    ends, the others learn it through `done`, a name that all have: ElsewhereError is raised if another one failed."""
    ended = FAILED
    try:
        yield
        ended = step
    finally:
        if distributed.first() or ended == FAILED:
            distributed.propose(done, ended)
        if ended == FAILED:
            _abandon()
    if distributed.count() > 1 and distributed.wait_until_settled(done) == FAILED:
        raise ElsewhereError(ELSEWHERE)


def new_writer(done: Callable[[], str]) -> ocp.AsyncCheckpointer:
    """A writer of checkpoints, on all processes. done: the name of the outcome of the write that is on the way, as
    `shared` has it. A barrier between the parts of that write raises ElsewhereError as soon as one of them has failed.
    """

    def meet(*, key: str, timeout_ms: int) -> None:
        name = done()
        if not distributed.meet(f"{name}/{key}", timeout_ms / 1e3, lambda: distributed.settled(name) == FAILED):
            raise ElsewhereError(ELSEWHERE)

    options = ocp.options.AsyncOptions(barrier_sync_fn=meet if distributed.count() > 1 else None)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def wait(writer: ocp.AsyncCheckpointer, done: str) -> None:
    """Waits for this process's part of what `writer` writes. Raises what it raises, and ElsewhereError if another part
    has failed, for which orbax may wait much longer."""
    if distributed.count() > 1:
        while (thread := writer._async_manager._thread) is not None and thread.is_alive():
            if distributed.settled(done) == FAILED:
                _cancel()
            thread.join(LOOK_SECONDS)
    writer.wait_until_finished()
    if distributed.count() > 1 and distributed.settled(done) == FAILED:
        raise ElsewhereError(ELSEWHERE)


def _cancel() -> None:
    """Ends the threads of orbax that are at work: they may wait for what the part that failed does not do."""
    for thread in threading.enumerate():
        if isinstance(thread, future._SignalingThread) and getattr(thread, "main_task", None) is not None:
            thread.cancel()


def _abandon() -> None:
    """Releases the threads of all processes that wait for orbax to create the folders of the failed write, and waits
    for those of this process: what they write is removed afterwards."""
    contract, number = future.AwaitableSignalsContract, synchronization.OperationIdGenerator.get_current_operation_id()
    future.set_signals(contract.get_awaitable_signals_from_contract(number), operation_id=number)
    for thread in threading.enumerate():
        if isinstance(thread, future._SignalingThread):
            threading.Thread.join(thread, ABANDONED_SECONDS)  # orbax's own `join` raises what the thread raised


def failed(done: str) -> None:
    """Reports that this process could not begin its part."""
    if distributed.count() > 1:
        distributed.propose(done, FAILED)


def reason(error: Exception) -> str:
    """Why a write failed, in a few words. tensorstore states the system's error by its number, in a long text."""
    if isinstance(error, ElsewhereError):
        return str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"os_error_code='(\d+)'", str(error))):
        number = int(found[1])
    return os.strerror(number) if number else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
