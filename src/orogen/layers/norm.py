"""Normalisation, by name. Letters: b batch, t time, d model, g groups, c channels of a group."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from orogen.config.model import ModelConfig
from orogen.kernels.recompute import from_inputs
from orogen.kernels.rms_norm import rms_norm
from orogen.kernels.tiny import LEAST_EPSILON, enlarged
from orogen.layers.parameter import parameter
from orogen.parallel.plan import Plan


class RMSNorm(nnx.Module):
    """x / rms(x) · weight; statistics and product are float32, the result has x's dtype (arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float):
        self.weight = parameter(jnp.ones(size), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x_btd: Array, plan: Plan) -> Array:
        return rms_norm(
            x_btd,
            self.weight[...],
            group_size=x_btd.shape[-1],
            epsilon=self.epsilon,
            nested=plan.nested,
            implementation=plan.config.rms_norm,
        )


class RMSNormCastFirst(nnx.Module):
    """RMSNorm whose normalised value and weight are rounded to x's dtype before they are multiplied.

    In bfloat16 it differs from RMSNorm in the last bit. Source: LlamaRMSNorm of transformers.
    """

    def __init__(self, size: int, epsilon: float):
        self.weight = parameter(jnp.ones(size), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x_btd: Array, plan: Plan) -> Array:
        def normalise(x_btd: Array, weight: Array) -> Array:
            return _unit_rms(x_btd, self.epsilon).astype(x_btd.dtype) * weight.astype(x_btd.dtype)

        return from_inputs(normalise)(x_btd, self.weight[...])


class LayerNorm(nnx.Module):
    """(x - mean) / deviation · weight + bias; all float32, the result has x's dtype (arXiv:1607.06450)."""

    def __init__(self, size: int, epsilon: float):
        self.weight, self.bias = parameter(jnp.ones(size), ("norm",)), parameter(jnp.zeros(size), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x_btd: Array, plan: Plan) -> Array:
        return _layer_norm(x_btd, self.weight[...], self.bias[...], self.epsilon)


class LayerNorm1P(nnx.Module):
    """LayerNorm that stores its weight minus one, initialised to 0: Megatron's zero-centred gamma."""

    def __init__(self, size: int, epsilon: float):
        self.weight, self.bias = (parameter(jnp.zeros(size), ("norm",)) for _ in range(2))
        self.epsilon = epsilon

    def __call__(self, x_btd: Array, plan: Plan) -> Array:
        return _layer_norm(x_btd, 1 + self.weight[...], self.bias[...], self.epsilon)


NORMS = {"rms": RMSNorm, "rms_cast_first": RMSNormCastFirst, "layer": LayerNorm, "layer_1p": LayerNorm1P}
Norm = RMSNorm | RMSNormCastFirst | LayerNorm | LayerNorm1P


def make_norm(config: ModelConfig, size: int | None = None, *, epsilon: float | None = None) -> Norm:
    """The norm named by `config.norm`, over `size` channels (None: the residual stream's), with `epsilon` (None: the
    config's)."""
    return NORMS[config.norm](size or config.hidden_size, config.layer_norm_epsilon if epsilon is None else epsilon)


def _layer_norm(x_btd: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    def normalise(x_btd: Array, weight: Array, bias: Array) -> Array:
        return (_standardised(x_btd, epsilon) * weight + bias).astype(x_btd.dtype)

    return from_inputs(normalise)(x_btd, weight, bias)


def _unit_rms(x_btd: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x²) + ε), float32."""
    return _scaled(x_btd.astype(jnp.float32), epsilon)


def _standardised(x_btd: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + ε), float32. The variance comes from the centred values, without cancellation."""
    x32_btd = x_btd.astype(jnp.float32)
    centred_btd = x32_btd - jnp.mean(x32_btd, -1, keepdims=True)
    return _scaled(centred_btd, epsilon)


def _scaled(x_btd: Array, epsilon: float) -> Array:
    added = epsilon
    if epsilon < LEAST_EPSILON:
        x_btd, added = enlarged(x_btd, epsilon, jnp.sum(jnp.abs(x_btd), -1, keepdims=True))
    return x_btd * lax.rsqrt(jnp.mean(x_btd * x_btd, -1, keepdims=True) + added)


class GroupRMSNorm(nnx.Module):
    """RMSNorm of x · silu(gate) over each of `n_groups` equal slices of the channels, sharded like Mamba's heads.

    A group whose channels lie on several ranks (fewer groups than ranks) sums its squares over those ranks.
    """

    def __init__(self, size: int, n_groups: int, epsilon: float):
        self.weight = parameter(jnp.ones(size), ("mamba_heads",))
        self.group_size, self.epsilon = size // n_groups, epsilon

    def __call__(self, x_btc: Array, gate_btc: Array | None, plan: Plan) -> Array:
        return rms_norm(
            x_btc,
            self.weight[...],
            gate_btc,
            group_size=self.group_size,
            epsilon=self.epsilon,
            reduce_sum=partial(plan.sum, axis="group_peers") if plan.size("group_peers") > 1 else None,
            nested=plan.nested,
            implementation=plan.config.rms_norm,
        )
