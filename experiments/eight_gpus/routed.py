"""The full-size step with the routing of routers that were trained on real text for a while.

The state does not fit onto a host's disk, so training and timing share one process: batches of one row per data rank
train the model without bounds on what an expert receives; then the plan's own step is timed.
"""

import dataclasses
import statistics
import time
from typing import Any

from cases import Case

from orogen.bench.turns import Turn
from orogen.config.data import DataConfig
from orogen.config.run import RunConfig

LEARNING_RATE = 3e-4
WARMUP = 20  # steps


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


def measure(case: Case, turn: Turn, *, training: int, timed: int, small: bool) -> dict[str, Any]:
    """Trains for `training` steps, then times `timed` steps of the plan on further text."""
    import jax

    from orogen.bench.train import describe, rates
    from orogen.cost.assemble import assemble
    from orogen.train.next_token import NEXT_TOKENS
    from orogen.train.pretraining import PRETRAINING
    from orogen.train.state import create_state
    from orogen.train.step import batch_to_devices, make_step
    from orogen.train.trained import optimizer_of

    run, before = case.config(small=small), trained_run(case, training, small=small)
    corpus = PRETRAINING.open(before, None)
    plan, built = assemble(run.model, run.plan, length=run.train.sequence_length)
    plan_before, built_before = assemble(run.model, before.plan, length=run.train.sequence_length)
    # One optimizer for both, so that its state passes from one step to the other.
    optimizer = optimizer_of(before, built_before)
    train = make_step(built_before, NEXT_TOKENS, before, plan_before, optimizer)
    step = make_step(built, NEXT_TOKENS, run, plan, optimizer)
    turn.wait()
    state = create_state(run.model, built_before, optimizer, plan_before, run.train.seed)
    source, began, losses = PRETRAINING.source(before, corpus), time.perf_counter(), []
    for _ in range(training):
        state, metrics = train(state, batch_to_devices(source.take(state), plan_before))
        losses.append(metrics.loss)
    losses = [float(loss) for loss in losses]
    trained_s, skipped = time.perf_counter() - began, int(state.skipped)
    config = dataclasses.replace(run, data=before.data)
    source = PRETRAINING.source(config, corpus)
    batch, seconds = batch_to_devices(source.take(state), plan), []
    for number in range(timed + 2):
        started = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        if number > 1:  # the first compiles, the second warms up
            seconds.append(time.perf_counter() - started)
    loads_le = jax.device_get(metrics.load_le)
    ranks_lr = loads_le.reshape(len(loads_le), run.plan.expert, -1).sum(-1)
    assigned = loads_le.sum()
    tokens = run.train.batch_size * run.train.sequence_length
    return {
        **describe(case.work, run), "training_steps": training, "training_seconds": round(trained_s, 1),
        "training_skipped": skipped, "losses": [losses[0], statistics.mean(losses[-10:])],
        "loss": float(metrics.loss), "skipped": int(state.skipped) - skipped,
        "dropped": float(metrics.dropped / assigned), "overflow": float(metrics.overflow / assigned),
        "busiest_rank": float((ranks_lr.max(1) / ranks_lr.mean(1)).mean()),
        "busiest_expert": float((loads_le.max(1) / loads_le.mean(1)).mean()),
        **rates(seconds, tokens, run.model, run.train.sequence_length, devices=run.plan.devices),
    }  # fmt: skip
