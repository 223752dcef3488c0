"""Legal plans of a model on so many devices, ranked by the time of the whole run, phases included.

Sizes, sharding, microbatches, the schedule (1F1B, or interleaved with two chunks) and recomputation are searched;
implementations, offloading and the batch are those of the config, and experts have no tensor ranks. Context ranks leave
each at least LEAST_TOKENS; with stages, parameters are not sharded. Every combination of sizes is predicted with the
least recomputation that fits into memory.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.dtype import BYTES
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.cost.ledger import Workload
from orogen.cost.local import local
from orogen.parallel.legal import fits
from orogen.parallel.schedule import chunks_per_stage
from orogen.simulate.footprint import stage_memory
from orogen.simulate.hardware import Hardware, Software, machine
from orogen.simulate.pipeline import expected_flight
from orogen.simulate.predict import Step, imbalance, patterns, predict
from orogen.simulate.prediction import PASSING, Prediction
from orogen.simulate.routing import BALANCED, Routing
from orogen.simulate.shapes import shapes, without_blend

# Recomputation from none to all, and what is sharded, from the least traffic to the least memory.
REMATS = ("none", "selective", "full")
SHARDED = ("optimizer", "parameters")
# Sequences of a microbatch, and chunks of a stage.
ROWS = (1, 2, 4)
CHUNKS = (1, 2)
# Ranks of context parallelism leave each rank at least so many tokens.
LEAST_TOKENS = 4096
# How many of the best are predicted in full, and with how many passes each.
FEW_PASSES, BEST = 2000, 24
# Plans whose bubble alone takes longer than this, relative to their work, are legal but not predicted.
FAR = 1.75
MOST_DEVICES = 2**14
# The fields of a plan that the search sets.
CHOSEN = (
    "data", "context", "tensor", "stage", "expert", "microbatches", "expert_tensor", "fsdp", "fsdp_size", "dispatch",
    "shift", "schedule", "virtual", "remat", "offload",
)  # fmt: skip
SIZES = ("data", "context", "tensor", "stage", "expert", "microbatches")


class Ranked(NamedTuple):
    """A plan and its prediction."""

    plan: PlanConfig
    prediction: Prediction


class Ranking(NamedTuple):
    """The best plans, fastest first; how many layouts were legal, how many of those fit, and how many were skipped,
    neither tried nor predicted, because of their bubble."""

    plans: tuple[Ranked, ...]
    legal: int
    fitting: int
    skipped: int


def search(config: RunConfig, cluster: ClusterConfig, devices: int, *, routing: Routing = BALANCED) -> Ranking:
    """Ranks the plans of `config`'s model and batch on so many devices. Raises ConfigError if none is legal or fits.

    All plans that fit are ranked by an estimate; the BEST of them are predicted in full, and come first.
    """
    config.need("model", "train")
    hardware, software = machine(cluster)
    cluster = dataclasses.replace(cluster, devices=None)
    config = without_blend(config)
    estimated, legal, skipped = [], 0, 0
    for plan in candidates(config, hardware, devices):
        legal += 1
        if _bubble(plan) > FAR:
            skipped += 1
            continue
        lightest = _lightest(config, plan, (hardware, software), routing)
        if lightest is not None:
            tried = dataclasses.replace(config, plan=lightest)
            estimated.append((_seconds(tried, cluster, (hardware, software), routing), legal, lightest))
    best = []
    for _, _, plan in sorted(estimated):
        found = predict(dataclasses.replace(config, plan=plan), cluster, routing=routing, most=FEW_PASSES)
        best += [Ranked(plan, found)] * found.fits
        if len(best) == BEST:
            break
    if not best:
        raise ConfigError(_none(config, devices, (legal, skipped), hardware))
    best.sort(key=lambda ranked: ranked.prediction.budget["hours"])
    return Ranking(tuple(best), legal, len(estimated), skipped)


def _seconds(config: RunConfig, cluster: ClusterConfig, machine: tuple[Hardware, Software], routing: Routing) -> float:
    """About how many seconds all steps of the run take, of whatever phase."""
    length, found = config.train.sequence_length, 0.0
    for run in shapes(config):
        step = Step(run.config, cluster, machine, routing, most=0, length=length)
        found += step.estimate() * run.tokens / step.tokens
    return found


def candidates(config: RunConfig, hardware: Hardware, devices: int) -> Iterator[PlanConfig]:
    """Every legal plan on so many devices, with nothing recomputed, each with the least sharding that a group of data
    ranks allows."""
    model, batch, base = config.model, _smallest(config), config.plan
    longest = max(one.sequence_length for one in config.stretches())
    routed = "E" in model.layers.main + model.layers.mtp
    layers = len(model.layers.main)
    written = len(model.layers.segments)
    for stage in _divisors(devices):
        if stage > layers or (written > 1 and written % stage):
            continue
        for tensor in _divisors(devices // stage):
            if tensor > hardware.node_size or tensor > 16:
                continue
            for context in _divisors(devices // stage // tensor):
                if context > 1 and longest // context < LEAST_TOKENS:
                    continue
                data = devices // stage // tensor // context
                if batch % data:
                    continue
                for expert in _divisors(devices // stage) if routed else (1,):
                    if routed and model.n_routed_experts % expert:
                        continue
                    sizes = {"stage": stage, "tensor": tensor, "context": context, "data": data, "expert": expert}
                    yield from _with_microbatches(config, base, sizes, written)


def _with_microbatches(
    config: RunConfig, base: PlanConfig, sizes: dict[str, int], written: int
) -> Iterator[PlanConfig]:
    """The plans of these sizes: for each number of sequences per microbatch, and each number of chunks per stage."""
    stage, per_rank = sizes["stage"], _smallest(config) // sizes["data"]
    fields: dict[str, Any] = {**sizes, "expert_tensor": 1, "virtual": None, "schedule": "1f1b", "remat": "none"}
    fields |= {
        "offload": (),
        "fsdp_size": None,
        "fsdp": "optimizer" if sizes["data"] * sizes["context"] > 1 else "none",
    }
    fields["shift"] = "alltoall" if stage > 1 and sizes["context"] > 1 else "permute"
    if sizes["expert"] > 1 and base.expert == 1 and base.dispatch == "allgather":
        fields["dispatch"] = "ragged"
    if not _legal(config, dataclasses.replace(base, **fields, microbatches=1)):
        return
    for rows in ROWS:
        if per_rank % rows:
            continue
        microbatches = per_rank // rows
        chunks = (written // stage,) if written > 1 else CHUNKS if stage > 1 else (1,)
        for virtual in chunks:
            if virtual > 1 and (microbatches % stage or virtual * stage > len(config.model.layers.main)):
                continue
            schedule = {"schedule": "interleaved", "virtual": virtual} if virtual > 1 else {}
            overlapping = math.gcd(base.interleave, microbatches)
            yield dataclasses.replace(base, **{**fields, **schedule}, microbatches=microbatches, interleave=overlapping)


def _smallest(config: RunConfig) -> int:
    """Sequences that ranks and microbatches must divide: the run's batches, of whatever phase, are multiples of it."""
    return math.gcd(*(one.batch_size for one in config.stretches()))


def _legal(config: RunConfig, plan: PlanConfig) -> bool:
    if not fits(plan, config.model):
        return False
    try:
        dataclasses.replace(config, plan=plan, data=None).check()
    except ConfigError:
        return False
    return True


def _bubble(plan: PlanConfig) -> float:
    """The time of a balanced pipeline over that of its work alone."""
    return 1 + (plan.stage - 1) / (plan.microbatches * (plan.virtual or 1))


def _lightest(
    config: RunConfig, plan: PlanConfig, machine: tuple[Hardware, Software], routing: Routing
) -> PlanConfig | None:
    """The plan with the least sharding and recomputation with which it fits; None if it never does."""
    train, model, (hardware, software) = config.train, config.model, machine
    works = [
        Workload(each.batch_size // (plan.data * plan.microbatches), each.sequence_length // plan.context, itemsize)
        for each, itemsize in ((run.config.train, BYTES[train.compute_dtype]) for run in shapes(config))
    ]
    virtual = chunks_per_stage(plan, model)
    flight = expected_flight(plan.schedule, plan.stage, plan.microbatches, virtual)
    layers, uneven = patterns(model, plan.stage, virtual, train.sequence_length), imbalance(routing, model, plan)
    for fsdp in SHARDED if plan.fsdp != "none" and plan.stage == 1 else (plan.fsdp,):
        for remat in REMATS:
            tried = dataclasses.replace(plan, fsdp=fsdp, remat=remat)
            alike, dynamic = bool(software.one_program), bool(software.dynamic)
            held = [local(model, tried, work, dynamic=dynamic, imbalance=uneven) for work in works]
            memory = [
                stage
                for here in held
                for stage in stage_memory(here, config.optimizer, layers, flight, alike=alike, outermost=True)
            ]
            if max(stage.total for stage in memory) <= hardware.memory_bytes:
                return tried
            state = min(stage.total - sum(stage.parts[part] for part in PASSING) for stage in memory)
            if state > hardware.memory_bytes:
                break  # recomputation does not help
    return None


def nearest_feasible(
    config: RunConfig, cluster: ClusterConfig, devices: int, *, routing: Routing = BALANCED
) -> Ranked | None:
    """The plan closest to `config`'s that fits: on so many devices if any does, else on the next power of two that has
    one, up to MOST_DEVICES, else on one below; None if there is none."""
    hardware, software = machine(cluster)
    config, cluster = without_blend(config), dataclasses.replace(cluster, devices=None)
    powers = [2**n for n in range(MOST_DEVICES.bit_length())]
    above, below = [n for n in powers if n > devices], [n for n in reversed(powers) if n < devices]
    for number in [devices] * (devices <= MOST_DEVICES) + above + below:
        plans = sorted(candidates(config, hardware, number), key=lambda plan: _distance(plan, config.plan))
        for plan in filter(None, (_lightest(config, plan, (hardware, software), routing) for plan in plans)):
            found = predict(dataclasses.replace(config, plan=plan), cluster, routing=routing, most=FEW_PASSES)
            if found.fits:  # the lightest plan was tried on the first and the last stage alone
                return Ranked(plan, found)
    return None


def _distance(plan: PlanConfig, other: PlanConfig) -> float:
    """How far apart two plans are, in factors of two between their sizes."""
    return sum(abs(math.log2(getattr(plan, name) / getattr(other, name))) for name in SIZES)


def _none(config: RunConfig, devices: int, counts: tuple[int, int], hardware: Hardware) -> str:
    """Why no plan is left. counts: legal plans, and those of them that were skipped."""
    legal, skipped = counts
    sizes = sorted({one.batch_size for one in config.stretches()})
    batches = f"TrainConfig.batch_size = {config.train.batch_size}"
    if len(sizes) > 1:
        batches += f" (sizes in its ramp and phases: {', '.join(map(str, sizes))})"
    if not legal:
        return (
            f"no plan on {devices} devices is legal for the model with {batches}; expected devices whose data-parallel "
            f"part divides {'the batch' if len(sizes) == 1 else 'every batch'}"
        )
    gib, tried = hardware.memory_bytes / 2**30, legal - skipped
    why = []
    if tried:
        why.append(f"none of {tried} legal plans on {devices} devices fits into {gib:.0f} GiB")
    if skipped:
        why.append(
            f"{skipped} legal plans{'' if tried else f' on {devices} devices'} were skipped, since their pipelines "
            f"would take more than {FAR:g} times as long as their work with {batches}"
        )
    remedies = ["more devices or memory"] * bool(tried) + ["a larger batch"] * bool(skipped)
    return f"{'; '.join(why)}; expected {' or '.join(remedies)}"


def plan_text(plan: PlanConfig, comment: str) -> str:
    """A gin file with every field of the plan that the search chose, or that differs from its default. It may follow
    another with a plan."""
    defaults = PlanConfig()
    lines = [
        f"PlanConfig.{field.name} = {getattr(plan, field.name)!r}"
        for field in dataclasses.fields(plan)
        if field.name in CHOSEN or getattr(plan, field.name) != getattr(defaults, field.name)
    ]
    return "\n".join([f"# {comment}", *lines]) + "\n"


def explain(ranking: Ranking) -> list[str]:
    """The winner and the runner-up, what limits each, and why the one is faster."""
    lines = [f"{ranking.fitting} of {ranking.legal} legal layouts fit"]
    if ranking.skipped:
        lines[0] += f"; {ranking.skipped} were skipped: their bubbles exceed {100 * (FAR - 1):g} % of their work"
    for name, ranked in zip(("winner", "runner-up"), ranking.plans, strict=False):
        found = ranked.prediction
        lines.append(
            f"{name}: {describe(ranked.plan)}; {found.tokens_per_second:,.0f} tokens/s, {100 * found.mfu:.1f} % MFU, "
            f"{found.device_memory_bytes / 2**30:.1f} GiB; {found.limit}"
        )
    if len(ranking.plans) > 1:
        first, second = (ranked.prediction for ranked in ranking.plans[:2])
        longer = f"the runner-up takes {100 * (second.budget['hours'] / first.budget['hours'] - 1):.1f} % longer"
        if len(first.shapes) > 1:
            return [*lines, f"{longer} for all phases; tokens/s and MFU are of the first"]
        changes = {part: second.seconds[part] - seconds for part, seconds in first.seconds.items()}
        most = max(changes, key=lambda part: changes[part])
        parts = f"{second.seconds[most]:.3g} s instead of {first.seconds[most]:.3g} s per step"
        lines.append(f"{longer}, most of it in {most}: {parts}")
    return lines


def describe(plan: PlanConfig) -> str:
    """The plan in a few words."""
    axes = [
        f"{name} {n}" for name in ("data", "context", "tensor", "stage", "expert") if (n := getattr(plan, name)) > 1
    ]
    more = [f"{plan.microbatches} microbatch{'es' * (plan.microbatches > 1)}"]
    if plan.stage > 1:
        more.append(plan.schedule + (f" x {plan.virtual}" if plan.virtual and plan.virtual > 1 else ""))
    more += [f"fsdp {plan.fsdp}"] if plan.fsdp != "none" else []
    more += [f"remat {plan.remat}"] if plan.remat != "none" else []
    return ", ".join([" x ".join(axes) or "one device", *more])


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
