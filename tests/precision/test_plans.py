"""A plan rounds as one device does: one product and its gradients on ranks of data, context and tensor.

A single product, since behind it a sum in another order may move a number over the midpoint of its neighbours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import several_devices
from tests.model.small import config
from tests.precision.test_emulated import RECIPES, SMALL

from orogen.config.plan import PlanConfig
from orogen.config.precision import PrecisionConfig
from orogen.layers.linear import linears
from orogen.layers.parameter import parameter
from orogen.parallel.context import zigzag
from orogen.parallel.plan import make_plan
from orogen.parallel.rounding_state import NUMBER
from orogen.precision.words import step_key
from orogen.train.formats import in_formats

B, T, D = 2, 32, 32
WIDTHS = (32, 16)
MODEL = config(pattern="-", mtp_depths=0, hidden_size=D, intermediate_size=WIDTHS[0])
ROWS = ("batch", "context")
# Weights split by columns, and by rows, whose partial products are summed over ranks.
KINDS = {"dense_up": (("embed", "mlp"), None, "mlp"), "dense_down": (("mlp", "embed"), "mlp", None)}


def results(recipe, kind, **sizes):
    """y, dx, dw on a plan of these sizes, in the order of the tokens."""
    axes, in_axis, out_axis = KINDS[kind]
    block = {"block": 4} if recipe in SMALL else {}
    nvfp4 = {"hadamard": 8} if recipe == "nvfp4" else {}
    plan = make_plan(PlanConfig(**sizes), MODEL)
    plan = in_formats(plan, PrecisionConfig(recipe=recipe, **block, **nvfp4), MODEL)
    rng = np.random.default_rng(4)
    x, dy = (np.exp(rng.normal(size=(B, T, d))).astype(np.float32) for d in (D, sum(WIDTHS)))
    x[1] *= 50
    weights, gradients = (np.split(a, [WIDTHS[0]], axis=-1) for a in (rng.normal(size=(D, sum(WIDTHS))), dy))
    order = zigzag(T, sizes.get("context", 1))
    number = np.arange(B * T, dtype=np.int32).reshape(B, T)

    def on_device(x, weights, gradients, number, key):
        here = plan.in_step(key, x[..., 0]).on_tokens({NUMBER: number}).of_layer()

        def product(x, weights):
            parameters = [parameter(w, axes) for w in weights]
            ys = linears(x, parameters, here, kind)
            return tuple(plan.sum(y, "tensor") for y in ys) if in_axis else ys

        y, back = jax.vjp(product, x, weights)
        return y, *back(gradients)

    of_x, of_y, of_w = plan.spec(*ROWS, in_axis), plan.spec(*ROWS, out_axis), plan.spec(in_axis, out_axis)
    inputs = (of_x, of_w, of_y, plan.spec(*ROWS), plan.spec())
    run = jax.jit(plan.run(on_device, inputs=inputs, outputs=(of_y, of_x, of_w)))
    as_float = lambda parts: tuple(jnp.asarray(p, jnp.float32) for p in parts)  # noqa: E731
    taken = lambda a: a[:, order]  # noqa: E731
    operands = taken(x), as_float(weights), as_float(map(taken, gradients)), taken(number)
    y, dx, dw = jax.device_get(run(*operands, step_key(3, jnp.int32(2))))
    back = np.argsort(order)
    return [a[:, back] for a in (*y, dx)], list(dw)


@several_devices
@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_round_as_one_device_does(recipe):
    # Both kinds with scales per tensor, which are maxima over ranks; one with each other recipe.
    for kind in KINDS if recipe == "fp8_tensorwise" else ["dense_down" if recipe == "nvfp4" else "dense_up"]:
        alone, alone_w = results(recipe, kind)
        folded, folded_w = results(recipe, kind, context=2, tensor=2)
        for mine, other in zip(folded + folded_w, alone + alone_w, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=2e-6 * np.abs(other).max(), err_msg=kind)


@several_devices
def test_a_scale_of_one_ranks_numbers_alone_would_be_found(monkeypatch):
    """What the test above would see without the maximum over ranks."""
    alone, _ = results("fp8_tensorwise", "dense_up")
    monkeypatch.setattr("orogen.parallel.plan.Plan.max", lambda self, x, axis: x)
    folded, _ = results("fp8_tensorwise", "dense_up", context=2)
    assert np.abs(folded[0] - alone[0]).max() > 1e-3 * np.abs(alone[0]).max()


def test_a_plan_without_recipes_is_not_left_unrounded():
    plan, precision = make_plan(PlanConfig(), MODEL), PrecisionConfig(recipe="mxfp8")
    with pytest.raises(ValueError, match="expected one per layer"):
        in_formats(plan.with_recipes(None), precision, MODEL)
    with pytest.raises(ValueError, match="expected that of all layers"):
        in_formats(plan, precision, MODEL).of_layer().in_step(step_key(3, 1), jnp.zeros((1, 4), jnp.int32))


def test_nothing_is_rounded_outside_a_step():
    plan = in_formats(make_plan(PlanConfig(), MODEL), PrecisionConfig(recipe="mxfp8"), MODEL)
    weight = parameter(jnp.zeros((D, 32)), ("embed", "mlp"))
    assert isinstance(weight, nnx.Param)
    with pytest.raises(ValueError, match="a recipe rounds operands outside a training step"):
        linears(jnp.zeros((1, 4, D)), [weight], plan.of_layer(), "dense_up")
