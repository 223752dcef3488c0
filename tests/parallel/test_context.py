"""The sequence over context ranks: the order, and what crosses from rank to rank, on eight devices.

Letters: b batch, s sequence, t time of a rank, h heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import hybrid

from orogen.config.plan import PlanConfig
from orogen.parallel import context
from orogen.parallel.plan import Plan, make_plan

PLANS = {"1": {}, "2": {"context": 2}, "4": {"context": 4, "data": 2}, "8": {"context": 8}, "8a2a": {"context": 8}}
BATCH, LENGTH, HEADS = 2, 48, 16


def plan_of(name: str) -> Plan:
    shift = "alltoall" if name.endswith("a2a") else "permute"
    return make_plan(PlanConfig(**PLANS[name], shift=shift), hybrid())


def rows(*, dtype=np.float32) -> np.ndarray:
    return np.arange(1, BATCH * LENGTH * HEADS + 1, dtype=dtype).reshape(BATCH, LENGTH, HEADS)


def run(plan: Plan, function, x: np.ndarray, *, whole_out: bool = False) -> np.ndarray:
    """`function(x of this rank)` on every rank; results in the order of the ranks, or, `whole_out`, rank by rank."""
    spec = plan.spec("batch", "context")
    arranged = x[:, context.zigzag(x.shape[1], plan.size("context"))]
    out = plan.spec("batch", "context") if not whole_out else plan.spec("batch", None, "context")
    return np.asarray(jax.jit(plan.run(function, inputs=(spec,), outputs=out))(arranged))


def in_sequence(y: np.ndarray, plan: Plan) -> np.ndarray:
    return y[:, np.argsort(context.zigzag(y.shape[1], plan.size("context")))]


def test_order_by_hand():
    np.testing.assert_array_equal(context.zigzag(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])
    np.testing.assert_array_equal(context.zigzag(6, 3), [0, 5, 1, 4, 2, 3])
    np.testing.assert_array_equal(context.zigzag(5, 1), range(5))


@pytest.mark.parametrize("name", PLANS)
def test_indices_are_the_order(name):
    plan = plan_of(name)
    found = run(plan, lambda x: jnp.broadcast_to(context.indices(x.shape[1], plan), x.shape[:2]), rows())
    np.testing.assert_array_equal(found[0], context.zigzag(LENGTH, plan.size("context")))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", PLANS)
def test_later_reads_on_across_ranks(name, steps):
    plan, x = plan_of(name), rows(dtype=np.int32)
    found = in_sequence(run(plan, lambda x: context.later(x, steps, plan), x), plan)
    np.testing.assert_array_equal(found[:, :-steps], x[:, steps:])
    np.testing.assert_array_equal(found[:, -steps:], 0)


@pytest.mark.parametrize("name", PLANS)
def test_earlier_is_what_precedes_each_part(name):
    plan, x, steps = plan_of(name), rows(), 3

    def joined(x):
        """Each part with its first three tokens replaced by the three before the part."""
        before, own = context.earlier(x, steps, plan), context.parts(x, plan)
        return context.joined(jnp.concatenate([before, own[:, steps:]], 1), plan)

    part = LENGTH if plan.size("context") == 1 else LENGTH // (2 * plan.size("context"))
    expected = x.copy()
    for start in range(0, LENGTH, part):
        expected[:, start : start + steps] = x[:, start - steps : start] if start else 0
    np.testing.assert_array_equal(in_sequence(run(plan, joined, x), plan), expected)


@pytest.mark.parametrize("name", PLANS)
def test_whole_is_the_sequence_in_order(name):
    plan, x = plan_of(name), rows()
    found = run(plan, lambda x: plan.piece(context.whole(x, plan), "context", dim=2), x, whole_out=True)
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("name", PLANS)
def test_heads_are_of_the_whole_sequence_in_order(name):
    plan, x = plan_of(name), rows()
    np.testing.assert_array_equal(run(plan, lambda x: context.to_heads(x, plan), x, whole_out=True), x)


@pytest.mark.parametrize("name", PLANS)
def test_tokens_come_back_from_heads(name):
    plan, x = plan_of(name), rows()
    found = run(plan, lambda x: context.to_tokens(context.to_heads(x[..., None], plan), plan)[..., 0], x)
    np.testing.assert_array_equal(in_sequence(found, plan), x)


def test_a_gradient_goes_back_the_way_its_value_came():
    """Of sum(later(x, 2) * g): g moved two on, from a rank to the one before."""
    plan, x = plan_of("4"), rows()
    g = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    spec = plan.spec("batch", "context")

    def device(x, g):
        return jax.grad(lambda x: jnp.sum(context.later(x, 2, plan) * g))(x)

    order = context.zigzag(LENGTH, 4)
    found = jax.jit(plan.run(device, inputs=(spec, spec), outputs=spec))(x[:, order], g[:, order])
    expected = np.concatenate([np.zeros_like(g[:, :2]), g[:, :-2]], 1)
    np.testing.assert_array_equal(in_sequence(np.asarray(found), plan), expected)


def test_a_part_shorter_than_the_reach_is_an_error():
    plan = plan_of("8")
    with pytest.raises(ValueError, match="parts of 3 tokens: expected at least 4"):
        run(plan, lambda x: context.later(x, 4, plan), rows())
