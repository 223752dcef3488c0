"""Normalisation. Letters: b batch, t time, d model, g groups, c channels of a group."""

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from orogen.layers.parameter import parameter
from orogen.parallel.plan import Plan


class RMSNorm(nnx.Module):
    """x / rms(x) · weight; statistics and product in float32, the result in x's dtype (arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float):
        self.weight = parameter(jnp.ones(size), ("norm",))
        self.epsilon = epsilon

    def __call__(self, x_btd: Array) -> Array:
        x32_btd = x_btd.astype(jnp.float32)
        scale_bt1 = lax.rsqrt(jnp.mean(x32_btd * x32_btd, -1, keepdims=True) + self.epsilon)
        return (x32_btd * scale_bt1 * self.weight[...]).astype(x_btd.dtype)


class GroupRMSNorm(nnx.Module):
    """RMSNorm over each of `n_groups` equal slices of the channels, which are split like Mamba heads.

    A group whose channels lie on several ranks (fewer groups than ranks) sums its squares over those ranks.
    """

    def __init__(self, size: int, n_groups: int, epsilon: float):
        self.weight = parameter(jnp.ones(size), ("mamba_heads",))
        self.group_size, self.epsilon = size // n_groups, epsilon

    def __call__(self, x_btc: Array, plan: Plan) -> Array:
        local = min(self.group_size, x_btc.shape[-1])
        x_btgc = x_btc.astype(jnp.float32).reshape(*x_btc.shape[:-1], -1, local)
        squares = plan.sum(jnp.sum(x_btgc * x_btgc, -1, keepdims=True), "group_peers")
        normed = x_btgc * lax.rsqrt(squares / self.group_size + self.epsilon)
        return (normed.reshape(x_btc.shape) * self.weight[...]).astype(x_btc.dtype)
