"""The compiled programs of a run's steps: one before a late change of recipe, one after, and those that measure it."""

from collections.abc import Callable
from typing import Any

import optax

from orogen.config.checks import require
from orogen.config.run import RunConfig
from orogen.data.packing import Batch
from orogen.model.lm import Built
from orogen.parallel import distributed
from orogen.parallel.kept import require_flatbuffers
from orogen.parallel.plan import Plan
from orogen.train.formats import in_formats, is_switched
from orogen.train.kept_step import KeptStep
from orogen.train.lost_numbers import make_measure
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.state import TrainState
from orogen.train.step import StepMetrics, make_step
from orogen.train.task import Objective, Submodels


class StepPrograms:
    """What computes each step. plan: without the formats of the run's precision. frozen: the variables of the task's
    frozen model, if it has one; submodels: the task's."""

    def __init__(
        self,
        built: Built,
        objective: Objective,
        config: RunConfig,
        plan: Plan,
        optimizer: optax.GradientTransformationExtraArgs,
        *,
        frozen: Any = None,
        submodels: Submodels | None = None,
    ):
        self.frozen, self.submodels = frozen, submodels
        self.built, self.objective, self.config, self.plain, self.optimizer = built, objective, config, plan, optimizer
        alone = objective is NEXT_TOKENS and frozen is None and submodels is None and distributed.count() == 1
        fits = alone or not config.train.keep_program
        require(fits, config.train, "keep_program", "False where a run has another task than next tokens, or processes")
        if config.train.keep_program:
            require_flatbuffers()
        self._steps: dict[bool, Callable[..., Any]] = {}
        self._compiled: set[tuple[bool, tuple[int, ...]]] = set()
        self._measures: dict[bool, Callable[..., Any] | None] = {}
        self._compiled_measures: set[tuple[bool, tuple[int, ...]]] = set()

    def compiles(self, number: int, batch: Batch) -> bool:
        """Whether step `number`, counted from 1, still has to be compiled for batches of this shape."""
        return self._key(number, batch) not in self._compiled

    def compiles_measure(self, number: int, batch: Batch) -> bool:
        """Whether what measures step `number` still has to be compiled for batches of this shape."""
        return self._measure(number) is not None and self._key(number, batch) not in self._compiled_measures

    def step(self, number: int, batch: Batch) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """What computes step `number` on this batch."""
        switched, _ = key = self._key(number, batch)
        if switched not in self._steps:
            plan = self._plan(switched)
            parts = self.built, self.objective, self.config, plan, self.optimizer
            made = make_step(*parts, frozen=self.frozen, submodels=self.submodels)
            if self.config.train.keep_program:
                made = KeptStep(made, plan, f"{switched} {self.config}")
            self._steps[switched] = distributed.compiled_together(made)
        self._compiled.add(key)
        step = self._steps[switched]
        return lambda state, batch: step(state, batch, self.frozen)

    def _key(self, number: int, batch: Batch) -> tuple[bool, tuple[int, ...]]:
        return is_switched(self.config.precision, number), batch.tokens_bt.shape

    def measures(self, number: int) -> bool:
        """Whether what rounding costs is due to be measured in step `number`."""
        every = self.config.precision.health_every
        return every > 0 and number % every == 0

    def measured(self, number: int, state: TrainState, batch: Batch) -> dict[str, Any] | None:
        """What rounding costs step `number`, still on the devices; None if nothing is measured there."""
        measure = self._measure(number)
        if measure is None:
            return None
        self._compiled_measures.add(self._key(number, batch))
        return measure(state, batch, self.frozen)

    def _measure(self, number: int) -> Callable[..., Any] | None:
        """What measures step `number`; None if nothing is due there, or nothing rounds."""
        if not self.measures(number):
            return None
        switched = is_switched(self.config.precision, number)
        if switched not in self._measures:
            plan = self._plan(switched)
            parts = self.built, self.objective, self.config, plan, self.plain
            made = make_measure(*parts, frozen=self.frozen) if plan.rounds else None
            self._measures[switched] = made and distributed.compiled_together(made)
        return self._measures[switched]

    def _plan(self, switched: bool) -> Plan:
        return in_formats(self.plain, self.config.precision, self.config.model, switched=switched)
