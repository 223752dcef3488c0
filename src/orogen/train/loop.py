"""The training loop: batches in, metrics out, checkpoints on the way, and a clean stop on a signal.

Letters: b batch, t time.
"""

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from orogen.checkpoint.folders import Folder
from orogen.checkpoint.steps import Checkpoints, with_shardings
from orogen.config.checks import ConfigError, require
from orogen.config.run import RunConfig
from orogen.cost.flops import peak_flops
from orogen.data.blend import at_step
from orogen.data.loader import Corpus
from orogen.data.packing import Batch
from orogen.model.layout import Whole, relaid
from orogen.model.lm import Built, build
from orogen.parallel import distributed, placement
from orogen.parallel.plan import Plan
from orogen.report.lost import COMPILING, EVALUATING
from orogen.report.metrics import MetricsWriter, Progress, read_metrics
from orogen.report.silent import SilentWriter
from orogen.train import carry
from orogen.train.back import Back, BadStepsError
from orogen.train.goodput import Clock
from orogen.train.health import SPIKE, Health, NonFiniteError
from orogen.train.lock import RunLock
from orogen.train.lost_numbers import described
from orogen.train.profiled import StepProfile
from orogen.train.programs import StepPrograms
from orogen.train.record import joined, leaf_name, step_record
from orogen.train.saving import Saver
from orogen.train.state import TrainState, abstract_state, create_state, from_items, items, start_state, state_shardings
from orogen.train.step import StepMetrics, batch_to_devices
from orogen.train.stop import Stop, StopTogether
from orogen.train.stragglers import Pace
from orogen.train.submodels import with_chooser
from orogen.train.task import Task
from orogen.train.trained import dtype_to_read, narrow_frozen, optimizer_of
from orogen.train.watch import Watch


class _Pending(NamedTuple):
    """A step that has been dispatched but not reported yet. position: of the data, after its batch; host_seconds: what
    the host took to prepare and dispatch it; measured: see `StepPrograms.measured`."""

    number: int
    batch: Batch
    position: dict[str, Any]
    host_seconds: float
    fetching: Future[tuple[StepMetrics, float]]
    measured: dict[str, Any] | None


class Loop:
    """One run from step to step: source, programs, health, checkpoints, evaluation and records."""

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        *,
        plan: Plan,
        built: Built,
        corpus: Corpus,
        checkpoints: Checkpoints,
        stop: Stop,
        lock: RunLock,
        profile: StepProfile,
        log: Callable[[str], None],
        clock: Clock,
        watch: Watch,
    ):
        self.config, self.plan, self.built, self.corpus, self.checkpoints = config, plan, built, corpus, checkpoints
        self.stop, self.lock, self.profile, self.log = stop, lock, profile, log
        self.clock, self.watch, self.pace = clock, watch, Pace(log)
        train = config.train
        self.back = Back(train, checkpoints.run_dir, checkpoints, log)
        self.optimizer = optimizer_of(config, built)
        self.frozen = task.frozen and task.frozen(config, plan)
        known = self.frozen and self.frozen.variables
        self.submodels, beside = task.submodels, {"frozen": known, "submodels": task.submodels}
        self.programs = StepPrograms(built, task.objective, config, plan, self.optimizer, **beside)
        self.carried = carry.abstract(train, built)
        self.measures = task.measures
        self.evaluation = task.evaluation(config, built, corpus)
        score = None
        if self.evaluation is not None:
            score, self.evaluation.progress = self.evaluation.sampled[0], watch.progress
        self.saver = Saver(train, checkpoints, score=score, clock=clock, log=log)
        self.source = task.source(config, corpus)
        self.source.progress = watch.progress
        self.position: dict[str, Any] = self.source.state()
        self._beginning = self.position
        self.first_step = distributed.from_first(lambda: checkpoints.latest) or 0
        expected = f"at least {self.first_step}, the step that the run has reached"
        require(train.steps >= self.first_step, train, "steps", expected)
        profile.check(self.first_step, train.steps)
        self.peak = peak_flops(jax.devices()[0].device_kind)

    def start(self, origin: Folder | None) -> TrainState:
        """The last state saved, with the data's position restored; or a new state, from `origin` if given. After a
        roll-back to this state, the position is the one after the bad batches."""
        self.origin = origin
        if self.first_step:
            state, self.position = self._restored()
        else:
            state, self.position = with_chooser(self._new(origin), self.submodels, self.plan), self._beginning
        if (position := self.back.position(self.first_step)) is not None:
            self.position = at_step(position, self.first_step)
            if state.carried is not None:  # the states belong to text that the next batch does not continue
                there = jax.tree.map(lambda x: x.sharding, state.carried)
                state = state._replace(carried=jax.jit(carry.emptied, out_shardings=there)(state.carried))
        if self.position != self.source.state():
            self.source.restore(self.position)
        return state

    def _new(self, origin: Folder | None) -> TrainState:
        if origin is not None:
            given = origin.read(self.built, self.plan, dtype_to_read(self.config))
            return start_state(*given, self.built, self.optimizer, self.plan, carried=self.carried)
        seed = self.config.train.seed
        return create_state(self.config.model, self.built, self.optimizer, self.plan, seed, carried=self.carried)

    def _restored(self) -> tuple[TrainState, dict[str, Any]]:
        """The last state saved, laid out for this plan's stages, and the data's position."""
        layers, after = self.config.model.layers, self.built.layout
        before = self.checkpoints.layout(Whole(layers.main, layers.mtp))
        target = abstract_state(self.built, self.optimizer, self.carried)
        target = with_chooser(target, self.submodels, self.plan)
        there = state_shardings(target, self.plan)
        if before == after:
            return self._restore(target, there)
        saved = narrow_frozen(build(self.config.model, before, self.built.vocab_rows), self.config)
        target = abstract_state(saved, optimizer_of(self.config, saved), self.carried)
        # Restored onto the devices in the layout that was saved, then laid out there for this plan's stages.
        state, position = self._restore(target, placement.spread(target, self.plan))
        return jax.jit(lambda state: relaid(state, before, after), out_shardings=there)(state), position

    def _restore(self, target: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        found, position = self.checkpoints.restore(items(with_shardings(target, shardings)))
        return from_items(found), position

    def complete(self, state: TrainState, writer: MetricsWriter | SilentWriter) -> None:
        """Waits for the write that `finish` started, and adds to the last record how long that took. Raises
        NotSavedError."""
        self.saver.wait()
        if int(state.step) > self.first_step:
            try:
                writer.amend(self.clock.spent(writer.last))
            except OSError as error:
                self.log(f"the seconds of the last checkpoint are not in the metrics ({error.strerror})")

    def finish(self, state: TrainState, writer: MetricsWriter | SilentWriter) -> None:
        """Starts writing the state after the last step of this call; but not after a stop during bad steps from which
        the run may still roll back, which a resumed run repeats. Raises NotSavedError."""
        if int(state.step) == self.config.train.steps or not self._may_go_back:
            self.watch.expect_longer()
            best = self.saver.is_best(writer.last or {})
            self.saver.save(state, self.position, self.built.layout, best=best)

    @property
    def _may_go_back(self) -> bool:
        return self.config.train.roll_back_after > 0 and self.health.bad_in_row > 0

    def evaluate_last(self, state: TrainState, writer: MetricsWriter | SilentWriter) -> None:
        """Evaluates the last saved step, if a stop prevented its evaluation."""
        train, last, number = self.config.train, writer.last, self.first_step
        if last is None or last["step"] != number:
            return
        if self.evaluation is None:
            return
        owed = number % train.evaluate_every == 0 and not set(self.evaluation.sampled) <= last.keys()
        if owed or (number == train.steps and not set(self.evaluation.whole) <= last.keys()):
            writer.amend(self._scores(number, state) | self.clock.spent(last))

    def steps(self, state: TrainState, writer: MetricsWriter | SilentWriter) -> TrainState:
        """Runs to the end or to a stop, and rolls back after bad steps on the way."""
        while True:
            # Only the first process reads records; what it judges by them holds for all.
            records = read_metrics(self.checkpoints.run_dir) if self.first_step and distributed.first() else []
            records = [record for record in records if record["step"] <= self.first_step]
            self.health = Health(self.config.train, records)
            self.saver.start(records)
            try:
                return self._steps(state, writer)
            except BadStepsError as error:
                bad = error
            # Here, where no frame of the failed steps holds their state: two states may not fit on the devices.
            del state
            bad.__traceback__ = None
            self.watch.expect_longer()
            self.first_step = self.back.go(bad)
            state = self.start(self.origin)
            writer.rewind(self.first_step)

    def _steps(self, state: TrainState, writer: MetricsWriter | SilentWriter) -> TrainState:
        """`steps` until BadStepsError. A step's metrics are read only after the next step has been dispatched."""
        train, pending, stop, together = self.config.train, None, self.stop, StopTogether(self.stop)
        self.clock.start()
        self.watch.expect_longer()  # a source may compile too
        progress = Progress(train.steps, first_step=self.first_step, shown=distributed.first())
        with progress, ThreadPoolExecutor(1) as fetcher, self.profile as profile:
            for number in range(self.first_step + 1, train.steps + 1):
                if not self.lock.beating:
                    raise ConfigError(f"another process took over {self.lock.path}; expected this run to keep it")
                together.before(number)
                profile.before(number, state)
                began = time.perf_counter()
                batch = self.source.take(state)
                self.position = self.source.state()
                if pending is not None and self._compiles(number, batch):
                    # First, so that its time does not contain the compilation for the new shape.
                    self._report(pending, writer, progress)
                    pending = None
                state, metrics, measured = self._dispatch(number, state, batch)
                host_seconds = time.perf_counter() - began
                stop.working = True
                profile.after(number, state)
                if pending is not None:
                    self._report(pending, writer, progress)
                pending = _Pending(
                    number, batch, self.position, host_seconds, fetcher.submit(_fetch, metrics), measured
                )  # fmt: skip
                stopped, save = together.after(number), self.saver.due(number)
                final = number == train.steps
                evaluate = final or number % train.evaluate_every == 0
                if evaluate or stopped or save:
                    scored = evaluate and not stopped
                    record = self._report(pending, writer, progress, scored=state if scored else None)
                    pending = None
                    # A stop may also come during the evaluation, which the resumed run repeats.
                    if final or stopped or together.after(number):
                        break
                    best = self.saver.is_best(record)
                    if (save or best) and not (self._may_go_back or self._skipped):
                        self.watch.expect_longer()
                        self.saver.save_on_the_way(state, self.position, self.built.layout, best=best)
        return state

    def _dispatch(
        self, number: int, state: TrainState, batch: Batch
    ) -> tuple[TrainState, StepMetrics, dict[str, Any] | None]:
        """The step's results, which the devices may still be computing, and what was measured of its roundings, None if
        nothing was. The first call for a shape, or after a change of recipe, also compiles the step; likewise the
        program that measures."""
        placed, programs = batch_to_devices(batch, self.plan), self.programs
        if self._compiles(number, batch) or programs.measures(number):
            self.watch.expect_longer()
        if self.frozen is not None:
            with self._compiling(programs.compiles(number, batch)):
                placed = placed._replace(extras={**placed.extras, **self.frozen.extras(batch)})
        with self._compiling(programs.compiles_measure(number, batch)):
            measured = programs.measured(number, state, placed)
        with self._compiling(programs.compiles(number, batch)):
            return *programs.step(number, batch)(state, placed), measured

    def _compiles(self, number: int, batch: Batch) -> bool:
        return self.programs.compiles(number, batch) or self.programs.compiles_measure(number, batch)

    def _compiling(self, new: bool) -> contextlib.AbstractContextManager[None]:
        return self.clock.aside(COMPILING) if new else contextlib.nullcontext()

    def _report(
        self,
        pending: _Pending,
        writer: MetricsWriter | SilentWriter,
        progress: Progress,
        *,
        scored: TrainState | None = None,
    ) -> dict[str, Any]:
        """Records a step, with the scores of the state `scored` if it is given, and returns the record.

        Raises BadStepsError if the run has to go back, and NonFiniteError if too many steps in a row were skipped.
        """
        fetched, done = pending.fetching.result()
        number, seconds = pending.number, self.clock.step(done)
        self.watch.progress(seconds)
        self.pace.add(seconds, pending.host_seconds)
        record = joined(self._record(number, pending.batch, fetched, seconds), self.measures(pending.position))
        if pending.measured is not None:
            record = joined(record, described(jax.device_get(pending.measured)))
        self.back.compare(record)
        record = self.health.judged(record)
        if scored is not None:
            record = joined(record, self._scores(number, scored) | self.pace.compared())
        record = joined(record, self.clock.spent())
        writer.write(record)
        progress.update(number, record)
        self._react(pending, fetched, record)
        return record

    def _record(self, number: int, batch: Batch, metrics: StepMetrics, seconds: float) -> dict[str, Any]:
        return {"step": number, **step_record(batch, metrics, seconds, config=self.config, peak=self.peak)}

    def _react(self, pending: _Pending, fetched: StepMetrics, record: dict[str, Any]) -> None:
        """Logs a bad step, and raises BadStepsError or NonFiniteError if it is one too many."""
        train, in_row = self.config.train, self.health.bad_in_row
        self._skipped = int(fetched.skipped_in_row)
        if not in_row:
            return
        spike = f"the loss is {record['objective']:.6g}, a spike above {record.get(SPIKE, math.nan):.6g}"
        reason = self._culprit(fetched) if self._skipped else spike
        if in_row == 1:  # several in a row are reported once
            changed = "was skipped and changed nothing" if self._skipped else "is bad"
            self.log(f"step {pending.number} {changed}: {reason}")
        if 0 < train.roll_back_after <= in_row:
            raise BadStepsError(pending.number, pending.position, reason)
        if self._skipped >= train.max_skipped_steps:
            raise NonFiniteError(
                f"step {pending.number}: {self._skipped} steps in a row were skipped ({reason}); expected fewer than "
                f"TrainConfig.max_skipped_steps = {train.max_skipped_steps}"
            )

    def _scores(self, number: int, state: TrainState) -> dict[str, float]:
        """The task's scores after step `number`. Empty if there is nothing to score, or if a stop interrupts the
        evaluation, which the resumed run then repeats."""
        evaluation = self.evaluation
        if evaluation is None:
            return {}

        def evaluate() -> dict[str, float]:
            scores = evaluation.sample(state)
            return scores | evaluation.full(state) if number == self.config.train.steps else scores

        self.watch.expect_longer()
        with self.clock.aside(EVALUATING):
            return self.stop.unless_asked(evaluate) or {}

    def _culprit(self, metrics: StepMetrics) -> str:
        """Why a step was skipped. If the loss is not finite, no gradient is, so no single leaf is to blame."""
        if metrics.overflow:
            factor = self.config.plan.buffer_factor
            return f"{int(metrics.overflow)} assignments did not fit with PlanConfig.buffer_factor = {factor}; raise it"
        if not np.isfinite(metrics.loss):
            return f"the loss is {float(metrics.loss)}"
        return f"the gradient of {leaf_name(self.built.params, int(metrics.worst_leaf))} is not finite"


def _fetch(metrics: StepMetrics) -> tuple[StepMetrics, float]:
    """The metrics on the host, and the time at which they arrived: the loop may read them much later."""
    return jax.device_get(metrics), time.perf_counter()
