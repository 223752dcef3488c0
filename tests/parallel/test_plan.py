"""The plan: which mesh axes each logical axis is split over, and trees of parameters on it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from tests.helpers import hybrid
from tests.parallel.plans import FOLDED, plan_of, tree

from orogen.config.checks import ConfigError
from orogen.config.plan import FOR_GPU, PlanConfig
from orogen.model.lm import build
from orogen.model.stages import Stages
from orogen.parallel import placement
from orogen.parallel.plan import make_plan, single_device_plan

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


# Trees of parameters


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
