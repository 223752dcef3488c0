"""The shapes of a run's batches: each length of its phases at its largest batch, with the tokens that are seen so."""

import dataclasses
from typing import NamedTuple

from orogen.config.run import RunConfig


class Shape(NamedTuple):
    """The run with batches of one shape throughout, and the tokens of all its batches of that length."""

    config: RunConfig
    tokens: int


def shapes(config: RunConfig) -> list[Shape]:
    """One shape per sequence length, in the order of the run. A smaller batch of the same length holds less, and is
    taken to be as fast. Raises ConfigError as `RunConfig.stretches` does."""
    train = config.train
    found: dict[int, tuple[int, int]] = {}
    stretches = config.stretches()
    ends = [*(one.after for one in stretches[1:]), train.steps]
    for one, end in zip(stretches, ends, strict=True):
        rows, tokens = found.get(one.sequence_length, (0, 0))
        seen = (end - one.after) * one.batch_size * one.sequence_length
        found[one.sequence_length] = max(rows, one.batch_size), tokens + seen
    return [Shape(_only(config, rows, length), tokens) for length, (rows, tokens) in found.items()]


def without_blend(config: RunConfig) -> RunConfig:
    """The run without its data, whose sources the phases' weights name."""
    train = config.train
    phases = tuple(dataclasses.replace(phase, weights=None) for phase in train.phases)
    return dataclasses.replace(config, data=None, train=dataclasses.replace(train, phases=phases))


def _only(config: RunConfig, rows: int, length: int) -> RunConfig:
    shape = {"batch_size": rows, "sequence_length": length, "phases": (), "batch_ramp": None}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **shape))
