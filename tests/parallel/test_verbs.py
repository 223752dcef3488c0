"""The verbs of a plan on eight devices, and the gradients that they sum."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tests.helpers import hybrid
from tests.parallel.plans import plan_of, tree

from orogen.config.plan import PlanConfig
from orogen.parallel import placement
from orogen.parallel.axes import STREAM, TOKENS
from orogen.parallel.plan import Plan, make_plan

# Verbs. Devices are numbered data-major: device 4·i + j holds data rank i and tensor rank j.


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(abstract=False, fsdp="parameters")


def each(plan: Plan, function, *arrays, inputs) -> np.ndarray:
    """What `function` returns on each device, stacked by device."""
    outputs = PartitionSpec(plan.mesh.axis_names)
    return np.asarray(jax.jit(plan.run(lambda *xs: function(*xs)[None], inputs=inputs, outputs=outputs))(*arrays))


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(-9, 10, shape).astype(np.float32)  # sums are exact


def test_every_verb_is_the_identity_on_one_device():
    plan = make_plan(PlanConfig(fsdp="parameters"), hybrid())
    x = jnp.asarray(numbers(2, 3, 5))
    for verb in (plan.gather, plan.scatter, plan.sum, plan.max, plan.exchange, plan.piece):
        assert verb(x, "tensor") is x, verb
    for stream in ("time", "rows", "whole"):
        held = plan.with_stream(stream)
        assert all(verb(x) is x for verb in (held.enter, held.leave, held.own, held.deal, held.collect))
    assert plan.total(x) is x
    assert plan.vary(x) is x
    assert plan.index("tensor") == 0
    np.testing.assert_array_equal(plan.weight(nnx.Param(x[0], axes=("embed", "mlp"))), x[0])


def test_index_is_the_rank_in_row_major_order(plan):
    axes = ("batch", "tensor", "expert", "kv_heads", "group_peers")
    ranks = each(plan, lambda: jnp.stack([jnp.asarray(plan.index(axis)) for axis in axes]), inputs=())
    expected = [(i, j, 4 * i + j, j // 2, j % 2) for i in range(2) for j in range(4)]
    assert ranks.tolist() == [list(row) for row in expected]


def test_gather_concatenates_in_rank_order(plan):
    x_btd = numbers(2, 12, 5)
    spec = plan.spec("batch", "tensor", None)
    y = each(plan, lambda x: plan.gather(x, "tensor"), x_btd, inputs=spec)
    np.testing.assert_array_equal(y, np.repeat(x_btd, 4, axis=0)[:, None])


def test_scatter_keeps_each_ranks_piece_of_the_sum(plan):
    x = numbers(8, 12, 5)  # a whole sequence on each device
    y = each(plan, lambda x: plan.scatter(x, "tensor"), x, inputs=plan.spec("expert", None, None))
    expected = x.reshape(2, 4, 12, 5).sum(1).reshape(2, 4, 3, 5)
    np.testing.assert_array_equal(y, expected.reshape(8, 1, 3, 5))


def test_gather_of_a_scatter_is_the_sum_everywhere(plan):
    x = numbers(8, 12, 5)
    spec = plan.spec("expert", None, None)
    y = each(plan, lambda x: plan.gather(plan.scatter(x, "tensor", dim=1), "tensor", dim=1), x, inputs=spec)
    z = each(plan, lambda x: plan.sum(x, "tensor"), x, inputs=spec)
    np.testing.assert_array_equal(y, z)
    np.testing.assert_array_equal(z[:, 0], np.repeat(x.reshape(2, 4, 12, 5).sum(1), 4, axis=0))


def test_scatter_of_a_gather_counts_each_rank(plan):
    x_btd = numbers(2, 12, 5)
    spec = plan.spec("batch", "tensor", None)
    y = each(plan, lambda x: plan.scatter(plan.gather(x, "tensor"), "tensor"), x_btd, inputs=spec)
    np.testing.assert_array_equal(y.reshape(2, 12, 5), 4 * x_btd)


def test_a_stream_by_time_is_split_in_time_by_rows_in_rows_and_whole_not_at_all(plan):
    """(b, t) of each device is what the specs of STREAM give it; of TOKENS, each token is on one rank."""
    shapes = {"time": ((4, 3), (4, 3)), "rows": ((1, 12), (1, 12)), "whole": ((4, 12), (4, 3))}
    for stream, (held, routed) in shapes.items():
        streamed, global_shape = plan.with_stream(stream), (8, 12)
        assert streamed.stream_shape(4, 12) == held
        for axes, shape in ((STREAM, held), (TOKENS, routed)):
            assert NamedSharding(plan.mesh, streamed.spec(*axes)).shard_shape(global_shape) == shape, stream
    assert plan.decoding().stream == "rows" and plan.stream == "time"


@pytest.mark.parametrize("stream", ["time", "rows", "whole"])
def test_a_layer_enters_with_all_of_the_stream_and_leaves_the_sum(plan, stream):
    """Rank j of tensor computes (j + 1) x: they add up to 10 x, and so do the gradients, whoever holds the stream."""
    plan = plan.with_stream(stream)
    x_btd, ids_bt = numbers(8, 12, 5), numbers(8, 12)

    def device(x_btd, ids_bt):
        def value(x_btd):
            h_btd = plan.enter(x_btd)
            assert h_btd.shape == (4, 12, 5)
            y_btd = plan.leave(h_btd * (1 + plan.index("tensor")))
            own_bt = plan.deal(plan.own(ids_bt))
            weighed = plan.deal(y_btd) * own_bt[..., None]
            return plan.total(weighed.sum()), plan.collect(plan.deal(y_btd))

        grads, y_btd = jax.grad(value, has_aux=True)(x_btd)
        return plan.agreed(y_btd, *STREAM, None), grads

    spec = plan.spec(*STREAM, None)
    run = plan.run(device, inputs=(spec, plan.spec("batch", None)), outputs=(spec, spec))
    y_btd, grads = jax.jit(run)(x_btd, ids_bt)
    np.testing.assert_array_equal(y_btd, 10 * x_btd)
    np.testing.assert_array_equal(grads, 10 * np.broadcast_to(ids_bt[..., None], x_btd.shape))


def test_a_stream_that_ranks_cannot_share_is_refused():
    plan = plan_of({"tensor": 4}, abstract=False)
    odd = jnp.zeros((2, 6, 3))
    for verb, stream, dim in (("leave", "time", 1), ("own", "rows", 0), ("deal", "whole", 1)):
        with pytest.raises(ValueError, match=rf"tensor=4 for \(2, 6, 3\): .* multiple of 4 along dimension {dim}"):
            each(plan, getattr(plan.with_stream(stream), verb), odd, inputs=plan.spec())


def test_sum_and_scatter_count_copies_too(plan):
    """A value that every rank holds alike is still added once per rank."""
    x = numbers(1, 8, 3)
    assert np.array_equal(each(plan, lambda x: plan.sum(x, "tensor"), x, inputs=plan.spec())[0], 4 * x)
    y = each(plan, lambda x: plan.scatter(x, "tensor"), x, inputs=plan.spec())
    np.testing.assert_array_equal(y[:4].reshape(1, 8, 3), 4 * x)


def test_max_is_over_the_axis_alone(plan):
    x = numbers(8, 3)
    y = each(plan, lambda x: plan.max(x, "tensor"), x, inputs=plan.spec("expert", None))
    np.testing.assert_array_equal(y[:, 0], np.repeat(x.reshape(2, 4, 3).max(1), 4, axis=0))


def test_total_adds_each_leaf_over_what_it_varies_over(plan):
    x, y = numbers(8, 3), numbers(2, 5)
    specs = (plan.spec("expert", None), plan.spec("batch", None))
    totals = jax.jit(plan.run(lambda x, y: plan.total((x, y, jnp.ones(2))), inputs=specs, outputs=(plan.spec(),) * 3))(
        x, y
    )
    for found, expected in zip(totals, (x.sum(0)[None], y.sum(0)[None], np.ones(2)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_exchange_sends_piece_r_to_rank_r(plan):
    x = numbers(8, 16, 3)  # [sender, two rows for each receiver]
    y = each(plan, lambda x: plan.exchange(x[0], "expert"), x, inputs=plan.spec("expert", None, None))
    np.testing.assert_array_equal(y, x.reshape(8, 8, 2, 3).transpose(1, 0, 2, 3).reshape(8, 16, 3))


def test_exchange_twice_is_the_identity(plan):
    x = numbers(8, 16, 3)
    twice = lambda x: plan.exchange(plan.exchange(x[0], "expert"), "expert")  # noqa: E731
    np.testing.assert_array_equal(each(plan, twice, x, inputs=plan.spec("expert", None, None)), x)


def test_pieces_gather_to_the_whole(plan):
    x = numbers(2, 12, 5)
    piece = each(plan, lambda x: plan.piece(x, "tensor"), x, inputs=plan.spec("batch", None, None))
    np.testing.assert_array_equal(piece.reshape(2, 4, 3, 5), x.reshape(2, 4, 3, 5))
    back = lambda x: plan.gather(plan.piece(x, "tensor"), "tensor")  # noqa: E731
    whole = each(plan, back, x, inputs=plan.spec("batch", None, None))
    np.testing.assert_array_equal(whole[:, 0], np.repeat(x, 4, axis=0))


def test_pieces_along_another_dimension(plan):
    x = numbers(3, 8)
    piece = each(plan, lambda x: plan.piece(x, "expert", dim=-1), x, inputs=plan.spec())
    np.testing.assert_array_equal(piece, x.T[:, :, None])


def gradient(plan: Plan, params: dict, scale: np.ndarray):
    """Of sum(w · scale of this data rank), on every device; `scale` is (data, embed, mlp)."""

    def loss(params, scale):
        weight = plan.weight(params["up"])
        assert weight.shape == (48, 2)  # whole along embed, this rank's quarter of mlp
        return (weight * scale[0]).sum() + (params["norm"][...] * scale[0].sum(1)).sum()

    specs = plan.specs(params)
    return plan.run(jax.grad(loss), inputs=(specs, plan.spec("batch", None, "mlp")), outputs=specs)(params, scale)


def collectives(function, *arguments) -> list[str]:
    return re.findall(r"= (psum|reduce_scatter|all_gather)\w*\[", str(jax.make_jaxpr(function)(*arguments)))


@pytest.mark.parametrize("fsdp", ["none", "parameters"])
def test_gradient_of_a_weight_is_its_sum_over_the_batch(fsdp):
    plan = plan_of(abstract=False, fsdp=fsdp)
    params = {name: tree()[name] for name in ("up", "norm")}
    scale = numbers(2, 48, 8)
    grads = jax.jit(lambda params, scale: gradient(plan, params, scale))(params, scale)
    np.testing.assert_array_equal(grads["up"][...], scale.sum(0))
    np.testing.assert_array_equal(grads["norm"][...], scale.sum((0, 2)))


def test_gradient_of_a_sharded_weight_is_scattered_not_replicated(plan):
    params = {name: tree()[name] for name in ("up", "norm")}
    found = collectives(lambda params, scale: gradient(plan, params, scale), params, numbers(2, 48, 8))
    assert sorted(found) == ["all_gather", "psum", "reduce_scatter"]  # psum is of the norm's weight, which stays whole
    replicated = plan_of(abstract=False, fsdp="none")
    found = collectives(lambda params, scale: gradient(replicated, params, scale), params, numbers(2, 48, 8))
    assert sorted(found) == ["psum", "psum"]


# Sums of these over four ranks need 22 bits: 8, as bfloat16 has, would lose all but the first.
FINE = np.array([1.0, 2.0**-10, 2.0**-15, 2.0**-20], np.float32)


def fine(dtype) -> jnp.ndarray:
    """(rank, embed, mlp), of which each rank has one number throughout."""
    return jnp.broadcast_to(jnp.asarray(FINE, dtype)[:, None, None], (4, 48, 8))


def reduced_types(function, *arguments) -> set[str]:
    """In what ranks' sums are taken, of all that the program has."""
    return set(re.findall(r":(\w+)\[[^=]*= (?:psum|reduce_scatter)\w*\[", str(jax.make_jaxpr(function)(*arguments))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fsdp", ["optimizer", "gradients"])
def test_gradients_are_scattered_and_summed_in_float32(fsdp, dtype):
    plan = make_plan(PlanConfig(data=4, fsdp=fsdp), hybrid())
    up = tree()["up"]

    def reduce(scale):
        return placement.sum_gradients(placement.scatter_gradients({"up": up.replace(scale[0])}, plan), plan)

    outputs = placement.stored_specs({"up": up}, plan)
    step = plan.run(reduce, inputs=plan.spec("batch", None, None), outputs=outputs)
    found = jax.jit(step)(fine(dtype))["up"][...]
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.full((48, 8), FINE.astype(np.float64).sum(), np.float32))
    assert reduced_types(step, fine(dtype)) == ({"f32"} if dtype == "float32" else set())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gathered_weights_gradient_is_summed_in_float32(dtype):
    plan = make_plan(PlanConfig(data=4, fsdp="parameters"), hybrid())
    params = {"up": tree()["up"]}
    params["up"] = params["up"].replace(jnp.zeros((48, 8), dtype))
    specs = plan.specs(params)
    loss = lambda params, scale: (plan.weight(params["up"]) * scale[0]).sum()  # noqa: E731
    step = plan.run(jax.grad(loss), inputs=(specs, plan.spec("batch", None, None)), outputs=specs)
    found = jax.jit(step)(params, fine(dtype))["up"][...]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.full((48, 8), FINE.sum(), dtype))
    assert reduced_types(step, params, fine(dtype)) == ({"f32"} if dtype == "float32" else set())


def test_a_forgotten_sum_is_a_type_error(plan):
    with pytest.raises(ValueError, match="replicated|varying"):
        plan.run(lambda x: x.sum(), inputs=plan.spec("batch"), outputs=plan.spec())(numbers(2))


def test_varied_parameters_sum_their_gradient_once_after_a_loop(plan):
    def loss(params, scale):
        params = plan.vary(params)
        return jax.lax.scan(lambda total, s: (total + (params["norm"][...] * s).sum(), None), plan.vary(0.0), scale[0])[
            0
        ]

    params, scale = {"norm": tree()["norm"]}, numbers(2, 7, 48)
    specs = plan.specs(params)
    step = plan.run(jax.grad(loss), inputs=(specs, plan.spec("batch", None, None)), outputs=specs)
    np.testing.assert_array_equal(jax.jit(step)(params, scale)["norm"][...], 4 * scale.sum((0, 1)))  # on 4 tensor ranks
    (inside,) = (e.params["jaxpr"] for e in jax.make_jaxpr(step)(params, scale).eqns if e.primitive.name == "shard_map")
    loops = [str(equation) for equation in inside.eqns if equation.primitive.name == "scan"]
    assert loops and not any("psum" in loop for loop in loops)
    assert collectives(step, params, scale) == ["psum"]
