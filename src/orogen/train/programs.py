"""The compiled programs of a run's steps: one before a late change of recipe, one after, and those that measure it."""

from collections.abc import Callable
from typing import Any

import optax

from orogen.config.run import RunConfig
from orogen.data.packing import Batch
from orogen.model.lm import Built
from orogen.parallel import distributed
from orogen.parallel.plan import Plan
from orogen.train.formats import in_formats, is_switched
from orogen.train.lost_numbers import make_measure
from orogen.train.state import TrainState
from orogen.train.step import StepMetrics, make_step
from orogen.train.task import Objective


class StepPrograms:
    """What computes each step. plan: without the formats of the run's precision."""

    def __init__(
        self,
        built: Built,
        objective: Objective,
        config: RunConfig,
        plan: Plan,
        optimizer: optax.GradientTransformationExtraArgs,
    ):
        self.built, self.objective, self.config, self.plain, self.optimizer = built, objective, config, plan, optimizer
        self._steps: dict[bool, Callable[..., Any]] = {}
        self._measures: dict[bool, Callable[..., Any] | None] = {}

    def step(self, number: int) -> tuple[Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]], bool]:
        """What computes step `number`, counted from 1, and whether it still has to be compiled."""
        switched = is_switched(self.config.precision, number)
        if new := switched not in self._steps:
            made = make_step(self.built, self.objective, self.config, self._plan(switched), self.optimizer)
            self._steps[switched] = distributed.compiled_together(made)
        return self._steps[switched], new

    def measures(self, number: int) -> bool:
        """Whether what rounding costs is due to be measured in step `number`."""
        every = self.config.precision.health_every
        return every > 0 and number % every == 0

    def measured(self, number: int, state: TrainState, batch: Batch) -> dict[str, Any] | None:
        """What rounding costs step `number`, still on the devices; None if nothing is measured there."""
        if not self.measures(number):
            return None
        switched = is_switched(self.config.precision, number)
        if switched not in self._measures:
            plan = self._plan(switched)
            parts = self.built, self.objective, self.config, plan, self.plain
            self._measures[switched] = distributed.compiled_together(make_measure(*parts)) if plan.rounds else None
        measure = self._measures[switched]
        return None if measure is None else measure(state, batch)

    def _plan(self, switched: bool) -> Plan:
        return in_formats(self.plain, self.config.precision, self.config.model, switched=switched)
