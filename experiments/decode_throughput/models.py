"""Models of random weights to decode with, and the plans of their kernels."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from orogen.checkpoint.open import Opened
from orogen.config.load import parse
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.model.count import count
from orogen.model.lm import build, initial_state
from orogen.parallel.plan import make_plan
from orogen.precision.policy import working_copy
from orogen.precision.scaled import Scaled

PLANS = {
    "reference": PlanConfig(attention="blocked"),
    "triton": PlanConfig(rms_norm="triton", ssd="triton", attention="blocked", grouped_matmul="mosaic"),
}
DTYPES = {"reference": "float32", "triton": "bfloat16"}  # of weights and activations, unless told
# Weights as they are drawn; rounded to E4M3, in the dtype of the others; the same numbers in 8 bits.
DRAWN, DECODED, IN_FP8 = WEIGHTS = ("drawn", "decoded", "fp8")
# The weights of products, as released FP8 checkpoints hold them; by their names within a mixer.
PRODUCTS = {"z", "x", "B", "C", "dt", "out", "query", "key", "value", "up", "gate", "down"}
LARGEST = 448.0  # of E4M3
SAME = 0.01  # by what share of its parameters a control may differ


def named(name: str) -> ModelConfig:
    """The model of that name in gin_configs/models."""
    model = parse([f"gin_configs/models/{name}.gin"], [])[0].model
    assert model is not None
    return model


def opened(model: ModelConfig, plan: PlanConfig, dtype: str, weights: str = DRAWN) -> Opened:
    """The model with weights drawn on the device. weights: one of WEIGHTS."""

    def make() -> Any:
        params, buffers = initial_state(model, 0)
        return working_copy(params, dtype), buffers

    params, buffers = jax.jit(make)()
    if weights != DRAWN:
        params = in_8_bits(params, decoded=weights == DECODED)
    return Opened(model, make_plan(plan, model), build(model), params, buffers, None)


def in_8_bits(params: Any, *, decoded: bool) -> Any:
    """The parameters with weights of products in E4M3, scaled by the largest number of each column; or decoded."""

    @jax.jit
    def rounded(value: jax.Array) -> Any:
        scale = jnp.max(jnp.abs(value.astype(jnp.float32)), axis=-2, keepdims=True) / LARGEST
        stored = Scaled((value / scale).astype(jnp.float8_e4m3fn), scale)
        return stored.decoded(value) if decoded else stored

    def held(path: tuple[Any, ...], leaf: Any) -> Any:
        product = "mixer" in path and "router" not in path and path[-1] in PRODUCTS and leaf.get_value().ndim > 1
        return leaf.replace(rounded(leaf.get_value())) if product else leaf

    return nnx.from_flat_state([(path, held(path, leaf)) for path, leaf in nnx.to_flat_state(params)])


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
