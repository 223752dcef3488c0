"""Models of random weights to decode with, and the plans of their kernels."""

import dataclasses
from typing import Any

import jax

from orogen.checkpoint.open import Opened
from orogen.config.load import parse
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.model.count import count
from orogen.model.lm import build, initial_state
from orogen.parallel.plan import make_plan
from orogen.precision.policy import working_copy

PLANS = {
    "reference": PlanConfig(attention="blocked"),
    "triton": PlanConfig(rms_norm="triton", ssd="triton", attention="blocked", grouped_matmul="mosaic"),
}
DTYPES = {"reference": "float32", "triton": "bfloat16"}  # of weights and activations, unless told
SAME = 0.01  # by what share of its parameters a control may differ


def named(name: str) -> ModelConfig:
    """The model of that name in gin_configs/models."""
    model = parse([f"gin_configs/models/{name}.gin"], [])[0].model
    assert model is not None
    return model


def opened(model: ModelConfig, plan: PlanConfig, dtype: str) -> Opened:
    """The model with weights drawn on the device."""

    def make() -> Any:
        params, buffers = initial_state(model, 0)
        return working_copy(params, dtype), buffers

    params, buffers = jax.jit(make)()
    return Opened(model, make_plan(plan, model), build(model), params, buffers, None)


def all_attention(model: ModelConfig) -> ModelConfig:
    """The same model with attention in place of every Mamba layer, and of as many parameters: all attention layers have
    the query heads that this takes, and keys and values as before. Raises ValueError if none make it up."""

    def with_heads(heads: int) -> ModelConfig:
        pattern = model.pattern.replace("M", "*").replace("m", "*")
        return dataclasses.replace(model, pattern=pattern, num_attention_heads=heads)

    each, wanted = model.num_key_value_heads, count(model)["total"]
    base, more = (count(with_heads(heads))["total"] for heads in (each, 2 * each))
    heads = each * (1 + round((wanted - base) / (more - base)))
    found = count(with_heads(heads))["total"]
    if heads < each or abs(found / wanted - 1) > SAME:
        raise ValueError(f"{heads} query heads make {found} parameters; expected {wanted} within {SAME:.0%}")
    return with_heads(heads)
