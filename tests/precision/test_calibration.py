"""What products measure, against numpy float64: maxima of inputs, and the gradient-weighted errors of outputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import several_devices
from tests.model.small import config, model_parts
from tests.precision import reference

from orogen.config.plan import PlanConfig
from orogen.config.precision import KINDS
from orogen.config.quantize import Measured, Target
from orogen.config.recipe import Recipe
from orogen.layers.documents import documents
from orogen.layers.linear import grouped, linears
from orogen.layers.parameter import parameter
from orogen.parallel.context import zigzag
from orogen.parallel.plan import make_plan
from orogen.parallel.rounding_state import NUMBER
from orogen.precision.calibration import probe_shape
from orogen.precision.words import step_key

B, T, D, WIDTHS = 2, 8, 36, (6, 4)  # 36: the last block of 16 is shorter
ROWS = ("batch", "context")
TARGETS = (
    Target(format="fp8", inputs=True), Target(format="fp8"), Target(format="fp8_channel", inputs=True),
    Target(format="nvfp4", inputs=True), Target(format="nvfp4", scales="four_over_six"),
    Target(format="nvfp4", scales="mse"),
)  # fmt: skip
RNG = np.random.default_rng(5)
X = RNG.standard_t(3, (B, T, D)).astype(np.float32)
W = RNG.standard_t(3, (D, sum(WIDTHS))).astype(np.float32)
G = RNG.normal(size=(B, T, sum(WIDTHS))).astype(np.float32)
STATIC = np.float32(5.5)  # the calibrated magnitude: some numbers are beyond it


def rounded_input(x, target):
    if not target.inputs:
        return x.astype(np.float64)
    flat = x.reshape(-1, x.shape[-1])
    if target.format == "fp8_channel":
        return np.stack([np.multiply(*reference.tensor_scaled(row, "e4m3")) for row in flat]).reshape(x.shape)
    if target.format == "fp8":
        return np.multiply(*reference.tensor_scaled(x, "e4m3", STATIC))
    return np.multiply(*reference.two_level(flat, (1, 16), largest=STATIC)).reshape(x.shape)


def rounded_weight(w, target, largest):
    if target.format == "fp8_channel":
        return np.stack([np.multiply(*reference.tensor_scaled(column, "e4m3")) for column in w.T], 1)
    if target.format == "fp8":
        return np.multiply(*reference.tensor_scaled(w, "e4m3", largest))
    if target.scales == "mse":
        return np.multiply(*reference.searched(w, (16, 1), largest))
    return np.multiply(*reference.two_level(w, (16, 1), target.scales == "four_over_six", largest))


@functools.cache
def expected_scores():
    """Σ (g Δy)² of each target, in float64; all weights share the scale of their tensor."""
    found = []
    for target in TARGETS:
        error = rounded_input(X, target) @ rounded_weight(W, target, np.abs(W).max()) - X.astype(np.float64) @ W
        found.append(((G * error) ** 2).sum())
    return np.array(found)


def measured_plan(kind, candidates, model, **sizes):
    plan = make_plan(PlanConfig(**sizes), model)
    maxima = np.zeros(probe_shape(1, 0)[:-1], np.float32)
    maxima[0] = STATIC
    measured = Measured(candidates=candidates)
    recipes = (Recipe(measured=((kind, measured),)),) * len(model.layers.main)
    return dataclasses.replace(plan, recipes=recipes, recipe=Recipe(), maxima=maxima)


def measured(kind, axes, in_axis, out_axis, targets=TARGETS, **sizes):
    """The maximum and the scores of a product of two weights, on a plan."""
    model = config(pattern="-", mtp_depths=0, hidden_size=D, intermediate_size=D)
    plan = measured_plan(kind, targets, model, **sizes)
    order = zigzag(T, sizes.get("context", 1))
    number = np.arange(B * T, dtype=np.int32).reshape(B, T)[:, order]
    probe = jnp.zeros(probe_shape(1, len(targets)))

    def on_device(x, weights, gradients, number, key, probe):
        here = plan.in_step(key, x[..., 0])

        def product(probe):
            at = here.on_tokens({NUMBER: number}, probe).of_layer()
            ys = linears(x, [parameter(w, axes) for w in weights], at, kind)
            return tuple(plan.sum(y, "tensor") for y in ys) if in_axis else ys

        return jax.vjp(product, probe)[1](gradients)[0]

    of_y, of_w = plan.spec(*ROWS, out_axis), plan.spec(in_axis, out_axis)
    inputs = (plan.spec(*ROWS, in_axis), of_w, of_y, plan.spec(*ROWS), plan.spec(), plan.spec())
    run = jax.jit(plan.run(on_device, inputs=inputs, outputs=plan.spec()))
    weights, gradients = (tuple(np.split(a, [WIDTHS[0]], axis=-1)) for a in (W, G[:, order]))
    found = np.asarray(run(X[:, order], weights, gradients, number, step_key(0, 0), probe))[0]
    at = KINDS.index(kind)
    assert not np.delete(found, at, 0).any() and not found[at, 1:].any()
    return found[at, 0, 0], found[at, 0, 1:]


COLUMNS, ROW_SPLIT = ("dense_up", ("embed", "mlp"), None, "mlp"), ("dense_down", ("mlp", "embed"), "mlp", None)


def test_a_product_measures_what_the_definitions_say():
    largest, scores = measured(*COLUMNS)
    assert largest == np.abs(X).max()
    np.testing.assert_allclose(scores, expected_scores(), rtol=2e-4)
    assert scores[5] < scores[4] < scores[3]  # better scales, and exact inputs


@several_devices
@pytest.mark.parametrize("case", [COLUMNS, ROW_SPLIT], ids=lambda case: case[0])
def test_ranks_measure_what_one_device_does(case):
    # Without nvfp4 where weights are split by rows: a rank's 18 inputs are other blocks of 16 than those of the whole.
    numbers = [0, 2] if case is ROW_SPLIT else [0, 4]
    largest, scores = measured(*case, targets=tuple(TARGETS[n] for n in numbers), data=2, context=2, tensor=2)
    assert largest == np.abs(X).max()
    np.testing.assert_allclose(scores, expected_scores()[numbers], rtol=2e-4)


def test_rows_of_no_expert_and_empty_experts_do_not_count():
    model = config(pattern="E", mtp_depths=0)
    plan = measured_plan("routed_up", (), model)
    rows = np.concatenate([X[0, :5], np.full((1, D), 1e4, np.float32)])  # the last one belongs to no expert
    weight = parameter(jnp.asarray(RNG.normal(size=(3, D, 4)), jnp.float32), ("expert", "expert_embed", "expert_mlp"))

    def largest(probe):
        at = plan.in_step(step_key(0, 0), jnp.zeros((1, 6), jnp.int32))
        at = at.on_tokens({NUMBER: jnp.zeros((1, 6), jnp.int32)}, probe).of_layer()
        return grouped(jnp.asarray(rows), weight, jnp.array([2, 0, 3]), at, "routed_up").sum()

    found = jax.jit(jax.grad(largest))(jnp.zeros(probe_shape(1, 0)))
    assert found[0, KINDS.index("routed_up"), 0, 0] == np.abs(X[0, :5]).max()


def test_experts_are_scored_together_at_the_output_of_their_layer():

    model = config(pattern="E", mtp_depths=0, hidden_size=20, moe_latent_size=None)
    target = Target(format="fp8", inputs=True)
    both = tuple((kind, Measured(candidates=(target,))) for kind in ("routed_up", "routed_down"))
    plan = measured_plan("routed_up", (target,), model)
    plan = dataclasses.replace(plan, recipes=(Recipe(measured=both),))
    graph, *state = model_parts(model)
    params, buffers = jax.tree.map(jnp.asarray, state)
    x = RNG.normal(size=(1, 6, 20)).astype(np.float32)
    dy = RNG.normal(size=x.shape).astype(np.float32)
    docs = documents(jnp.ones((1, 6), jnp.int32))

    def layer(x, probe, plan, change=lambda w: w):
        moe = nnx.merge(graph, params, buffers).backbone.children[0].mixer
        moe.shared = None
        for name in ("up", "down"):
            weight = getattr(moe.experts, name)
            setattr(moe.experts, name, weight.replace(change(weight[...])))
        if plan.rounds:
            at = plan.in_step(step_key(0, 0), docs.segments_bt)
            plan = at.on_tokens({NUMBER: jnp.arange(6, dtype=jnp.int32)[None]}, probe)
        return moe(x, docs, plan.of_layer())[0]

    probe = jnp.zeros(probe_shape(1, 1))
    found = jax.vjp(lambda probe: layer(x, probe, plan), probe)[1](dy)[0][0, KINDS.index("routed_up"), 0, 1]

    def by_expert(w):
        w = np.asarray(w)
        return jnp.asarray([np.multiply(*reference.tensor_scaled(one, "e4m3")) for one in w], jnp.float32)

    weights_only = dataclasses.replace(target, inputs=False)
    alone = tuple((kind, Measured(candidates=(weights_only,))) for kind in ("routed_up", "routed_down"))
    quiet = dataclasses.replace(plan, recipes=(Recipe(measured=alone),))
    score = jax.vjp(lambda probe: layer(x, probe, quiet), probe)[1](dy)[0][0, KINDS.index("routed_up"), 0, 1]
    plain = make_plan(PlanConfig(), model)
    change = np.asarray(layer(x, None, plain, by_expert), np.float64) - np.asarray(layer(x, None, plain), np.float64)
    np.testing.assert_allclose(score, ((dy * change) ** 2).sum(), rtol=1e-3)
    assert found > score  # inputs are rounded too
