"""A plan as a table, without devices."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tests.helpers import hybrid

from orogen.config.plan import PlanConfig
from orogen.cost.assemble import assemble
from orogen.model.lm import build
from orogen.parallel.describe import describe_plan, plan_lines
from orogen.parallel.plan import make_plan


def plan_of(**choices):
    return make_plan(PlanConfig(data=4, tensor=2, expert=4, **choices), hybrid(), abstract=True)


def param(*shape: int, axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)


def tree() -> dict:
    return {
        "mixer": {"key": param(48, 8, axes=("embed", "kv_heads")), "value": param(48, 10, axes=("embed", "kv_heads"))},
        "experts": param(3, 24, 24, 20, axes=("expert", "expert_embed", "expert_mlp")),  # three layers stacked
    }


def test_table_by_hand():
    facts = describe_plan(plan_of(fsdp="optimizer"), tree())
    assert facts["devices"] == 8
    assert facts["mesh"] == {"data.0": 2, "data.1": 2, "tensor": 2}
    assert facts["logical_axes"]["expert"] == ["data.1", "tensor"]
    assert facts["parameters"] == {
        "experts": {
            "shape": [3, 24, 24, 20],
            "axes": [None, "expert", "expert_embed", "expert_mlp"],
            "device_shape": [3, 6, 24, 20],
            "stored_shape": [3, 6, 12, 20],
        },
        "mixer.key": {
            "shape": [48, 8],
            "axes": ["embed", "kv_heads"],
            "device_shape": [48, 4],
            "stored_shape": [12, 4],
        },
        "mixer.value": {
            "shape": [48, 10],
            "axes": ["embed", "kv_heads"],
            "device_shape": [48, 5],
            "stored_shape": [12, 5],
        },
    }


def test_parameters_that_are_split_inside_the_step_too():
    parameters = describe_plan(plan_of(fsdp="parameters"), tree())["parameters"]
    assert parameters["mixer.key"]["device_shape"] == parameters["mixer.key"]["stored_shape"] == [12, 4]


def test_every_parameter_of_a_model_is_listed_and_splits_evenly():
    params = build(hybrid()).params
    facts = describe_plan(plan_of(fsdp="optimizer"), params)
    assert len(facts["parameters"]) == len(jax.tree.leaves(params))
    for name, row in facts["parameters"].items():
        for whole, inside, stored in zip(row["shape"], row["device_shape"], row["stored_shape"], strict=True):
            assert inside and whole % inside == 0 and inside % stored == 0, name


def test_a_mesh_axis_used_twice_is_refused():
    with pytest.raises(ValueError, match="one mesh axis splits two array axes"):
        describe_plan(plan_of(), {"w": param(4, 6, axes=("heads", "mlp"))})


def test_lines_for_a_person():
    lines = plan_lines(describe_plan(plan_of(), {"w": param(3, 48, 8, axes=("embed", "mlp"))}))
    assert lines[:2] == ["mesh: data.0 2 x data.1 2 x tensor 2 (8 devices)", "logical axes that are split:"]
    assert "  batch          data.0 x data.1" in lines
    assert not any(line.startswith("  norm") for line in lines)
    assert lines[-2:] == [
        "parameter  shape   axes         on a device  stored on a device",
        "w          3x48x8  · embed mlp  3x48x4       3x48x4",
    ]


def test_what_stages_hold_by_hand():
    """The fullest of four chunks has two Mamba layers, so every chunk has two rows for them, and one for attention."""
    model = hybrid(pattern="MM|M|*|", mtp_depths=0)
    config = PlanConfig(stage=2, schedule="interleaved", microbatches=2)
    plan, built = assemble(model, config, abstract=True)
    whole = {letter: count_layer(letter) for letter in "M*"}
    facts = describe_plan(plan, built.params, built.layout.segmented, built.layout.filled)["pipeline"]
    assert built.layout.filled == {"M": 3 / 8, "*": 1 / 4}
    assert facts["layer_parameters"] == 4 * whole["M"] + 2 * whole["*"]
    assert facts["layer_parameters_if_even"] == round(1.5 * whole["M"] + 0.5 * whole["*"])


def count_layer(letter: str) -> int:
    """Parameters of a model of two such layers, less those of a model of one."""
    one, two = (build(hybrid(pattern=letter * count, mtp_depths=0)).params for count in (1, 2))
    return sum(leaf.size for leaf in jax.tree.leaves(two)) - sum(leaf.size for leaf in jax.tree.leaves(one))
