"""A model split into pipeline stages computes what one device computes, and holds no more than its schedule says."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import hybrid, run_config
from tests.train.plans import describe, random_runs

from orogen.config.checks import ConfigError
from orogen.config.run import RunConfig
from orogen.cost.assemble import assemble
from orogen.data.packing import Batch
from orogen.model.lm import initial_state
from orogen.parallel import placement
from orogen.parallel.plan import make_plan
from orogen.parallel.stash import Stash
from orogen.simulate.aot import flops_overhead
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.step import BATCH_AXES, batch_to_devices, gradients
from orogen.train.verify import OPTIMIZERS, packed_batch, verify

# Fewer than the plans without stages: each compiles a program per kind of segment.
RUNS = random_runs(3, seed=14, devices=8, stages=True, short=True)


def verified(model: dict, *, optimizers: Sequence[str] = ("adamw",), **plan) -> None:
    rows = plan.get("data", 1) * plan.get("microbatches", 1)
    run = run_config(hybrid(**model), plan=plan, batch_size=2 * rows, sequence_length=24)
    verdict = verify(run, optimizers=optimizers)
    assert verdict.passed, verdict
    assert not verdict.zero_leaves


@pytest.mark.parametrize("number", range(len(RUNS)), ids=[f"{i}-{name}" for i, (name, _) in enumerate(RUNS)])
def test_a_random_plan_with_stages_equals_one_device(number):
    run = RUNS[number][1]
    verdict = verify(run, optimizers=OPTIMIZERS[number % 2 :][:1])
    assert verdict.passed, (verdict, describe(run.plan))


def test_the_sample_covers_every_schedule():
    plans = [run.plan for _, run in RUNS]
    assert {plan.schedule for plan in plans} == {"gpipe", "1f1b", "interleaved"}
    assert {plan.stage for plan in plans} >= {2, 4}
    assert any(plan.context > 1 for plan in plans)
    assert {plan.stream for plan in plans if plan.tensor > 1} == {"time", "whole"}


@pytest.mark.parametrize(
    ("schedule", "stage", "model"),
    [
        ("1f1b", 8, {"pattern": "-|-|*|-||-|*|-/E", "mtp_depths": 2, "tie_word_embeddings": True}),
        ("gpipe", 4, {"pattern": "ME|*||-/-", "mtp_depths": 1}),
        ("eager_1f1b", 2, {"pattern": "-|*E/-", "mtp_depths": 1}),
        ("interleaved", 2, {"pattern": "-|-E|-|*|-|*||-/*", "mtp_depths": 1, "tie_word_embeddings": True}),
    ],
    ids=["eight", "four", "two-eager", "four-chunks"],
)
def test_stages_equal_one_device(schedule, stage, model):
    """One to four chunks per stage, uneven and empty segments, one and two depths of prediction on the last."""
    verified(model, stage=stage, schedule=schedule, microbatches=4)


@pytest.mark.parametrize(
    ("fsdp", "remat", "pattern", "optimizer"),
    [
        ("optimizer", "none", "E*/-", "muon"), ("gradients", "full", "*E", "adamw"),
        ("parameters", "none", "M|E/-", "muon"),
    ],
)  # fmt: skip
def test_stages_that_shard_over_data_equal_one_device(fsdp, remat, pattern, optimizer):
    """The embedding is on both stages or, without a deeper prediction, only on the first."""
    model = {"pattern": pattern, "mtp_depths": int("/" in pattern)}
    plan = {"stage": 2, "data": 2, "tensor": 2, "expert": 4, "fsdp": fsdp, "microbatches": 3, "remat": remat}
    verified(model, optimizers=(optimizer,), **plan)


@pytest.mark.parametrize(
    ("remat", "pattern"),
    [("elementwise", "E|*"), (("M:conv,gated_norm", "*:core", "E:rows"), "ME|*")],
    ids=["elementwise", "names"],
)
def test_stages_that_recompute_some_equal_one_device(remat, pattern):
    verified({"pattern": pattern, "mtp_depths": 0}, stage=2, microbatches=2, remat=remat)


@pytest.mark.parametrize(("stage", "virtual"), [(4, 2), (8, 4)])
def test_every_depth_of_interleaving_equals_one_device(stage, virtual):
    """With the shortest pattern that gives every chunk a layer, and no experts; two stages of four chunks, other
    patterns and a deeper prediction are above."""
    chunks = ["-", "*"] * (stage * virtual // 2)
    model = {"pattern": "|".join(chunks), "mtp_depths": 0, "tie_word_embeddings": virtual == 2}
    verified(model, stage=stage, schedule="interleaved", virtual=virtual, microbatches=stage)


def test_experts_balanced_over_the_global_batch():
    """The choices of all microbatches weight each one's loss, in the backbone's segments and at both depths."""
    model = {"pattern": "E|E/E", "mtp_depths": 2, "router_balance": "global", "router_aux_loss_coef": 3.0}
    verified(model, stage=2, data=2, microbatches=3)


@functools.cache
def exact() -> tuple[float, list[np.ndarray]]:
    return computed("M*-*", {"microbatches": 4}, "float32")


def computed(pattern: str, plan: dict, dtype: str) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients of the whole model under a plan."""
    run = run_config(hybrid(pattern=pattern, mtp_depths=0), plan=plan, batch_size=8, sequence_length=24)
    laid, built = assemble(run.model, run.plan, length=24)
    state = tuple(map(built.laid, initial_state(run.model, jnp.asarray(3))))
    params, buffers = jax.device_put(state, placement.shardings((built.params, built.buffers), laid))
    batch = batch_to_devices(packed_batch(run, run.train), laid)
    loss, grads, *_ = jax.jit(gradients(built, NEXT_TOKENS, run.model, laid, dtype))(params, buffers, batch)
    return float(loss), jax.tree.leaves(jax.device_get(built.layout.join(grads)))


@pytest.mark.parametrize("linear", ["plain", "fp8"])
def test_stages_in_few_bits_are_as_near_to_float32_as_one_device(linear):
    """Different fusion rounds in different places, so neither can be the other's reference."""
    plan = {"microbatches": 4, "linear": linear}
    stages = {"stage": 2, "schedule": "interleaved", "virtual": 2}
    loss, grads = exact()
    alone, alone_grads = computed("M*-*", plan, "bfloat16")
    staged, staged_grads = computed("M|*|-|*", {**plan, **stages}, "bfloat16")
    assert abs(staged - loss) <= 1.5 * abs(alone - loss)
    for true, one, other in zip(grads, alone_grads, staged_grads, strict=True):
        assert np.linalg.norm(other - true) <= 1.5 * np.linalg.norm(one - true)


def test_a_slot_of_many_elements_is_cut_before_its_offsets_wrap():
    """A slot of 5 · 2³⁰ elements takes three buffers without overlap, which another program's slots share."""
    stash = Stash()
    kept = stash.add([jax.core.ShapedArray((2**15, 2**15), jnp.bfloat16)] * 5)
    assert [place.buffer for place in kept] == [0, 1, 2, 3, 4]
    small = stash.add([jax.core.ShapedArray((2**15, 2**14), jnp.bfloat16)] * 4)
    assert [(place.buffer, place.start) for place in small] == [(0, 0), (0, 2**29), (0, 2**30), (1, 0)]


def test_fewer_microbatches_than_stages():
    verified({"pattern": "-|E|-|-", "mtp_depths": 0}, stage=4, microbatches=1)


def stashed(run: RunConfig) -> int:
    """The peak bytes of temporaries that one device needs in a step."""
    plan, built = assemble(run.model, run.plan, length=run.train.sequence_length)
    sharding = plan.sharding(*BATCH_AXES)
    shape = run.train.batch_size, run.train.sequence_length
    tokens_bt, weights_bt = (jax.ShapeDtypeStruct(shape, d, sharding=sharding) for d in (jnp.int32, jnp.float32))
    step = jax.jit(gradients(built, NEXT_TOKENS, run.model, plan, "float32"))
    lowered = step.lower(built.params, built.buffers, Batch(tokens_bt, tokens_bt, tokens_bt, weights_bt))
    return lowered.compile().memory_analysis().temp_size_in_bytes


def layers(schedule: str, microbatches: int, remat: str) -> RunConfig:
    model = hybrid(pattern="|".join(["-" * 8] * 4), hidden_size=96, mtp_depths=0, vocab_size=24)
    plan = {"stage": 4, "schedule": schedule, "microbatches": microbatches, "remat": remat}
    return run_config(model, plan=plan, batch_size=2 * microbatches, sequence_length=128)


@pytest.mark.parametrize(("remat", "most"), [("none", 0.55), ("full", 0.45)])
def test_1f1b_holds_as_many_microbatches_as_stages_and_gpipe_all(remat, most):
    few, many = (stashed(layers("1f1b", microbatches, remat)) for microbatches in (8, 16))
    assert many <= 1.05 * few
    assert many <= most * stashed(layers("gpipe", 16, remat))


@pytest.mark.parametrize(
    ("schedule", "virtual", "remat"), [("1f1b", 1, "full"), ("interleaved", 2, "none"), ("interleaved", 2, "full")]
)
def test_passes_compute_nothing_twice(schedule, virtual, remat):
    """All stages together compute the matrix products of one device with the same rematerialisation."""
    model = hybrid(pattern="ME*-/*", mtp_depths=2)
    plan = run_config(
        plan={"stage": 2, "schedule": schedule, "virtual": virtual, "microbatches": 4, "remat": remat}
    ).plan
    assert abs(flops_overhead(model, plan, 8, 24)) <= 1e-3


def test_stages_balance_what_layers_cost():
    model = hybrid(pattern="MEM*MEM*MEM*MEM*", mtp_depths=0)
    config = run_config(plan={"stage": 4, "microbatches": 4}).plan
    patterns = assemble(model, config, length=64, abstract=True).built.layout.segmented
    assert "".join(patterns) == model.layers.main
    assert len(patterns) == 4
    assert all(patterns)


REFUSED = [
    (
        {"stage": 2, "schedule": "interleaved", "microbatches": 3},
        "PlanConfig.microbatches is 3; expected a multiple of",
    ),
    (
        {"stage": 2, "schedule": "1f1b", "virtual": 2},
        "PlanConfig.virtual is 2; expected 1 or None where schedule is 1f1b",
    ),
    ({"stage": 8, "microbatches": 8}, "ModelConfig.pattern is 'M|E|*|-/*E', of 4 segments; expected 8"),
    ({"stage": 4, "offload": ("input",)}, "PlanConfig.offload is ('input',); expected () where stage is above 1"),
    ({"stage": 3, "microbatches": 3}, "ModelConfig.pattern is 'M|E|*|-/*E', of 4 segments; expected 3"),
]


@pytest.mark.parametrize(("plan", "message"), REFUSED, ids=str)
def test_schedules_that_cannot_be_are_refused(plan, message):
    with pytest.raises(ConfigError, match="^" + "".join("." if c in "|*()[]?+." else c for c in message)):
        make_plan(run_config(plan=plan).plan, hybrid(pattern="M|E|*|-/*E"), abstract=True)
