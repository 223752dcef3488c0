"""A training step whose traced and lowered program is kept in a file (`orogen.parallel.kept`)."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from orogen.data.packing import Batch
from orogen.parallel.kept import kept_program
from orogen.parallel.plan import Plan
from orogen.train.state import TrainState
from orogen.train.step import StepMetrics
from orogen.train.task import Metric


class KeptStep:
    """The jitted `step` (state, batch) -> state, metrics, with one file per shape of batches. It donates the state, and
    returns it with the same shardings. name: a text that determines the step, code aside."""

    def __init__(self, step: Callable[..., tuple[TrainState, StepMetrics]], plan: Plan, name: str):
        self.step, self.plan, self.name = step, plan, name
        self._programs: dict[Any, Any] = {}

    def __call__(self, state: TrainState, batch: Batch, frozen: None = None) -> tuple[TrainState, StepMetrics]:
        """As `make_step`'s result, of a task without a frozen model. Raises ConfigError as `kept_program` does."""
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._programs:
            self._programs[shapes] = self._program(state, batch)
        leaves, metrics = self._programs[shapes](*jax.tree.leaves((state, batch)))
        return jax.tree.unflatten(jax.tree.structure(state), leaves), metrics

    def _program(self, state: TrainState, batch: Batch) -> Any:
        arrays, tree = jax.tree.flatten((state, batch))
        held = jax.tree.leaves(state)

        def flat(*arrays: Any) -> tuple[list[Any], StepMetrics]:
            state, metrics = self.step(*jax.tree.unflatten(tree, arrays))
            return jax.tree.leaves(state), metrics

        _register()
        kept = kept_program(flat, arrays, name=self.name)
        return jax.jit(
            lambda *arrays: kept.call(*arrays), donate_argnums=tuple(range(len(held))),
            out_shardings=([x.sharding for x in held], self.plan.sharding()),
            compiler_options=self.plan.compiler_options,
        )  # fmt: skip


@functools.cache
def _register() -> None:
    """Registers the NamedTuples of a step's metrics, so that a file can hold a program that returns them."""
    from jax import export

    for part in (StepMetrics, Metric):
        export.register_namedtuple_serialization(part, serialized_name=f"orogen.{part.__name__}")
