"""Sizes that a plan refuses, with the nearest legal ones."""

import pytest
from tests.parallel.plans import plan_of

from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig

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
