"""The full-size step with the routing of routers that were trained on real text for a while.

The state does not fit onto a host's disk, so training and timing share one process: batches of one row per data rank
train the model without bounds on what an expert receives; then the plan's own step is timed. Both programs are compiled
at once, and training ends early if the part's time would not suffice otherwise.
"""

import dataclasses
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from cases import Case

from orogen.bench.turns import Turn
from orogen.config.data import DataConfig
from orogen.config.run import RunConfig

LEARNING_RATE = 3e-4
WARMUP = 20  # steps
# The timed steps begin while there is time for this many times what they should take, and FIXED_S more.
RESERVE, FIXED_S = 1.5, 10.0


class Programs(NamedTuple):
    """The compiled steps that train and that are timed, and what creates their state; all on the case's devices."""

    train: Any
    step: Any
    create: Any


def trained_run(case: Case, steps: int, *, small: bool) -> RunConfig:
    """The run that trains the routers before the plan of `case` is timed. Raises ConfigError."""
    run = case.config(small=small)
    data = DataConfig(corpus="stdlib", tokenizer="byte" if small else "bpe", vocab_size=259 if small else 4096)
    ragged = run.plan.expert > 1
    plan = dataclasses.replace(
        run.plan, microbatches=1, remat="full", capacity_factor=None, buffer_factor=None,
        dispatch="alltoall" if small else "ragged" if ragged else "allgather",
    )  # fmt: skip
    train = dataclasses.replace(run.train, steps=steps, batch_size=plan.data)
    optimizer = dataclasses.replace(run.optimizer, learning_rate=LEARNING_RATE, warmup_steps=min(WARMUP, steps - 1))
    return dataclasses.replace(run, plan=plan, train=train, optimizer=optimizer, data=data).check()


def measure(case: Case, turn: Turn, *, training: int, timed: int, ends: float, small: bool) -> dict[str, Any]:
    """Trains for `training` steps, then times `timed` steps of the plan on further text. ends: when both have to be
    done, by `time.monotonic`."""
    import jax

    from orogen.bench.train import describe, rates
    from orogen.cost.assemble import assemble
    from orogen.train.pretraining import PRETRAINING
    from orogen.train.step import batch_to_devices

    run, before = case.config(small=small), trained_run(case, training, small=small)
    corpus = PRETRAINING.open(before, None)
    plan, _ = assemble(run.model, run.plan, length=run.train.sequence_length)
    batch = batch_to_devices(PRETRAINING.source(dataclasses.replace(run, data=before.data), corpus).take(None), plan)
    source, began = PRETRAINING.source(before, corpus), time.monotonic()
    take = lambda: batch_to_devices(source.take(None), plan)  # noqa: E731
    programs = compile_steps(run, before, take(), batch)
    compiled_s = time.monotonic() - began
    turn.wait()
    state, began = programs.create(run.train.seed), time.monotonic()
    # What the timed steps take, in steps that train.
    after = (timed + 1) * run.train.batch_size / before.train.batch_size * RESERVE
    state, losses = trained(programs.train, state, take, steps=training, after=after, ends=ends - FIXED_S)
    trained_s, skipped = time.monotonic() - began, int(state.skipped)
    seconds = []
    for number in range(timed + 1):
        started = time.perf_counter()
        state, metrics = programs.step(state, batch)
        jax.block_until_ready(metrics)
        if number:  # the first warms up
            seconds.append(time.perf_counter() - started)
    tokens = run.train.batch_size * run.train.sequence_length
    return {
        **describe(case.work, run), "compiled_s": round(compiled_s, 1), "training_steps": len(losses),
        "training_seconds": round(trained_s, 1), "training_skipped": skipped,
        "losses": [losses[0], statistics.mean(losses[-10:])], "loss": float(metrics.loss),
        "skipped": int(state.skipped) - skipped, **routing(metrics, run.plan.expert),
        **rates(seconds, tokens, run.model, run.train.sequence_length, devices=run.plan.devices),
        "gb": held_gb(programs.step),
    }  # fmt: skip


def compile_steps(run: RunConfig, before: RunConfig, first: Any, batch: Any) -> Programs:
    """Compiles both steps at once. first, batch: batches of `before` and of `run`."""
    from orogen.checkpoint.steps import with_shardings
    from orogen.cost.assemble import assemble
    from orogen.train.next_token import NEXT_TOKENS
    from orogen.train.state import abstract_state, state_creator, state_shardings
    from orogen.train.step import make_step
    from orogen.train.trained import optimizer_of

    (plan, built), (plan_before, built_before) = (
        assemble(run.model, each.plan, length=run.train.sequence_length) for each in (run, before)
    )
    # One optimizer for both, so that its state passes from one step to the other.
    optimizer = optimizer_of(before, built_before)
    state = abstract_state(built_before, optimizer, None)
    state = with_shardings(state, state_shardings(state, plan_before))
    lowered = (
        make_step(built_before, NEXT_TOKENS, before, plan_before, optimizer).lower(state, first),
        make_step(built, NEXT_TOKENS, run, plan, optimizer).lower(state, batch),
        state_creator(run.model, built_before, optimizer, plan_before).lower(run.train.seed),
    )
    with ThreadPoolExecutor(len(lowered)) as pool:
        return Programs(*pool.map(lambda each: each.compile(), lowered))


def trained(program: Any, state: Any, take: Any, *, steps: int, after: float, ends: float) -> tuple[Any, list[float]]:
    """The state after at most `steps` steps, and their losses. Training stops where no time is left for `after` steps
    until `ends`. take: gives the next batch."""
    began, losses = 0.0, []
    for done in range(1, steps + 1):
        state, metrics = program(state, take())
        losses.append(metrics.loss)
        if done > 1:
            float(losses[-2])  # waits for the step before, so that the clock says how far the device is
        if done == 2:  # the first one sets up communication
            began = time.monotonic()
        elif done > 2 and ends - time.monotonic() < (after + 1) * (time.monotonic() - began) / (done - 2):
            break
    return state, [float(loss) for loss in losses]


def routing(metrics: Any, ranks: int) -> dict[str, float]:
    """What became of the assignments of a step, and how far its busiest ranks and experts are above the mean."""
    import jax

    loads_le = jax.device_get(metrics.load_le)
    ranks_lr = loads_le.reshape(len(loads_le), ranks, -1).sum(-1)
    assigned = loads_le.sum()
    return {
        "dropped": float(metrics.dropped / assigned), "overflow": float(metrics.overflow / assigned),
        "busiest_rank": float((ranks_lr.max(1) / ranks_lr.mean(1)).mean()),
        "busiest_expert": float((loads_le.max(1) / loads_le.mean(1)).mean()),
    }  # fmt: skip


def held_gb(program: Any) -> float:
    """GB of a device that XLA has laid out for a program."""
    from orogen.simulate.compiled import whole
    from orogen.simulate.memory import compiled_bytes

    return round(whole({"analytic": {}, "compiled": compiled_bytes(program)})[1] / 1e9, 2)
