"""The training loop: batches in, metrics out, checkpoints on the way, and a clean stop on a signal.

Letters: b batch, t time.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx

from orogen.checkpoint.folders import Folder
from orogen.checkpoint.steps import Checkpoints, with_shardings
from orogen.config.checks import ConfigError, require
from orogen.config.run import RunConfig
from orogen.cost.flops import peak_flops, training_flops
from orogen.data.loader import Corpus
from orogen.data.packing import Batch, document_lengths
from orogen.model.layout import Whole, relaid
from orogen.model.lm import Built, build
from orogen.parallel import placement
from orogen.parallel.plan import Plan
from orogen.report.metrics import MetricsWriter, Progress
from orogen.train import carry
from orogen.train.lock import RunLock
from orogen.train.optimizer import make_optimizer
from orogen.train.profiled import StepProfile
from orogen.train.state import TrainState, abstract_state, create_state, from_items, items, start_state, state_shardings
from orogen.train.step import StepMetrics, batch_to_devices, make_step
from orogen.train.stop import Stop
from orogen.train.task import Task


class NonFiniteError(RuntimeError):
    """Too many steps in a row were skipped: a loss or gradient was not finite, or a buffer overflowed."""


class Loop:
    """The parts of one run that work together from step to step."""

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
    ):
        self.config, self.plan, self.built, self.corpus, self.checkpoints = config, plan, built, corpus, checkpoints
        self.stop, self.lock, self.profile, self.log = stop, lock, profile, log
        train = config.train
        self.optimizer = make_optimizer(config.optimizer, train.steps, built.params)
        self.step = make_step(built, task.objective, config, plan, self.optimizer)
        self.carried = carry.abstract(train, built)
        self.evaluation = task.evaluation(config, built, corpus)
        self.source = task.source(config, corpus)
        self.position: dict[str, Any] = self.source.state()
        self.first_step = checkpoints.latest or 0
        expected = f"at least {self.first_step}, the step that the run has reached"
        require(train.steps >= self.first_step, train, "steps", expected)
        profile.check(self.first_step, train.steps)
        self.peak = peak_flops(jax.devices()[0].device_kind)

    def start(self, origin: Folder | None) -> TrainState:
        """The last state saved, with the data's position restored; or a new state, from `origin` if there is one."""
        if not self.first_step and origin is not None:
            given = origin.read(self.built, self.plan, "float32")
            return start_state(*given, self.built, self.optimizer, self.plan, carried=self.carried)
        if not self.first_step:
            seed = self.config.train.seed
            return create_state(self.config.model, self.built, self.optimizer, self.plan, seed, carried=self.carried)
        state, self.position = self._restored()
        self.source.restore(self.position)
        return state

    def _restored(self) -> tuple[TrainState, dict[str, Any]]:
        """The last state saved, laid out for this plan's stages, and the data's position."""
        layers, after = self.config.model.layers, self.built.layout
        before = self.checkpoints.layout(Whole(layers.main, layers.mtp))
        target = abstract_state(self.built, self.optimizer, self.carried)
        there = state_shardings(target, self.plan)
        if before == after:
            return self._restore(target, there)
        saved = build(self.config.model, before, self.built.vocab_rows)
        optimizer = make_optimizer(self.config.optimizer, self.config.train.steps, saved.params)
        target = abstract_state(saved, optimizer, self.carried)
        # Restored onto the devices in the layout that was saved, then laid out there for this plan's stages.
        state, position = self._restore(target, placement.spread(target, self.plan))
        return jax.jit(lambda state: relaid(state, before, after), out_shardings=there)(state), position

    def _restore(self, target: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        found, position = self.checkpoints.restore(items(with_shardings(target, shardings)))
        return from_items(found), position

    def save(self, state: TrainState) -> None:
        """Starts writing the state and the data's position."""
        self.checkpoints.save(int(state.step), items(state), self.position, self.built.layout)

    def evaluate_last(self, state: TrainState, writer: MetricsWriter) -> None:
        """Evaluates the step that was saved last, if a stop prevented its evaluation."""
        train, last, number = self.config.train, writer.last, self.first_step
        if last is None or last["step"] != number:
            return
        if self.evaluation is None:
            return
        owed = number % train.evaluate_every == 0 and not set(self.evaluation.sampled) <= last.keys()
        if owed or (number == train.steps and not set(self.evaluation.whole) <= last.keys()):
            writer.amend(self._scores(number, state))

    def steps(self, state: TrainState, writer: MetricsWriter) -> TrainState:
        """Runs to the end or to a stop. A step's metrics are read only after the next step has been dispatched."""
        train, pending, stop = self.config.train, None, self.stop
        self.clock = time.perf_counter()
        progress = Progress(train.steps, first_step=self.first_step)
        with progress, ThreadPoolExecutor(1) as fetcher, self.profile as profile:
            for number in range(self.first_step + 1, train.steps + 1):
                if not self.lock.beating:
                    raise ConfigError(f"another process took over {self.lock.path}; expected this run to keep it")
                profile.before(number, state)
                batch = self.source.take(state)
                self.position = self.source.state()
                state, metrics = self.step(state, batch_to_devices(batch, self.plan))
                stop.working = True
                profile.after(number, state)
                if pending is not None:
                    self._report(*pending, writer, progress)
                pending = number, batch, fetcher.submit(_fetch, metrics)
                last, due = number == train.steps or stop.asked, lambda every, n=number: n % every == 0
                if last or due(train.evaluate_every) or due(train.checkpoint_every):
                    scored = not stop.asked and (number == train.steps or due(train.evaluate_every))
                    finite = self._report(*pending, writer, progress, scored=state if scored else None)
                    pending = None
                    if last or stop.asked:  # a stop may also come during the evaluation, which the resumed run repeats
                        break
                    if due(train.checkpoint_every) and finite:
                        self.save(state)
        return state

    def _report(
        self,
        number: int,
        batch: Batch,
        fetching: Future[tuple[StepMetrics, float]],
        writer: MetricsWriter,
        progress: Progress,
        *,
        scored: TrainState | None = None,
    ) -> bool:
        """Records step `number` on `batch`, with the scores of the state `scored` if it is given.

        Returns whether the step was finite. Raises NonFiniteError if too many in a row were not.
        """
        fetched, done = fetching.result()
        record = self._record(number, batch, fetched, done - self.clock)
        self.clock = done
        if scored is not None:
            record = _joined(record, self._scores(number, scored))
        writer.write(record)
        if fetched.skipped_in_row == 1:  # several in a row are reported once
            self.log(f"step {number} was skipped and changed nothing: {self._culprit(fetched)}")
        progress.update(number, record)
        if fetched.skipped_in_row >= self.config.train.max_skipped_steps:
            raise NonFiniteError(
                f"step {number}: {fetched.skipped_in_row} steps in a row were skipped "
                f"({self._culprit(fetched)}); expected fewer than "
                f"TrainConfig.max_skipped_steps = {self.config.train.max_skipped_steps}"
            )
        finite = not fetched.skipped_in_row
        if scored is not None:
            self.clock = time.perf_counter()
        return finite

    def _scores(self, number: int, state: TrainState) -> dict[str, float]:
        """The task's scores after step `number`. Empty if there is nothing to score, or if a stop interrupts the
        evaluation, which the resumed run then repeats."""
        evaluation = self.evaluation
        if evaluation is None:
            return {}

        def evaluate() -> dict[str, float]:
            scores = evaluation.sample(state)
            return scores | evaluation.full(state) if number == self.config.train.steps else scores

        return self.stop.unless_asked(evaluate) or {}

    def _culprit(self, metrics: StepMetrics) -> str:
        """Why a step was skipped. If the loss is not finite, no gradient is, so no single leaf is to blame."""
        if metrics.overflow:
            factor = self.config.plan.buffer_factor
            return f"{int(metrics.overflow)} assignments did not fit with PlanConfig.buffer_factor = {factor}; raise it"
        if not np.isfinite(metrics.loss):
            return f"the loss is {float(metrics.loss)}"
        return f"the gradient of {leaf_name(self.built.params, int(metrics.worst_leaf))} is not finite"

    def _record(self, number: int, batch: Batch, metrics: StepMetrics, seconds: float) -> dict[str, Any]:
        tokens = int(metrics.tokens)
        record = {
            "step": number,
            "objective": float(metrics.loss),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "step_ms": 1e3 * seconds,
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(metrics.learning_rate),
            "skipped_steps": int(metrics.skipped),
        }
        if metrics.load_le.size:
            record |= {"expert_load": metrics.load_le.tolist(), "dropped_tokens": int(metrics.dropped)}
            if self.config.plan.buffer_factor is not None:
                record["overflow_rows"] = int(metrics.overflow)
        if self.peak:
            operations = training_flops(self.config.model, document_lengths(batch.segments_bt))
            record["mfu"] = operations / seconds / self.plan.config.devices / self.peak
        means = {name: np.asarray(metric.mean, np.float64).tolist() for name, metric in metrics.metrics.items()}
        return _joined(record, means)


def _joined(record: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The union of both. Raises ValueError if they share a name."""
    if shared := record.keys() & more.keys():
        raise ValueError(f"a task's metric or score is named {sorted(shared)[0]!r}; expected a name that is not taken")
    return record | more


def _fetch(metrics: StepMetrics) -> tuple[StepMetrics, float]:
    """The metrics on the host, and the time at which they arrived: the loop may read them much later."""
    return jax.device_get(metrics), time.perf_counter()


def leaf_name(params: nnx.State, index: int) -> str:
    """The path of the parameter that is leaf `index`."""
    path, _ = jax.tree_util.tree_leaves_with_path(params)[index]
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
