"""The common refinement of two factorizations: by hand, as a property, and where there is none."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orogen.parallel.fold import FoldError, Folding, describe, fold, refine

ONES = {"stage": 1, "data": 1, "context": 1, "tensor": 1, "expert": 1, "expert_tensor": 1}


def folded(**sizes) -> Folding:
    return fold(**{**ONES, **sizes})


def nonempty(folding: Folding) -> dict[str, tuple[str, ...]]:
    """Logical axes that are split, but for the runs of data ranks, which have tests of their own."""
    return {axis: names for axis, names in folding.logical.items() if names and "fsdp" not in axis}


def test_experts_over_every_axis():
    folding = folded(data=2, context=2, tensor=2, expert=8)
    assert folding.axes == (("data", 2), ("context", 2), ("tensor", 2))
    assert nonempty(folding) == {
        "data": ("data",),
        "context": ("context",),
        "tensor": ("tensor",),
        "expert": ("data", "context", "tensor"),
    }


def test_experts_that_cut_data_in_two():
    """data 4 x tensor 2 beside expert_data 2 x expert 4: boundaries at 2, 4 and 8 devices."""
    folding = folded(data=4, tensor=2, expert=4)
    assert folding.axes == (("data.0", 2), ("data.1", 2), ("tensor", 2))
    assert nonempty(folding) == {
        "data": ("data.0", "data.1"),
        "tensor": ("tensor",),
        "expert_data": ("data.0",),
        "expert": ("data.1", "tensor"),
    }


def test_expert_tensor_that_cuts_tensor_in_two():
    """data 2 x tensor 4 beside expert 4 x expert_tensor 2: the inner pair of tensor ranks splits an expert."""
    folding = folded(data=2, tensor=4, expert=4, expert_tensor=2)
    assert folding.axes == (("data", 2), ("tensor.0", 2), ("tensor.1", 2))
    assert nonempty(folding) == {
        "data": ("data",),
        "tensor": ("tensor.0", "tensor.1"),
        "expert": ("data", "tensor.0"),
        "expert_tensor": ("tensor.1",),
    }


def test_sizes_that_are_no_powers_of_two():
    """data 2 x tensor 6 beside expert_data 4 x expert 3: boundaries at 3, 6 and 12 devices."""
    folding = folded(data=2, tensor=6, expert=3)
    assert folding.axes == (("data", 2), ("tensor.0", 2), ("tensor.1", 3))
    assert folding.logical["expert_data"] == ("data", "tensor.0")
    assert folding.logical["expert"] == ("tensor.1",)


def test_stages_stay_outermost_and_whole():
    folding = folded(stage=3, data=2, tensor=2, expert=4)
    assert folding.axes == (("stage", 3), ("data", 2), ("tensor", 2))
    assert folding.logical["stage"] == ("stage",)
    assert folding.logical["expert"] == ("data", "tensor")


def test_one_device_has_no_axes():
    folding = folded()
    assert folding.axes == ()
    assert nonempty(folding) == {}


def test_every_logical_axis_is_listed():
    axes = {"stage", "data", "context", "tensor", "expert_data", "expert", "expert_tensor"}
    runs = {"fsdp", "fsdp_copies", "expert_fsdp", "expert_fsdp_copies"}
    assert set(folded(data=2).logical) == axes | runs


def runs(folding: Folding) -> tuple[tuple[str, ...], ...]:
    return tuple(folding.logical[axis] for axis in ("fsdp_copies", "fsdp", "expert_fsdp_copies", "expert_fsdp"))


def test_one_copy_of_everything_is_split_over_all_data_and_context():
    assert runs(folded(data=2, context=3, tensor=4, expert=4)) == ((), ("data", "context"), (), ("data", "context"))
    assert runs(folded(data=4, tensor=2, expert=4)) == ((), ("data.0", "data.1"), (), ("data.0",))


def test_runs_of_neighbours_cut_data_or_context():
    """The innermost ranks of data x context, context inside data."""
    assert runs(folded(data=4, tensor=3, fsdp_size=2))[:2] == (("data.0",), ("data.1",))
    assert runs(folded(data=2, context=3, fsdp_size=3))[:2] == (("data",), ("context",))
    assert runs(folded(data=4, context=3, fsdp_size=6))[:2] == (("data.0",), ("data.1", "context"))
    assert runs(folded(data=2, context=4, fsdp_size=2))[:2] == (("data", "context.0"), ("context.1",))
    assert runs(folded(data=4, fsdp_size=1))[:2] == (("data",), ())


def test_replicas_of_experts_are_split_inside_a_run():
    """data 8 x tensor 2, experts on 4 devices: 4 replicas, 2 of them inside a run of 4 data ranks."""
    folding = folded(data=8, tensor=2, expert=4, fsdp_size=4)
    assert folding.axes == (("data.0", 2), ("data.1", 2), ("data.2", 2), ("tensor", 2))
    assert folding.logical["expert_data"] == ("data.0", "data.1")
    assert runs(folding) == (("data.0",), ("data.1", "data.2"), ("data.0",), ("data.1",))


def test_experts_wider_than_a_run_are_not_split_further():
    assert runs(folded(data=8, tensor=2, expert=8, fsdp_size=2))[2:] == (("data.0",), ())


def test_a_run_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(FoldError) as caught:
        folded(data=4, context=2, fsdp_size=3)
    assert str(caught.value) == (
        "fsdp_size 3 does not divide data x context = 8; nearest legal: fsdp_size 4, fsdp_size 2"
    )


def test_a_run_that_crosses_the_context_is_refused_with_those_that_fold():
    with pytest.raises(
        FoldError, match=r"fsdp_size 3: .* boundaries at 2 and 3 devices cross; .*: fsdp_size 2, fsdp_size 6$"
    ):
        folded(data=3, context=2, fsdp_size=3)


def test_a_run_that_crosses_the_experts_is_refused_with_those_that_fold():
    with pytest.raises(
        FoldError, match=r"fsdp_size 3: .* boundaries at 2 and 3 devices cross; .*: fsdp_size 2, fsdp_size 6$"
    ):
        folded(data=6, expert=2, fsdp_size=3)


def test_key_heads_fewer_than_tensor_ranks_are_an_axis_of_their_own():
    """Two key heads over four ranks: the outer two ranks differ, the inner two hold copies."""
    folding = folded(data=3, tensor=4, outer={"kv_heads": ("tensor", 2)})
    assert folding.axes == (("data", 3), ("tensor.0", 2), ("tensor.1", 2))
    assert folding.logical["tensor"] == ("tensor.0", "tensor.1")
    assert folding.logical["kv_heads"] == ("tensor.0",)
    assert folding.logical["kv_heads_copies"] == ("tensor.1",)


def test_one_key_head_is_copied_to_every_rank():
    folding = folded(tensor=4, outer={"kv_heads": ("tensor", 1)})
    assert folding.axes == (("tensor", 4),)
    assert folding.logical["kv_heads"] == ()
    assert folding.logical["kv_heads_copies"] == ("tensor",)


def test_two_boundaries_in_one_axis():
    folding = folded(tensor=8, outer={"kv_heads": ("tensor", 2), "groups": ("tensor", 4)})
    assert folding.axes == (("tensor.0", 2), ("tensor.1", 2), ("tensor.2", 2))
    assert folding.logical["kv_heads"] == ("tensor.0",)
    assert folding.logical["groups"] == ("tensor.0", "tensor.1")
    assert folding.logical["groups_copies"] == ("tensor.2",)


def test_a_boundary_that_does_not_divide_is_refused():
    with pytest.raises(FoldError) as caught:
        folded(tensor=4, outer={"kv_heads": ("tensor", 3)})
    assert str(caught.value) == (
        "kv_heads has 3 pieces for tensor 4; expected a divisor or a multiple; nearest legal: kv_heads 4, kv_heads 2"
    )


def test_two_boundaries_that_cross_are_refused():
    crossing = r"kv_heads 2 x kv_heads_copies 3 and .*groups 3 x groups_copies 2 share no mesh: "
    with pytest.raises(FoldError, match=crossing + r".*; nearest legal: groups 2, groups 6$"):
        folded(tensor=6, outer={"kv_heads": ("tensor", 2), "groups": ("tensor", 3)})


def test_factorizations_without_a_common_mesh_are_both_named():
    with pytest.raises(FoldError) as caught:
        folded(data=4, tensor=3, expert=4)
    assert str(caught.value).startswith(
        "data 4 x tensor 3 and expert_data 3 x expert 4 share no mesh: boundaries at 3 and 4 devices cross; "
        "nearest legal: "
    )


def test_experts_that_do_not_divide_the_devices_are_refused():
    with pytest.raises(FoldError) as caught:
        folded(stage=5, data=4, tensor=2, expert=3, expert_tensor=2)
    assert str(caught.value).startswith(
        "expert 3 x expert_tensor 2 does not divide the 8 devices of a stage (stage 5 x data 4 x tensor 2); "
        "nearest legal: "
    )


def test_more_experts_than_devices_are_refused():
    with pytest.raises(FoldError, match=r"expert 16 x .* the 8 devices .*; nearest legal: expert 8 x expert_tensor 1,"):
        folded(data=8, expert=16)


def test_products_that_differ_are_refused():
    with pytest.raises(FoldError) as caught:
        refine([("a", 2), ("b", 3)], [("c", 4)])
    assert str(caught.value) == "c 4 is 4 devices; a 2 x b 3 is 6"


def test_a_factorization_is_described_without_its_ones():
    assert describe([("data", 1), ("tensor", 3), ("expert", 2)]) == "tensor 3 x expert 2"
    assert describe([("data", 1)]) == "1 device"


sizes = st.sampled_from([1, 1, 2, 3, 4, 6])
plans = st.fixed_dictionaries(dict.fromkeys(ONES, sizes))


def suggestions(message: str) -> list[tuple[int, int]]:
    listed = message.split("nearest legal: ")[1]
    return [(int(e), int(t)) for e, t in re.findall(r"expert (\d+) x expert_tensor (\d+)", listed)]


@given(plans)
def test_what_a_refusal_suggests_is_legal(plan):
    try:
        fold(**plan)
    except FoldError as error:
        found = suggestions(str(error))
        assert found and len(set(found)) == len(found)
        for expert, expert_tensor in found:
            fold(**{**plan, "expert": expert, "expert_tensor": expert_tensor})
    else:
        assume(False)


@given(plans, sizes)
def test_a_run_is_refused_exactly_when_its_boundary_crosses_for_those_that_are_legal(plan, fsdp_size):
    try:
        fold(**plan)
    except FoldError:
        assume(False)
    ranks, experts = plan["data"] * plan["context"], plan["expert"] * plan["expert_tensor"]
    others = [plan["tensor"] * plan["context"], plan["expert_tensor"], experts]
    boundary = plan["tensor"] * fsdp_size
    legal = ranks % fsdp_size == 0 and all(boundary % other == 0 or other % boundary == 0 for other in others)
    try:
        folding = fold(**plan, fsdp_size=fsdp_size)
    except FoldError as error:
        assert not legal
        found = re.findall(r"fsdp_size (\d+)", str(error).split("nearest legal: ")[1])
        assert found and str(fsdp_size) not in found
        for other in found:
            fold(**plan, fsdp_size=int(other))
        return
    assert legal
    lengths = dict(folding.axes)
    length = lambda axis: math.prod(lengths[name] for name in folding.logical[axis])  # noqa: E731
    assert length("fsdp") == fsdp_size and length("expert_fsdp") == max(1, boundary // experts)
    devices = ranks * plan["tensor"] * plan["stage"]
    expected = np.arange(devices) // plan["tensor"] % fsdp_size
    np.testing.assert_array_equal(folded_coordinates(folding, "fsdp", devices), expected)
    inside = np.arange(devices) // experts % max(1, boundary // experts)
    np.testing.assert_array_equal(folded_coordinates(folding, "expert_fsdp", devices), inside)


def test_the_first_suggestion_is_the_nearest():
    """12 devices, data 4 x tensor 3: expert 4 crosses; 3 is the nearest by ratio that does not."""
    with pytest.raises(FoldError) as caught:
        folded(data=4, tensor=3, expert=4)
    assert suggestions(str(caught.value))[0] == (3, 1)


def coordinates(factorization: list[tuple[str, int]]) -> dict[str, np.ndarray]:
    """Each axis's rank of every device, where devices are numbered row by row in the plain factorization."""
    shape = [size for _, size in factorization]
    grid = np.unravel_index(np.arange(math.prod(shape)), shape)
    return {axis: rank for (axis, _), rank in zip(factorization, grid, strict=True)}


def folded_coordinates(folding: Folding, axis: str, devices: int) -> np.ndarray:
    """The axis's rank of every device in the folded mesh, whose devices are numbered row by row too."""
    ranks = coordinates(list(folding.axes)) if folding.axes else {}
    lengths = dict(folding.axes)
    rank = np.zeros(devices, int)
    for name in folding.logical[axis]:
        rank = rank * lengths[name] + ranks[name]
    return rank


@given(plans)
def test_every_device_has_the_rank_that_its_own_factorization_gives_it(plan):
    try:
        folding = fold(**plan)
    except FoldError:
        assume(False)
    devices = plan["stage"] * plan["data"] * plan["context"] * plan["tensor"]
    dense = [(axis, plan[axis]) for axis in ("stage", "data", "context", "tensor")]
    replicas = devices // plan["stage"] // plan["expert"] // plan["expert_tensor"]
    names = ("stage", "expert_data", "expert", "expert_tensor")
    experts = list(zip(names, (plan["stage"], replicas, plan["expert"], plan["expert_tensor"]), strict=True))
    assert math.prod(size for _, size in folding.axes) == devices
    for axis, rank in [*coordinates(dense).items(), *coordinates(experts).items()]:
        np.testing.assert_array_equal(folded_coordinates(folding, axis, devices), rank, err_msg=axis)


@given(plans)
def test_the_mesh_is_the_coarsest(plan):
    """No two neighbouring mesh axes belong to the same logical axes: they would be one."""
    try:
        folding = fold(**plan)
    except FoldError:
        assume(False)
    owners = [{a for a, names in folding.logical.items() if name in names} for name, _ in folding.axes]
    assert all(size > 1 for _, size in folding.axes)
    assert all(a != b for a, b in itertools.pairwise(owners))


@given(plans)
def test_a_fold_is_refused_exactly_when_boundaries_cross(plan):
    """By definition: some boundary of one factorization neither divides nor is divided by a boundary of the other."""
    ranks = plan["data"] * plan["context"] * plan["tensor"]
    inner = [plan["tensor"], plan["tensor"] * plan["context"], ranks]
    expert = [plan["expert_tensor"], plan["expert_tensor"] * plan["expert"]]
    divides = ranks % expert[-1] == 0
    legal = divides and all(a % b == 0 or b % a == 0 for a in inner for b in expert)
    try:
        fold(**plan)
    except FoldError:
        assert not legal
    else:
        assert legal
