"""What changes during a run: phases and a growing batch, which divide it into stretches of equal shapes and blend."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

from orogen.config.checks import ConfigError, check_types, require, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A change in the course of a run. What a phase leaves at None stays as it was before.

    learning_rate: constant from here on; the optimizer's schedule covers the steps before the first such phase.
    """

    after: Annotated[int, "steps done when the phase begins"]
    weights: Annotated[dict[str, float] | None, "weights of the sources by name; those left out have none"] = None
    sequence_length: Annotated[int | None, "tokens per sequence"] = None
    batch_size: Annotated[int | None, "sequences of the global batch"] = None
    learning_rate: Annotated[float | None, "rate of every step of the phase"] = None

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "after", "sequence_length", "batch_size", "learning_rate")
        require(self.sequence_length is None or self.sequence_length > 1, self, "sequence_length", "at least 2")
        for name, weight in (self.weights or {}).items():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"PhaseConfig.weights has {name!r}: {weight}; expected 0 or more")
        if self.weights is not None:
            require(any(self.weights.values()), self, "weights", "one above 0")


class Stretch(NamedTuple):
    """Steps of equal shapes and blend. after: steps done when it begins; phase: its number, from 0; weights: by source,
    adding up to 1; empty without sources."""

    after: int
    phase: int
    batch_size: int
    sequence_length: int
    weights: Mapping[str, float]


def stretches(
    *,
    steps: int,
    batch_size: int,
    sequence_length: int,
    ramp: Sequence[int] | None,
    phases: Sequence[PhaseConfig],
    weights: Mapping[str, float],
) -> list[Stretch]:
    """The stretches of a run, in order. ramp: see TrainConfig.batch_ramp. Raises ConfigError."""
    begun = [Stretch(0, 0, batch_size, sequence_length, _shares(weights))]
    for number, phase in enumerate(phases, 1):
        before = begun[-1]
        if phase.after <= before.after or phase.after >= steps:
            expected = f"above {before.after}, where the phase before begins, and below TrainConfig.steps = {steps}"
            raise ConfigError(f"PhaseConfig.after is {phase.after}; expected a number {expected}")
        if phase.weights is not None and (unknown := sorted(phase.weights.keys() - weights.keys())):
            expected = f"some of {sorted(weights)}, the names in DataConfig.sources"
            raise ConfigError(f"PhaseConfig.weights has {unknown[0]!r}; expected {expected}")
        asked = before.weights if phase.weights is None else _shares(dict.fromkeys(weights, 0.0) | phase.weights)
        size, length = phase.batch_size or before.batch_size, phase.sequence_length or before.sequence_length
        begun.append(Stretch(phase.after, number, size, length, asked))
    rising = _rise(batch_size, ramp)
    for phase in phases:
        if phase.batch_size is not None and rising and phase.after < rising[-1][0]:
            expected = f"at least {rising[-1][0]}, when TrainConfig.batch_ramp is over"
            raise ConfigError(f"PhaseConfig.after is {phase.after}, with a batch_size; expected {expected}")
    return _with_ramp(begun, rising, steps)


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _rise(batch_size: int, ramp: Sequence[int] | None) -> list[tuple[int, int]]:
    """(steps done before it begins, size) of each batch size of the ramp. A size holds until its share of the ramp's
    sequences has been seen, as in Megatron-LM (RampupBatchsizeNumMicroBatchesCalculator)."""
    if ramp is None:
        return []
    first, increment, sequences = ramp
    count, seen, step, found = (batch_size - first) // increment, 0, 0, []
    for number in range(count + 1):
        size, until = first + number * increment, sequences * (number + 1) / count
        found.append((step, size))
        held = 0 if seen >= until else -int((seen - until) // size)
        step, seen = step + held, seen + held * size
    return found


def _with_ramp(begun: list[Stretch], rising: list[tuple[int, int]], steps: int) -> list[Stretch]:
    if not rising:
        return begun
    found = []
    for after in sorted({one.after for one in begun} | {step for step, _ in rising if step < steps}):
        now = [one for one in begun if one.after <= after][-1]
        if after < rising[-1][0] or now.batch_size == begun[0].batch_size:
            now = now._replace(batch_size=[size for step, size in rising if step <= after][-1])
        found.append(now._replace(after=after))
    return found
