"""Grammars of clients, compiled before their requests reach the engine, whose thread all streams wait for."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from orogen.infer.constrain import Compiled, Constraints
from orogen.infer.request import Full, Grammar

MOST_WAITING = 64  # grammars, each of which may take some seconds


class Grammars:
    """Compiles one grammar after another, in a thread of their own."""

    def __init__(self, constraints: Constraints) -> None:
        self._constraints = constraints
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._waiting = 0

    async def prepare(self, grammar: Grammar) -> Compiled:
        """Compiles a grammar. The engine finds it as long as the caller holds it. Raises ConfigError for one that is
        wrong or takes too much, Full if too many wait."""
        if self._waiting >= MOST_WAITING:
            raise Full(f"{self._waiting} grammars wait; expected at most {MOST_WAITING}")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._constraints.prepare, grammar)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Ends the thread and the process in which grammars are tried."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._constraints.close()
