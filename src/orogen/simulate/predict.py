"""The time and memory of a training step of a plan on a cluster, from configs alone; no jax."""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.dtype import BYTES
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.cost.conventions import CONVENTIONS, flops_per_token
from orogen.cost.ledger import MTP, OUTER, Ledger, Workload
from orogen.cost.split import stage_patterns
from orogen.cost.weights import weights
from orogen.parallel.legal import fold_plan
from orogen.parallel.schedule import chunks_per_stage
from orogen.simulate.budget import budget, goodput
from orogen.simulate.footprint import moments, stage_memory
from orogen.simulate.hardware import Hardware, Software, machine
from orogen.simulate.passes import BACKWARD, FORWARD, HEAD, PHASES, Passes, Sent, Time, chunk_units
from orogen.simulate.pipeline import MOST_PASSES, Played, estimate, play
from orogen.simulate.prediction import TIME_PARTS, PredictedShape, Prediction, Roofline, Traffic
from orogen.simulate.routing import BALANCED, Routing
from orogen.simulate.shapes import shapes

# A part of the step that takes at least this share of it is named among what limits it.
NOTABLE = 0.05


def predict(
    config: RunConfig, cluster: ClusterConfig | None = None, *, routing: Routing = BALANCED, most: int = MOST_PASSES
) -> Prediction:
    """The step of `config` on `cluster` (None: H100s, as many as the plan has devices).

    config: model, plan and train are needed; without an optimizer it is AdamW with float32 moments. most: passes of the
    pipeline that are played one by one (simulate/pipeline.py). With phases of several sequence lengths, the step is one
    of the first, memory is that of the length that needs most, and the budget is of all. Raises ConfigError for an
    unknown hardware or constant, or a plan that does not match the cluster or the model.
    """
    config.need("model", "train")
    cluster = cluster or ClusterConfig()
    on = machine(cluster)
    if cluster.devices not in (None, config.plan.devices):
        raise ConfigError(
            f"ClusterConfig.devices is {cluster.devices}; expected the {config.plan.devices} devices of the plan, or "
            "None"
        )
    fold_plan(config.plan, config.model)
    runs, length = shapes(config), config.train.sequence_length
    each = [Step(run.config, cluster, on, routing, most, length=length).prediction() for run in runs]
    largest = max(each, key=lambda found: found.device_memory_bytes)
    seconds = sum(run.tokens / found.tokens_per_second for run, found in zip(runs, each, strict=True))
    return dataclasses.replace(
        each[0],
        memory=largest.memory,
        device_memory_bytes=largest.device_memory_bytes,
        budget=budget(cluster, on[0], config.plan.devices, seconds / each[0].goodput),
        shapes=tuple(
            PredictedShape(
                run.config.train.sequence_length,
                run.config.train.batch_size,
                run.tokens,
                found.step_seconds,
                found.device_memory_bytes,
            )  # fmt: skip
            for run, found in zip(runs, each, strict=True)
        ),
    )


def fullest(config: RunConfig, cluster: ClusterConfig | None = None) -> RunConfig:
    """The run with batches of the shape that needs most memory throughout. Raises ConfigError as `predict` does."""
    runs, held = shapes(config), predict(config, cluster).shapes
    return max(zip(runs, held, strict=True), key=lambda pair: pair[1].device_memory_bytes)[0].config


class Step:
    """One step: the parts of a prediction as they are computed."""

    def __init__(
        self, config: RunConfig, cluster: ClusterConfig, machine: tuple[Hardware, Software], routing: Routing,
        most: int, *, length: int | None = None,
    ):  # fmt: skip
        """length: of the sequences for which the layers are split into stages; None: the config's."""
        self.config, self.cluster = config, cluster
        self.hardware, self.software = hardware, software = machine
        self.model, self.plan, train = config.model, config.plan, config.train
        self.tokens, self.routing, self.most = train.batch_size * train.sequence_length, routing, most
        rows = train.batch_size // (self.plan.data * self.plan.microbatches)
        length = train.sequence_length // self.plan.context
        self.work = Workload(rows, length, BYTES[train.compute_dtype], train.carry_states)
        self.imbalance = imbalance(routing, self.model, self.plan)
        self.passes = Passes(
            self.model, self.plan, self.work, (hardware, software), dtype=train.compute_dtype,
            imbalance=self.imbalance, straggler=cluster.straggler,
        )  # fmt: skip
        chunks = chunks_per_stage(self.plan, self.model)
        self.patterns = patterns(self.model, self.plan.stage, chunks, length or train.sequence_length)
        # Traces of two stages of one program: with one chunk per stage a stage waits only for its data, with several,
        # whose ticks are all forward or all backward, for the slowest stage of every tick.
        self.lockstep = bool(software.one_program) and len(self.patterns) > self.plan.stage
        hop = self.passes.hop()
        hop_seconds = hop.seconds if hop else 0.0
        # A send blocks its stage for the part that nothing hides, which therefore belongs to the pass (`_held`); the
        # next stage has the output after the rest. In lockstep all stages wait for it, once per tick.
        blocking = hop_seconds * (1 - software.overlap_stage)
        self.blocking, self.travel = (0.0, blocking) if self.lockstep else (blocking, hop_seconds - blocking)
        self.units = chunk_units(self.model, self.patterns)
        self.times = {phase: [self.passes.time(units, phase) for units in self.units] for phase in PHASES}
        self.held = {phase: self._held(phase) for phase in PHASES}

    def _held(self, phase: str) -> list[float]:
        """Seconds of a tick beside its pass, by segment."""
        if self.plan.stage == 1:
            return [0.0] * len(self.patterns)
        return [self.software.tick_seconds + sends * self.blocking for sends in self._sends(phase)]

    def _sends(self, phase: str) -> list[int]:
        """Whether a segment's pass sends something, by segment: 1 or 0.

        The last segment's forward pass and the first one's backward pass send nothing, unless all stages run one
        program, in which every tick sends.
        """
        silent = len(self.patterns) - 1 if phase == FORWARD else 0
        everywhere = bool(self.software.one_program)
        return [int(everywhere or segment != silent) for segment in range(len(self.patterns))]

    def prediction(self) -> Prediction:
        """Everything put together."""
        train, devices = self.config.train, self.plan.devices
        played, update = self._played(), self._update()
        step = played.seconds + sum(update.values())
        length = train.sequence_length
        flops = {name: self.tokens * flops_per_token(name, self.model, length) for name in CONVENTIONS}
        alike = bool(self.software.one_program)
        memory = stage_memory(self.passes.here, self.config.optimizer, self.patterns, played.flight, alike=alike)
        bubble, seconds = self._parts(played, update)
        good = goodput(self.cluster, devices)
        rate = self.tokens / step
        return Prediction(
            step_seconds=step,
            tokens_per_second=rate,
            tokens_per_second_per_device=rate / devices,
            mfu=flops["orogen"] / step / devices / self.hardware.peak,
            tflops_per_device=flops["orogen"] / step / devices / 1e12,
            flops=flops,
            hardware=self.hardware.title,
            devices=devices,
            routing=str(self.routing),
            imbalance=self.imbalance,
            device_memory_bytes=max(stage.total for stage in memory),
            memory_limit_bytes=self.hardware.memory_bytes,
            memory=memory,
            rooflines=self._rooflines(),
            communication=self._traffic(),
            timeline=played.work,
            bubble=bubble,
            seconds=seconds,
            limit=_limit(seconds, step, self._rooflines()),
            goodput=good,
            overlapping=self.plan.overlapping if self.plan.stage == 1 else 1,
            budget=budget(self.cluster, self.hardware, devices, train.steps * step / good),
        )

    def estimate(self) -> float:
        """About how many seconds the step takes, for ranking plans."""
        shape = len(self.patterns) // self.plan.stage, self.plan.stage
        forward_vs, backward_vs = (np.reshape([t.seconds for t in self.times[p]], shape) for p in PHASES)
        return estimate(forward_vs, backward_vs, self.plan.microbatches) + sum(self._update().values())

    def _played(self) -> Played:
        plan, virtual = self.plan, len(self.patterns) // self.plan.stage
        shape = virtual, plan.stage
        cost = {
            p: np.reshape([t.seconds + held for t, held in zip(self.times[p], self.held[p], strict=True)], shape)
            for p in PHASES
        }
        return play(
            plan.schedule if plan.stage > 1 else "1f1b", cost[FORWARD], cost[BACKWARD], plan.microbatches,
            hop=self.travel, lockstep=self.lockstep, most=self.most,
        )  # fmt: skip

    def _update(self) -> dict[str, float]:
        """Seconds of what happens once per step, by kind of traffic, `optimizer`, and `host`."""
        time = self._update_times()
        return {**time.exposed, "optimizer": self._optimizer() + time.contended, "host": self.software.step_seconds}

    @functools.cached_property
    def _once(self) -> list[Sent]:
        """What the fullest stage sends once per step."""
        stages = [
            [unit for chunk in self.units[stage :: self.plan.stage] for unit in chunk]
            for stage in range(self.plan.stage)
        ]
        # The MTP block's gradients are summed once, however often it is applied.
        once = [u for units in stages[:-1] for u in [units]] + [_once_each(stages[-1], self.model.mtp_depths)]
        sums = [self.passes.update(units) for units in once]
        return max(sums, key=lambda sent: sum(one.seconds for one in sent))

    def _optimizer(self) -> float:
        """Reading and writing parameters, gradients and moments, and writing the working copies."""
        ledger, each = Ledger(OUTER, self.plan, self.model, self.work), moments(self.config.optimizer)
        found = weights(self.model, self.plan.vocab_rows(self.model.vocab_size))
        layers = collections.Counter(self.model.layers.main + self.model.layers.mtp)
        of = lambda part: sum(ledger.held(w, stored=True) for w in part)  # noqa: E731
        stored = sum(n * of(found.layers[letter]) for letter, n in layers.items()) / self.plan.stage
        stored += sum(of(part) for part in (*found.parts.values(), found.mtp))
        bytes_each = 2 * 4 + 4 + 2 * each.matrix + self.work.itemsize
        seconds = stored * bytes_each / (self.hardware.bandwidth * self.hardware.shares.memory)
        if self.plan.offload_optimizer:
            seconds += stored * 2 * each.matrix / self.hardware.host_bandwidth
        return seconds

    def _parts(self, played: Played, update: dict[str, float]) -> tuple[float, dict[str, float]]:
        """The bubble's share of the pipeline, and the step by TIME_PARTS on the stage that is busy longest."""
        plan, m = self.plan, self.plan.microbatches
        busy = []
        for stage in range(plan.stage):
            mine = [t for phase in PHASES for t in self.times[phase][stage :: plan.stage]]
            held = sum(seconds for phase in PHASES for seconds in self.held[phase][stage :: plan.stage])
            busy.append((m * (sum(t.seconds for t in mine) + held), m * held, mine))
        longest, held, times = max(busy, key=lambda entry: entry[0])
        total = sum(seconds for seconds, *_ in busy) / plan.stage
        found: dict[str, float] = dict.fromkeys(TIME_PARTS, 0.0)
        slowed = self.passes.slower
        for time in times:
            found["compute"] += m * (time.compute / slowed + time.contended)
            found["straggler"] += m * time.compute * (1 - 1 / slowed)
            found["host"] += m * time.waiting
            for kind, seconds in time.exposed.items():
                found[kind] += m * seconds
        found["stage"] += held
        found["bubble"] = played.seconds - longest
        for kind, seconds in update.items():
            found[kind] += seconds
        return 1 - total / played.seconds, found

    def _rooflines(self) -> tuple[Roofline, ...]:
        counts = collections.Counter(unit for chunk in self.units for unit in chunk)
        return tuple(
            line._replace(count=n)
            for name, n in counts.items()
            for phase in PHASES
            for line in self.passes.unit(name).work[phase]
        )

    def _traffic(self) -> tuple[Traffic, ...]:
        """What the devices of the average stage send in a step."""
        m, table = self.plan.microbatches, {}
        counts = collections.Counter(unit for chunk in self.units for unit in chunk)
        shares = self._exposed_shares()
        for name, n in counts.items():
            for phase in PHASES:
                for one in self.passes.unit(name).sent[phase]:
                    _add(table, one, n * m / self.plan.stage, shares[one.kind])
        update = _share(self._update_times())
        for one in self._once:
            _add(table, one, 1, update[one.kind])
        if hop := self.passes.hop():
            turns = m * sum(sum(self._sends(phase)) for phase in PHASES) / self.plan.stage
            _add(table, hop, turns, 1 - self.software.overlap_stage)
        return tuple(Traffic(*key, *values) for key, values in table.items())

    def _update_times(self) -> Time:
        # Gradients of the last microbatch are sent while its other layers are computed, and parameters likewise.
        last = max(t.compute for phase in PHASES for t in self.times[phase])
        return self.passes.hidden(last, [(1, one) for one in self._once])

    def _exposed_shares(self) -> dict[str, float]:
        """By kind, what is exposed of all that the passes send."""
        sent, exposed = collections.Counter(), collections.Counter()
        for time in (time for phase in PHASES for time in self.times[phase]):
            sent.update(time.sent)
            exposed.update(time.exposed)
        return {kind: exposed[kind] / sent[kind] if sent[kind] else 0.0 for kind in sent}


def imbalance(routing: Routing, model: ModelConfig, plan: PlanConfig) -> float:
    """Assignments of the busiest expert rank over an even share; 1 without experts."""
    routed = "E" in model.layers.main + model.layers.mtp
    return routing.imbalance(model.n_routed_experts, plan) if routed else 1.0


@functools.lru_cache(maxsize=256)
def patterns(model: ModelConfig, stages: int, virtual: int, length: int) -> tuple[str, ...]:
    """The layers of each segment, split for sequences of `length` tokens."""
    if stages == 1:
        return (model.layers.main,)
    plan = PlanConfig(stage=stages, virtual=virtual, schedule="interleaved" if virtual > 1 else "1f1b")
    return stage_patterns(model, plan, length)


def _share(time: Time) -> dict[str, float]:
    return {kind: time.exposed[kind] / sent if sent else 0.0 for kind, sent in time.sent.items()}


def _add(table: dict, one: Sent, times: float, exposed: float) -> None:
    key = one.record.axes, one.record.operation, one.link
    size, seconds, shown = table.get(key, (0.0, 0.0, 0.0))
    table[key] = (
        size + times * one.record.bytes,
        seconds + times * one.seconds,
        shown + times * one.seconds * exposed,
    )


def _once_each(units: Sequence[str], depths: int) -> list[str]:
    """The last stage's units with those of the MTP block once."""
    if MTP not in units:
        return list(units)
    start, end = units.index(MTP), units.index(HEAD)
    return [*units[:start], *units[start : start + (end - start) // depths], *units[end:]]


def _limit(seconds: dict[str, float], step: float, rooflines: Sequence[Roofline]) -> str:
    """The largest parts of the step in words, and within compute the largest kind of operation."""
    ranked = sorted(((n, part) for part, n in seconds.items() if n >= NOTABLE * step), reverse=True)
    work: dict[str, float] = collections.defaultdict(float)
    for line in rooflines:
        work[f"{line.operation} ({line.bound})"] += line.seconds * line.count
    most = max(work, key=lambda name: work[name])
    named = [f"{part} {100 * n / step:.0f} %" for n, part in ranked]
    return f"{', '.join(named)}; most of the compute: {most} {100 * work[most] / sum(work.values()):.0f} %"
