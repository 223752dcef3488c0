"""A trace of some steps of a run, in RUN/profile, and the table of where their time goes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.report.profile import TABLE, step_table
from orogen.report.profile_page import lines

STEPS = re.compile(r"([1-9]\d*)(?::([1-9]\d*))?")


class Steps(NamedTuple):
    """The steps to trace, both ends included."""

    first: int
    last: int

    @classmethod
    def of(cls, text: str) -> "Steps":
        """Reads `10` or `10:13`. Raises ConfigError."""
        match = STEPS.fullmatch(text)
        steps = match and cls(int(match[1]), int(match[2] or match[1]))
        if not steps or steps.last < steps.first:
            raise ConfigError(f"--profile {text!r}; expected a step or a range of steps, such as 10:13")
        return steps


class StepProfile:
    """Traces a run's steps. Use it as a context manager around them: a stop on the way ends the trace.

    steps: None traces nothing. The device is idle when the trace begins and when it ends. The table is written to
    RUN/profile/table.json after the last step; a trace that cannot be written or read is reported by `log` and does not
    stop the run. Of several processes each traces its own devices, in a folder of its own; the first one's table is
    written.
    """

    def __init__(self, steps: Steps | None, run_dir: Path, log: Callable[[str], None]):
        self._steps, self._folder, self._log = steps, run_dir / "profile", log
        self._running = False

    def check(self, done: int, last: int) -> None:
        """Raises ConfigError unless a call that goes on after step `done`, up to step `last`, takes the steps, and at
        least one before, which compiles. A resumed run, whose command may be the one that began it, only says by `log`
        that it has passed them, and traces nothing."""
        if self._steps is not None and 0 < done and self._steps.first <= done + 1 and self._steps.last <= last:
            self._log(f"--profile {self._steps.first}:{self._steps.last}: no trace, since the run is at step {done}")
            self._steps = None
        if self._steps is not None and not done + 1 < self._steps.first <= self._steps.last <= last:
            raise ConfigError(
                f"--profile {self._steps.first}:{self._steps.last}; expected steps from {done + 2}, since the one "
                f"before compiles, to {last}, the last of the run"
            )

    def before(self, number: int, state: Any) -> None:
        """Starts the trace if step `number`, which `state` enters, is the first one."""
        if self._steps is None or number != self._steps.first or self._running:  # a run may go back to earlier steps
            return
        jax.block_until_ready(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of a Python function would be an event
        jax.profiler.start_trace(str(self._traced), profiler_options=options)
        self._running = True

    def after(self, number: int, state: Any) -> None:
        """Ends the trace and writes the table if step `number`, which `state` leaves, is the last one."""
        if self._steps is None or not self._running or number != self._steps.last:
            return
        jax.block_until_ready(state)
        try:
            self._end()
            if jax.process_index() > 0:
                return
            table = step_table(self._traced, steps=self._steps.last - self._steps.first + 1)
            write_atomically(self._folder / TABLE, json.dumps(table, indent=2).encode())
        except (OSError, ValueError, RuntimeError) as error:  # ConfigError is a ValueError
            self._log(f"--profile: no table of steps {self._steps.first} to {number}: {error}")
            return
        self._log(f"steps {self._steps.first} to {number} are traced in {self._traced}")
        for line in lines(table):
            self._log(line)

    @property
    def _traced(self) -> Path:
        # A trace is named after the host, which may run several processes.
        return self._folder / f"process_{jax.process_index()}" if jax.process_count() > 1 else self._folder

    def _end(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:
            self._end()
