"""Rolling back after bad steps: to the last regular checkpoint, then on with the data after the bad batches.

After `roll_back_after` bad steps in a row (see `train.health`), a run restores the last checkpoint of a step that is a
multiple of `checkpoint_every`, or its beginning, and continues with the batches after the last bad one; those in
between are never trained on (PaLM, arXiv:2204.02311, section 5.1; also OPT, arXiv:2205.01068). With `repeat_bad_steps`,
it first repeats the same steps on the same batches: different bits mean that the hardware is at fault, and the run
stops; equal bits mean that the data or the model is (the distinction of Megatron-LM's rerun state machine).

The step to return to depends only on step numbers, never on when the run was stopped or saved in between. `lost.jsonl`
records the roll-back before anything is computed after it. A run that is killed before that record is written repeats
the same bad steps; a run that is killed after it continues with the later data. Both end with the bits of a run that
was not killed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from orogen.checkpoint.steps import Checkpoints, NotSavedError
from orogen.config.checks import ConfigError
from orogen.config.run import TrainConfig
from orogen.parallel import distributed
from orogen.parallel.runtime import asks_for_same_bits
from orogen.report.lost import REPEAT, ROLL_BACK, add_lost, jumps, read_lost
from orogen.report.metrics import read_metrics
from orogen.train.health import NonFiniteError

# What a repeated step must give to the bit.
COMPARED = ("objective", "grad_norm")
SHOWN = 8  # devices that a message names


class BadStepsError(Exception):
    """The run has to roll back. position: of the data, after the batch of the last bad step; reason: why it is bad."""

    def __init__(self, step: int, position: dict[str, Any], reason: str):
        super().__init__(f"step {step}: {reason}")
        self.step, self.position, self.reason = step, position, reason


class FaultyHardwareError(RuntimeError):
    """A step that was computed twice from the same state and batch gave different bits."""


class Back:
    """Decides to which step a run rolls back, and compares repeated steps with the first time."""

    def __init__(self, train: TrainConfig, run_dir: Path, checkpoints: Checkpoints, log: Callable[[str], None]):
        self._train, self._run_dir, self._checkpoints, self._log = train, run_dir, checkpoints, log
        self._expected: dict[int, dict[str, Any]] = {}
        if train.repeat_bad_steps and jax.default_backend() == "gpu" and not asks_for_same_bits():
            expected = "False, or --xla deterministic: other programs on a GPU need not repeat to the bit"
            raise ConfigError(f"TrainConfig.repeat_bad_steps is True; expected {expected}")

    def position(self, step: int) -> dict[str, Any] | None:
        """The position of the data after checkpoint `step` if the run rolled back to it; else None."""
        return distributed.from_first(lambda: jumps(read_lost(self._run_dir)).get(step))

    def compare(self, record: Mapping[str, Any]) -> None:
        """Raises FaultyHardwareError if the step was computed before and gave different bits."""
        before = self._expected.get(record["step"])
        if before is None:
            return
        for key in COMPARED:
            now, then = (np.float64(one[key]) for one in (record, before))
            if now.tobytes() != then.tobytes() and not (np.isnan(now) and np.isnan(then)):
                again = f"step {record['step']}, repeated from the same state and batch, has {key} = {now} after {then}"
                raise FaultyHardwareError(f"{again}; expected the same bits: one of {_devices()} is faulty")

    def go(self, bad: BadStepsError) -> int:
        """Removes the checkpoints after the step to return to, records the lost steps, and returns that step.

        Raises NonFiniteError after `max_roll_backs` to the same step, and if there is no regular checkpoint left.
        """
        try:
            self._checkpoints.wait()
        except NotSavedError as error:
            self._log(str(error))
        _together("before a roll-back")
        to = distributed.from_first(lambda: self._checkpoints.regular(self._train.checkpoint_every))
        self._require_regular(to, bad)
        place = f"checkpoint {to}" if to else "the beginning"
        repeat = self._train.repeat_bad_steps and bad.step not in self._expected
        if repeat:
            self._expected = {r["step"]: r for r in distributed.from_first(lambda: self._computed_after(to))}
            self._log(f"{bad}; going back to {place} to see whether steps {to + 1} to {bad.step} repeat to the bit")
        else:
            self._expected = {}
            before = distributed.from_first(lambda: self._roll_backs(to))
            if before >= self._train.max_roll_backs:
                raise NonFiniteError(
                    f"{bad}, after {before} roll-backs to {place}; expected better steps within "
                    f"TrainConfig.max_roll_backs = {self._train.max_roll_backs}"
                )
            self._log(f"{bad}; going back to {place}, past the batches of steps {to + 1} to {bad.step}")
        _together("before a roll-back changes what others read")
        first = jax.process_index() == 0
        # A kill between these two makes the run compute the bad steps again.
        self._checkpoints.remove_after(to, files=first)
        if first:
            cause, position = (REPEAT, None) if repeat else (ROLL_BACK, bad.position)
            add_lost(self._run_dir, to, cause, position, until=bad.step)
        _together("after a roll-back")
        return to

    def _require_regular(self, to: int, bad: BadStepsError) -> None:
        """Raises NonFiniteError if the run would start over although it has passed a regular checkpoint: it was saved
        under another checkpoint_every, and starting over would remove what it has."""
        latest, every = distributed.from_first(lambda: self._checkpoints.latest) or 0, self._train.checkpoint_every
        if not to and latest >= every:
            raise NonFiniteError(
                f"{bad}; there is checkpoint {latest}, but to go back the run needs one of a multiple of "
                f"TrainConfig.checkpoint_every = {every}"
            )

    def _computed_after(self, step: int) -> list[dict[str, Any]]:
        """The values, by key, that the steps after `step` have to reproduce."""
        later = (record for record in read_metrics(self._run_dir) if record["step"] > step)
        return [{key: record[key] for key in ("step", *COMPARED)} for record in later]

    def _roll_backs(self, step: int) -> int:
        return sum(loss.to == step and loss.cause == ROLL_BACK for loss in read_lost(self._run_dir))


def _together(moment: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(moment)


def _devices() -> str:
    devices = jax.devices()
    named = [f"{device.device_kind} {device.id} (process {device.process_index})" for device in devices[:SHOWN]]
    return ", ".join([*named, *([f"{len(devices) - SHOWN} others"] if len(devices) > SHOWN else [])])
