"""The training step: accumulation, router biases, steps that are not finite, float32 master parameters."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid, run_config, several_devices

from orogen.checkpoint.steps import Checkpoints, with_shardings
from orogen.model.lm import build
from orogen.parallel import placement
from orogen.parallel.plan import make_plan
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.state import abstract_state, create_state, from_items, items
from orogen.train.step import batch_to_devices, gradients, make_step, update_bias
from orogen.train.verify import packed_batch

GOLDEN = Path(__file__).parents[1] / "fixtures" / "losses.json"


class Run:
    """A state, a step and a batch of the small hybrid."""

    def __init__(self, config):
        self.config, self.plan, self.built = config, make_plan(config.plan, config.model), build(config.model)
        self.optimizer = make_optimizer(config.optimizer, config.train.steps, self.built.params)
        self.state = create_state(config.model, self.built, self.optimizer, self.plan, config.train.seed)
        self.step = make_step(self.built, NEXT_TOKENS, config, self.plan, self.optimizer)
        self.batch = batch_to_devices(packed_batch(config, config.train), self.plan)


@pytest.fixture(scope="module")
def fresh():
    return Run(run_config())


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def test_ten_losses_are_those_on_record(fresh):
    state, losses = copy(fresh.state), []
    for _ in range(10):
        state, metrics = fresh.step(state, fresh.batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    if os.environ.get("OROGEN_WRITE_GOLDENS"):
        GOLDEN.write_text(json.dumps(losses) + "\n")
    np.testing.assert_allclose(losses, json.loads(GOLDEN.read_text()), rtol=1e-5)


def test_the_step_names_the_parts_that_profiles_count():
    run = Run(run_config(plan={"data": 2, "fsdp": "gradients"}, batch_size=4))
    text = run.step.lower(run.state, run.batch).as_text(debug_info=True)
    for scope in ("gather_parameters", "reduce_gradients", "gradient_norm", "optimizer"):
        assert f"{scope}/" in text, scope


# Experts so unequally loaded that a balance loss over parts of the batch would show.
BALANCED = {"pattern": "E*/E", "mtp_depths": 2, "router_balance": "global", "router_aux_loss_coef": 3.0}


@pytest.mark.parametrize("model", [{"pattern": "ME*-/E", "mtp_depths": 1}, BALANCED], ids=["by row", "global"])
def test_microbatches_add_up_to_the_batch(model):
    whole = run_config(hybrid(**model), batch_size=8)
    parts = run_config(hybrid(**model), batch_size=8, plan={"microbatches": 4})
    results = []
    for config in (whole, parts):
        run = Run(config)
        function = jax.jit(gradients(run.built, NEXT_TOKENS, config.model, run.plan, "float32"))
        results.append(jax.device_get(function(run.state.params, run.state.buffers, run.batch)))
    (loss, grads, counts, sums), (other_loss, other_grads, other_counts, other_sums) = results
    assert other_loss == pytest.approx(loss, rel=1e-6)
    for name, count in counts.metrics.items():
        np.testing.assert_array_equal(count, other_counts.metrics[name])
    for a, b in zip(sums.load, other_sums.load, strict=True):
        np.testing.assert_array_equal(a, b)
    # By leaf: an element's error follows from the terms of its sum, and those of a small element may be large.
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


@several_devices
@pytest.mark.parametrize(("devices", "passes"), [(1, 2), (2, 1)])
def test_microbatches_overlap_but_not_on_several_cpu_devices(devices, passes):
    """There, the collectives of one could run beside those of another."""
    sizes = {"microbatches": 4, "interleave": 2, "data": devices}
    run = Run(run_config(hybrid(pattern="-", mtp_depths=0), batch_size=8, plan=sizes))
    function = gradients(run.built, NEXT_TOKENS, run.config.model, run.plan, "float32")
    traced = str(jax.make_jaxpr(function)(run.state.params, run.state.buffers, run.batch))
    (loop,) = re.findall(r"length=4\s.*?unroll=(\d+)", traced, re.DOTALL)
    assert int(loop) == passes


def test_a_bias_moves_once_a_global_batch_towards_experts_with_less_than_their_share():
    before = jnp.asarray([0.0, 0.5, -0.5, 0.0])
    after = update_bias(before, jnp.asarray([3.0, 9.0, 0.0, 4.0]), 1e-3)  # mean 4
    np.testing.assert_allclose(after, [1e-3, 0.499, -0.499, 0.0], rtol=1e-6)


def test_every_router_gets_its_own_load(fresh):
    state, metrics = fresh.step(copy(fresh.state), fresh.batch)
    moved = [np.asarray(b) for b in jax.tree.leaves(state.buffers)]
    load_le = np.asarray(metrics.load_le)
    expected_le = 1e-3 * np.sign(load_le.mean(-1, keepdims=True) - load_le)
    # Buffers: the backbone's two repeated E layers stacked, then the MTP block's.
    np.testing.assert_allclose(np.concatenate([moved[0].reshape(2, -1), moved[1][None]]), expected_le, atol=1e-9)
    assert load_le.shape == (3, 24)


def test_loads_come_in_the_order_of_the_pattern():
    config = hybrid(pattern="EMEEMEE/*E", mtp_depths=1)  # folds to nested repetitions
    built = build(config)
    sizes = [leaf.shape for leaf in jax.tree.leaves(built.buffers)]
    assert sum(int(np.prod(shape[:-1])) for shape in sizes) == 6
    number, loads = 0, []
    for shape in sizes:
        loads.append(np.zeros(shape, np.float32))
    names = {}
    for leaf, load in zip(jax.tree_util.tree_leaves_with_path(built.buffers), loads, strict=True):
        for index in np.ndindex(load.shape[:-1]):
            names[number] = str(leaf[0])
            load[index] = number
            number += 1
    order_l = np.asarray(built.layout.loads([jnp.asarray(load) for load in loads]))[:, 0]
    assert sorted(order_l.tolist()) == list(range(6))
    assert "mtp" in names[int(order_l[-1])]


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(fresh):
    state = copy(fresh.state)
    broken = state.params["backbone"]["children"][1]["children"][1]["mixer"]["query"]
    value = broken[...].at[0, 0, 0].set(jnp.nan)
    state.params["backbone"]["children"][1]["children"][1]["mixer"]["query"] = broken.replace(value)
    before = jax.device_get(state)
    after, metrics = fresh.step(state, fresh.batch)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    assert int(metrics.worst_leaf) >= 0
    for name in ("params", "buffers", "optimizer"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(before, name))
    after, _ = fresh.step(after, fresh.batch)
    assert int(after.skipped_in_row) == 2


def test_an_offloaded_optimizer_updates_as_one_on_the_device_does(monkeypatch):
    """A CPU has one memory, which both names mean: this tests the update, and that a bad step makes none.

    Epsilon is large beside rounding: otherwise an element with a tiny gradient would move by its sign."""
    monkeypatch.setattr("orogen.parallel.placement.HOST", "device")
    monkeypatch.setattr("orogen.parallel.mesh.HAS_HOST_MEMORY", ("cpu",))
    configs = [run_config(hybrid(pattern="*E", mtp_depths=0), plan={"offload_optimizer": o}) for o in (True, False)]
    smooth = dataclasses.replace(configs[0].optimizer, epsilon=1e-3)
    run, fresh = (Run(dataclasses.replace(config, optimizer=smooth)) for config in configs)
    after, _ = run.step(run.state, run.batch)
    wanted, _ = fresh.step(fresh.state, fresh.batch)
    chex.assert_trees_all_close(after, wanted, rtol=1e-6, atol=1e-7)
    bad = after._replace(params=jax.tree.map(lambda x: x * jnp.nan, after.params))
    before = jax.device_get(bad)
    again, metrics = run.step(bad, run.batch)
    assert not np.isfinite(metrics.loss) and int(again.skipped) == 1
    chex.assert_trees_all_equal(again.optimizer, before.optimizer)


def test_a_finite_step_ends_the_row_of_skipped_ones(fresh):
    count = lambda n: jax.device_put(np.int32(n), fresh.state.skipped.sharding)  # noqa: E731 - else the step recompiles
    state = copy(fresh.state)._replace(skipped=count(5), skipped_in_row=count(3))
    after, metrics = fresh.step(state, fresh.batch)
    assert (int(after.skipped), int(after.skipped_in_row), int(metrics.worst_leaf)) == (5, 0, -1)


def test_a_step_that_overflows_a_buffer_changes_nothing_and_is_counted():
    run = Run(run_config(hybrid(pattern="E/E"), plan={"dispatch": "ragged", "buffer_factor": 0.5}))
    before = jax.device_get(run.state)
    after, metrics = run.step(run.state, run.batch)
    # 4 x 24 tokens with 3 experts each: room for 144 assignments in the layer and at each of 2 MTP depths.
    assert int(metrics.overflow) == int(metrics.load_le.sum()) - 3 * 144 > 0
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    assert int(metrics.worst_leaf) == -1 and np.isfinite(metrics.loss)
    for name in ("params", "buffers", "optimizer"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(before, name))


def test_bfloat16_computes_with_float32_masters(fresh):
    run = Run(run_config(compute_dtype="bfloat16"))
    state, metrics = run.step(copy(run.state), run.batch)
    _, exact = fresh.step(copy(fresh.state), fresh.batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    # Eight bits of mantissa through nine layers, averaged over some eighty tokens.
    assert float(metrics.loss) == pytest.approx(float(exact.loss), rel=2e-2)
    assert float(metrics.loss) != float(exact.loss)


def test_the_state_keeps_its_layout_so_that_nothing_recompiles(monkeypatch):
    """No step is traced twice either, whatever the batch holds: a trace without a compilation would waste time."""
    plan = {"data": 2, "tensor": 2, "expert": 4, "fsdp": "optimizer"}
    run = Run(run_config(hybrid(pattern="ME*/-", mtp_depths=1), plan=plan))
    chex.clear_trace_counter()
    jit = jax.jit
    with monkeypatch.context() as patch:
        patch.setattr(jax, "jit", lambda step, **options: jit(chex.assert_max_traces(step, n=1), **options))
        run.step = make_step(run.built, NEXT_TOKENS, run.config, run.plan, run.optimizer)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(run.state)]
    state, _ = run.step(run.state, run.batch)
    for leaf, sharding in zip(jax.tree.leaves(state), shardings, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    other = packed_batch(run.config, dataclasses.replace(run.config.train, seed=run.config.train.seed + 1))
    state, _ = run.step(state, batch_to_devices(other, run.plan))
    assert run.step._cache_size() == 1


def test_initial_parameters_do_not_depend_on_the_mesh(fresh):
    folded = Run(run_config(plan={"data": 2, "tensor": 4, "expert": 2, "fsdp": "parameters"}))
    chex.assert_trees_all_equal(folded.state.params, fresh.state.params)


@pytest.mark.parametrize(
    "fsdp, moments_split, weights_split",
    [
        ("none", False, False),
        ("optimizer", True, True),
        ("gradients", True, True),
        ("parameters", True, True),
    ],
)
def test_what_fsdp_splits_between_steps(fsdp, moments_split, weights_split):
    run = Run(run_config(hybrid(pattern="ME*-ME*-", mtp_depths=0), plan={"data": 4, "fsdp": fsdp}))
    matrices = lambda tree: [  # noqa: E731
        leaf
        for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
        if isinstance(leaf, nnx.Variable) and len(leaf.get_metadata()["axes"]) > 1 and "taps" not in leaf.axes
    ]
    split = lambda leaf: leaf[...].addressable_shards[0].data.size < leaf[...].size  # noqa: E731
    assert {split(leaf) for leaf in matrices(run.state.params)} == {weights_split}
    assert {split(leaf) for leaf in matrices(run.state.optimizer)} == {moments_split}


def test_routers_without_correction_bias_train_count_loads_and_are_restored(tmp_path):
    model = hybrid(
        pattern="E-E-E", mtp_depths=0, mlp_gated=True, mlp_bias=True, router_correction_bias=False,
        router_score="softmax", norm="rms_cast_first", tie_word_embeddings=True, learned_positions=24,
    )  # fmt: skip
    run = Run(run_config(model, compute_dtype="bfloat16"))
    assert not jax.tree.leaves(run.built.buffers)
    state, losses = run.state, []
    for _ in range(3):
        state, metrics = run.step(state, run.batch)
        losses.append(float(metrics.loss))
    assert losses[2] < losses[1] < losses[0]
    tokens = int((np.asarray(run.batch.segments_bt) != 0).sum())
    np.testing.assert_array_equal(metrics.load_le.sum(1), [3 * tokens] * 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, items(state), {"position": {}, "identity": {}}, run.built.layout)
    target = abstract_state(run.built, run.optimizer)
    with Checkpoints(tmp_path) as checkpoints:
        found, _ = checkpoints.restore(items(with_shardings(target, placement.shardings(target, run.plan))))
    chex.assert_trees_all_equal(from_items(found), state)


def reductions(fsdp: str, microbatches: int) -> tuple[list[int], list[int], int]:
    """The result size of each reduce-scatter and the operand size of each all-reduce, once per execution, and the bytes
    of temporaries, of the compiled gradients of one MLP between an embedding and a head, over four data ranks."""
    sizes = {"data": 4, "tensor": 2, "fsdp": fsdp, "microbatches": microbatches}
    config = run_config(hybrid(**MATRICES), plan=sizes, batch_size=4 * microbatches)
    plan, built = make_plan(config.plan, config.model), build(config.model)
    function = gradients(built, NEXT_TOKENS, config.model, plan, "float32")
    stored = placement.shardings((built.params, built.buffers), plan)
    batch = batch_to_devices(packed_batch(config, config.train), plan)
    compiled = (
        jax.jit(lambda p, b, x: function(placement.working(p, plan), b, x), in_shardings=(*stored, None))
        .lower(built.params, built.buffers, batch)
        .compile()
    )
    # The model has no repeated layer, so such operations are only in loops over microbatches.
    found, text = {name: [] for name in ("reduce-scatter", "all-reduce")}, compiled.as_text()
    for computation in filter(None, text.split("\n\n")):
        times = microbatches if f"body={computation.split(maxsplit=1)[0]}" in text else 1
        for results, name in re.findall(r"= (.*?) (reduce-scatter|all-reduce)\(", computation):
            shapes = re.findall(r"\w\[([\d,]+)\]", results)
            found[name] += times * [math.prod(map(int, shape.split(","))) for shape in shapes]
    return found["reduce-scatter"], found["all-reduce"], compiled.memory_analysis().temp_size_in_bytes


# The MLP's two matrices, 56 x 344 on a tensor rank, are the only arrays of their size.
MATRICES = {"pattern": "-", "mtp_depths": 0, "hidden_size": 56, "intermediate_size": 688, "vocab_size": 22}
LARGE = 56 * 344


@pytest.mark.parametrize(("fsdp", "microbatches", "each"), [
    ("none", 2, 0), ("optimizer", 1, 1), ("optimizer", 2, 1), ("gradients", 1, 1), ("gradients", 2, 2),
])  # fmt: skip
def test_gradients_are_scattered_once_a_step_or_once_a_microbatch(fsdp, microbatches, each):
    scattered, summed, _ = reductions(fsdp, microbatches)
    assert scattered.count(LARGE // 4) == 2 * each
    assert summed.count(LARGE) == (2 if fsdp == "none" else 0)


def test_scattering_each_microbatch_keeps_a_piece_of_the_gradient_and_not_the_whole():
    """A device keeps a quarter of both matrices' float32 sums, and a microbatch adds a quarter to it."""
    whole, piece = (reductions(fsdp, 6)[2] for fsdp in ("optimizer", "gradients"))
    assert whole - piece >= 2 * (1 - 2 / 4) * 4 * LARGE
