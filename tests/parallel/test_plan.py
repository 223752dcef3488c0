"""The plan: which mesh axes each logical axis is split over, what it refuses, and the verbs on eight devices."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from tests.helpers import hybrid

from orogen.config.checks import ConfigError
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.model.lm import build
from orogen.model.stages import Stages
from orogen.parallel import placement
from orogen.parallel.axes import STREAM, TOKENS
from orogen.parallel.plan import Plan, make_plan, single_device_plan

# Eight devices, data 2 x tensor 4, all of them experts; two key heads and two groups split tensor in two.
FOLDED = {"data": 2, "tensor": 4, "expert": 8}


def plan_of(sizes: dict | None = None, model: dict | None = None, *, abstract: bool = True, **choices) -> Plan:
    return make_plan(
        PlanConfig(**(FOLDED if sizes is None else sizes), **choices), hybrid(**(model or {})), abstract=abstract
    )


# Rules


def test_spec_follows_the_rules():
    plan = plan_of()
    assert plan.mesh.axis_names == ("data", "tensor.0", "tensor.1")
    assert plan.spec("batch", "tensor", None) == PartitionSpec("data", ("tensor.0", "tensor.1"), None)
    assert plan.spec("expert", "expert_embed", "expert_mlp") == PartitionSpec(
        ("data", "tensor.0", "tensor.1"), None, None
    )
    assert plan.spec() == PartitionSpec()


def test_size_counts_the_ways_an_axis_is_split():
    plan = plan_of()
    assert {axis: plan.size(axis) for axis in ("batch", "heads", "kv_heads", "expert", "norm")} == {
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "expert": 8,
        "norm": 1,
    }


@pytest.mark.parametrize("before", [None, ("M", "*", "E-", "")], ids=["whole", "other-stages"])
def test_a_state_between_layouts_is_spread_over_the_stages(before):
    """Two stages, which alone split anything, hold a half each, but for vectors of odd lengths."""
    model = {"pattern": "M*E-", "mtp_depths": 0}
    plan = plan_of({"stage": 2, "microbatches": 2}, model)
    params = build(hybrid(**model), before and Stages(before, "", 4)).params
    sizes, shares = [], []
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(placement.spread(params, plan)), strict=True):
        sizes.append(leaf.size)
        shares.append(math.prod(sharding.shard_shape(leaf.shape)))
    assert sum(sizes) / 2 <= sum(shares) <= 1.01 * sum(sizes) / 2


def test_what_tensor_and_fsdp_split_stays_split_between_layouts():
    model = {"pattern": "M*E-", "mtp_depths": 0}
    plan = plan_of({"stage": 2, "tensor": 2, "data": 2, "microbatches": 2}, model, fsdp="optimizer")
    params = build(hybrid(**model)).params
    axes = lambda s: {name for part in s.spec if part for name in np.atleast_1d(part)}  # noqa: E731
    pairs = list(zip(*(jax.tree.leaves(f(params, plan)) for f in (placement.spread, placement.shardings)), strict=True))
    assert all(axes(spread) >= axes(stored) for spread, stored in pairs)
    assert any({"stage", "data", "tensor"} <= axes(spread) for spread, _ in pairs)


def test_an_odd_array_is_not_spread():
    plan = plan_of({"stage": 2, "microbatches": 2}, {"pattern": "M*", "mtp_depths": 0})
    odd = nnx.Param(jax.ShapeDtypeStruct((3, 5), jnp.float32), axes=("norm", "norm"))
    assert placement.spread({"odd": odd}, plan)["odd"].get_value().spec == PartitionSpec(None, None)


def test_unknown_axis_is_an_error_and_no_silent_replica():
    with pytest.raises(KeyError, match="haeds"):
        plan_of().spec("haeds")
    with pytest.raises(KeyError, match="haeds"):
        plan_of().size("haeds")


def test_a_mesh_axis_used_twice_is_refused():
    with pytest.raises(ValueError, match=r"\('heads', 'mlp'\) -> .*: one mesh axis splits two array axes"):
        plan_of().spec("heads", "mlp")
    with pytest.raises(ValueError, match="one mesh axis splits two array axes"):
        plan_of().spec("batch", "expert")


@pytest.mark.parametrize(
    ("fsdp", "inside", "stored"),
    [
        ("none", (), ()),
        ("optimizer", (), ("data.0", "data.1")),
        ("gradients", (), ("data.0", "data.1")),
        ("parameters", *[("data.0", "data.1")] * 2),
    ],
)
def test_fsdp_decides_what_is_split_over_data(fsdp, inside, stored):
    plan = plan_of({"data": 4, "tensor": 2, "expert": 4}, fsdp=fsdp)
    assert plan.rules["embed"] == inside
    assert plan.storage["embed"] == stored
    assert plan.rules["expert_embed"] == inside[:1]  # over expert_data, the outer half of data
    assert plan.storage["expert_embed"] == stored[:1]


def test_fsdp_size_splits_one_copy_over_neighbours():
    plan = plan_of({"data": 4, "tensor": 2, "expert": 2}, fsdp="parameters", fsdp_size=2)
    assert plan.rules["embed"] == plan.storage["embed"] == plan.rules["expert_embed"] == ("data.1",)
    assert plan.rules["batch"] == ("data.0", "data.1")
    plan = plan_of({"data": 4, "tensor": 2, "expert": 4}, fsdp="optimizer", fsdp_size=2)
    assert (plan.storage["embed"], plan.storage["expert_embed"], plan.rules["embed"]) == (("data.1",), (), ())


@pytest.mark.parametrize("fsdp", ["none", "optimizer", "gradients", "parameters"])
def test_fsdp_changes_no_other_axis(fsdp):
    plan, plain = plan_of(fsdp=fsdp), plan_of()
    for rules in (plan.rules, plan.storage):
        assert {axis: names for axis, names in rules.items() if "embed" not in axis} == {
            axis: names for axis, names in plain.rules.items() if "embed" not in axis
        }


def test_key_heads_are_split_as_far_as_there_are_any():
    plan = plan_of()
    assert plan.rules["heads"] == ("tensor.0", "tensor.1")
    assert plan.rules["kv_heads"] == ("tensor.0",)
    assert plan.rules["groups"] == ("tensor.0",)
    assert plan.rules["group_peers"] == ("tensor.1",)


def test_key_heads_enough_for_every_rank_are_split_like_heads():
    plan = plan_of(model={"num_key_value_heads": 8, "n_groups": 4})
    assert plan.mesh.axis_names == ("data", "tensor")
    assert plan.rules["kv_heads"] == plan.rules["groups"] == plan.rules["heads"] == ("tensor",)
    assert plan.rules["group_peers"] == ()


def test_tokens_are_split_over_everything_that_splits_the_sequence():
    assert plan_of().rules["token_time"] == plan_of().rules["stream_time"] == ("tensor.0", "tensor.1")


def test_one_device_splits_nothing():
    plan = plan_of({})
    assert dict(plan.mesh.shape) == {"data": 1}
    assert set(plan.rules.values()) == set(plan.storage.values()) == {()}


def test_single_device_plan_keeps_the_choices():
    config = PlanConfig(**FOLDED, fsdp="parameters", dispatch="alltoall", capacity_factor=1.25, remat="full")
    plan = single_device_plan(config, hybrid(), sources=(2, 1, 4))
    assert plan.config == PlanConfig(dispatch="alltoall", capacity_factor=1.25, remat="full")
    assert plan.sources == (2, 1, 4)
    assert plan.mesh.size == 1


# Meshes


def test_an_abstract_plan_asks_for_no_device(monkeypatch):
    def refuse(*_):
        raise AssertionError("asked for devices")

    monkeypatch.setattr(jax, "devices", refuse)
    plan = plan_of({"data": 512, "tensor": 8, "expert": 16}, {"n_routed_experts": 32})
    assert isinstance(plan.mesh, AbstractMesh)
    assert math.prod(plan.mesh.shape.values()) == 4096


def test_devices_are_taken_in_order():
    plan = plan_of(abstract=False)
    assert plan.mesh.devices.ravel().tolist() == jax.devices()
    assert plan.mesh.devices.shape == (2, 2, 2)


def test_too_many_devices_are_refused_with_the_way_to_simulate_them():
    with pytest.raises(ConfigError) as caught:
        plan_of({"data": 4, "tensor": 4}, abstract=False)
    assert str(caught.value) == (
        "PlanConfig asks for 16 devices (data 4 x tensor 4); expected at most the 8 that exist "
        "(--fake_devices 16 simulates them)"
    )


@pytest.mark.parametrize(("field", "kernel"), FOR_GPU.items())
def test_kernels_for_a_gpu_are_refused_without_one(field, kernel, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    plan_of({field: kernel}, abstract=True)
    with pytest.raises(ConfigError) as caught:
        plan_of({field: kernel}, abstract=False)
    expected = f"another on cpu: {kernel} needs an NVIDIA GPU"
    assert str(caught.value) == f"PlanConfig.{field} is {kernel!r}; expected {expected}"


def test_a_norm_of_whole_groups_is_refused_where_ranks_share_one():
    plan_of({"tensor": 2}, rms_norm="triton")
    with pytest.raises(ConfigError) as caught:
        plan_of({"tensor": 4}, rms_norm="triton")
    expected = "plain where ranks of tensor share a group of Mamba's norm"
    assert str(caught.value) == f"PlanConfig.rms_norm is 'triton'; expected {expected}"


def test_sizes_that_no_layer_reads_are_not_split():
    unread = {"mamba_num_heads": 6, "n_groups": 3, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = hybrid(pattern="-E", mtp_depths=0, **unread)
    config = PlanConfig(tensor=4, context=2, context_attention="alltoall", context_ssm="heads")
    assert make_plan(config, model, abstract=True).size("kv_heads") == 4
    with pytest.raises(ConfigError, match=r"mamba_num_heads is 6"):
        make_plan(config, dataclasses.replace(model, pattern="-M"), abstract=True)


def test_a_vocabulary_is_filled_up_to_a_multiple_of_tensor():
    for tensor, rows in ((1, 94), (2, 94), (4, 96), (8, 96)):
        config = PlanConfig(tensor=tensor)
        assert config.vocab_rows(94) == rows
        make_plan(config, hybrid(vocab_size=94), abstract=True)
    assert PlanConfig(tensor=8).vocab_rows(3) == 8


def test_the_nearest_legal_sizes_of_an_absurd_one_are_found_at_once():
    with pytest.raises(ConfigError, match=r"heads is 24; expected a multiple of PlanConfig.tensor = 1000000007"):
        make_plan(PlanConfig(tensor=1_000_000_007), hybrid(), abstract=True)
    with pytest.raises(ConfigError, match="nearest legal"):
        make_plan(PlanConfig(data=10**9, expert=3), hybrid(), abstract=True)


# Refusals. (plan, model, field, value, axis, size)
INDIVISIBLE = [
    ({"tensor": 4}, {"num_attention_heads": 22}, "num_attention_heads", 22, "tensor", 4),
    ({"tensor": 4}, {"intermediate_size": 70}, "intermediate_size", 70, "tensor", 4),
    ({"tensor": 4}, {"mamba_num_heads": 22}, "mamba_num_heads", 22, "tensor", 4),
    (
        {"tensor": 4},
        {"pattern": "m", "mtp_depths": 0, "mamba_intermediate_size": 22, "time_step_rank": 3},
        "mamba_intermediate_size",
        22,
        "tensor",
        4,
    ),
    (
        {"tensor": 4},
        {"moe_shared_expert_intermediate_size": 22},
        "moe_shared_expert_intermediate_size",
        22,
        "tensor",
        4,
    ),
    ({"data": 8, "expert": 8}, {"n_routed_experts": 20}, "n_routed_experts", 20, "expert", 8),
    ({"data": 8, "expert_tensor": 8}, {}, "moe_intermediate_size", 20, "expert_tensor", 8),
    ({"data": 7, "fsdp": "optimizer"}, {}, "hidden_size", 48, "data x context", 7),
    ({"data": 7, "fsdp": "parameters"}, {}, "hidden_size", 48, "data x context", 7),
    ({"data": 8, "fsdp": "optimizer"}, {"moe_latent_size": 20}, "moe_latent_size", 20, "expert_data", 8),
    ({"data": 2, "tensor": 4, "fsdp": "parameters"}, {"moe_latent_size": 20}, "moe_latent_size", 20, "expert_data", 8),
    (
        {"data": 4, "tensor": 8, "expert": 2, "fsdp": "optimizer"},
        {"moe_latent_size": None, "hidden_size": 40},
        "hidden_size",
        40,
        "expert_data",
        16,
    ),
    ({"data": 10, "fsdp": "gradients", "fsdp_size": 5}, {}, "hidden_size", 48, "fsdp_size", 5),
    (
        {"data": 16, "fsdp": "gradients", "fsdp_size": 8},
        {"moe_latent_size": 20},
        "moe_latent_size",
        20,
        "expert_data inside fsdp_size",
        8,
    ),
]


@pytest.mark.parametrize(("plan", "model", "field", "value", "axis", "size"), INDIVISIBLE)
def test_a_size_that_does_not_divide_is_refused_with_sizes_that_do(plan, model, field, value, axis, size):
    with pytest.raises(ConfigError) as caught:
        plan_of(plan, model)
    start = f"ModelConfig.{field} is {value}; expected a multiple of PlanConfig.{axis} = {size} (nearest legal {axis}: "
    assert str(caught.value).startswith(start)
    nearest = [int(n) for n in str(caught.value).removeprefix(start).removesuffix(")").split(", ")]
    assert nearest and all(value % n == 0 for n in nearest)


def test_fsdp_sizes_matter_only_with_fsdp():
    assert plan_of({"data": 7}).size("batch") == 7


def test_what_one_copy_is_split_over_must_divide_and_not_all_of_data():
    assert plan_of({"data": 14}, fsdp="optimizer", fsdp_size=2).size("batch") == 14


def test_a_run_of_neighbours_that_does_not_fold_is_a_config_error():
    with pytest.raises(ConfigError) as caught:
        plan_of({"data": 4, "tensor": 2}, fsdp="optimizer", fsdp_size=3)
    assert str(caught.value) == (
        "PlanConfig: fsdp_size 3 does not divide data x context = 4; nearest legal: fsdp_size 4, fsdp_size 2"
    )


def test_the_size_of_a_copy_needs_something_that_is_split():
    with pytest.raises(ConfigError) as caught:
        PlanConfig(data=4, fsdp_size=2)
    assert str(caught.value) == "PlanConfig.fsdp_size is 2; expected None where fsdp is none"


@pytest.mark.parametrize(
    ("field", "model"),
    [
        ("num_key_value_heads", {"num_key_value_heads": 6}),
        ("n_groups", {"n_groups": 6}),
        ("mamba_norm_groups", {"mamba_norm_groups": 6}),
    ],
)
def test_key_heads_and_groups_are_neither_multiple_nor_divisor(field, model):
    with pytest.raises(ConfigError) as caught:
        plan_of({"tensor": 4}, model)
    assert str(caught.value) == (
        f"ModelConfig.{field} is 6; expected a multiple or a divisor of PlanConfig.tensor = 4 "
        "(nearest legal tensor: 6, 2)"
    )


def test_nearest_legal_tensor_by_hand():
    """22 heads also divide over 11 ranks, but nothing else of the model does."""
    with pytest.raises(ConfigError, match=r"num_attention_heads is 22; .* \(nearest legal tensor: 2, 1\)"):
        plan_of({"tensor": 4}, {"num_attention_heads": 22})


def test_nearest_legal_sizes_fold():
    """20 experts also divide over 5 and 10 ranks, which the 8 devices do not."""
    with pytest.raises(ConfigError, match=r"n_routed_experts is 20; .* \(nearest legal expert: 4, 2\)"):
        plan_of({"data": 8, "expert": 8}, {"n_routed_experts": 20})


def test_groups_and_key_heads_that_cut_tensor_differently_are_refused():
    with pytest.raises(ConfigError, match=r"groups 3 x groups_copies 2 share no mesh: .*: groups 2, groups 6$"):
        plan_of({"tensor": 6}, {"num_key_value_heads": 2, "n_groups": 3})


def test_sizes_that_do_not_fold_are_a_config_error():
    with pytest.raises(ConfigError, match=r"PlanConfig: data 4 x tensor 3 and expert_data 3 x expert 4 share no mesh"):
        plan_of({"data": 4, "tensor": 3, "expert": 4}, {"num_key_value_heads": 3, "n_groups": 3})
    with pytest.raises(ConfigError, match=r"PlanConfig: expert 3 x expert_tensor 1 does not divide the 8 devices"):
        plan_of({"data": 8, "expert": 3})


# Trees of parameters


def tree() -> dict[str, nnx.Variable]:
    return {
        "up": nnx.Param(jnp.arange(48.0 * 8).reshape(48, 8), axes=("embed", "mlp")),
        "stacked": nnx.Param(jnp.zeros((3, 48, 8)), axes=("embed", "mlp")),
        "experts": nnx.Param(jnp.zeros((24, 24, 20)), axes=("expert", "expert_embed", "expert_mlp")),
        "norm": nnx.Param(jnp.zeros(48), axes=("norm",)),
    }


def test_specs_of_a_tree_leave_stacked_dimensions_whole():
    specs = {name: v.get_value() for name, v in plan_of(fsdp="parameters").specs(tree()).items()}
    tensor = ("tensor.0", "tensor.1")
    assert specs == {
        "up": PartitionSpec("data", tensor),
        "stacked": PartitionSpec(None, "data", tensor),
        "experts": PartitionSpec(("data", *tensor), None, None),
        "norm": PartitionSpec(None),
    }


def test_shardings_are_those_between_steps():
    plan = plan_of(fsdp="optimizer")
    shardings = placement.shardings({**tree(), "count": jax.ShapeDtypeStruct((), jnp.int32)}, plan)
    assert shardings["up"].get_value() == NamedSharding(plan.mesh, PartitionSpec("data", ("tensor.0", "tensor.1")))
    assert shardings["count"] == NamedSharding(plan.mesh, PartitionSpec())
    assert plan.specs(tree())["up"].get_value() == PartitionSpec(None, ("tensor.0", "tensor.1"))


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
    assert reduced_types(step, fine(dtype)) == {"f32"}


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
    assert reduced_types(step, params, fine(dtype)) == {"f32"}


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
