"""Rotary positions (arXiv:2104.09864), plain or stretched by YaRN (arXiv:2309.00071).

Letters: b batch, t time, h heads, k head size, f frequencies (half of the rotated part of a head).
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotates pair f of a head by position · frequencies[f], and scales it by `magnitude`.

    The first 2 · len(frequencies) numbers of a head are rotated, the others stay. Pair f is (f, f + half) of that part,
    or (2f, 2f + 1) if `interleave`; the result has the layout in halves in both cases, which does not change products
    of queries and keys.
    """

    frequencies: tuple[float, ...]
    magnitude: float
    interleave: bool

    def __call__(self, x_bthk: Array, positions_bt: Array) -> Array:
        """`x_bthk` rotated; angles and products are float32, the result has x's dtype."""
        half = len(self.frequencies)
        angle_bt1f = positions_bt[..., None, None].astype(jnp.float32) * jnp.array(self.frequencies, jnp.float32)
        cos_bt1f, sin_bt1f = self.magnitude * jnp.cos(angle_bt1f), self.magnitude * jnp.sin(angle_bt1f)
        rotated_bthk, rest_bthk = jnp.split(x_bthk, [2 * half], axis=-1)
        x32_bthk = rotated_bthk.astype(jnp.float32)
        if self.interleave:
            a_bthf, b_bthf = x32_bthk[..., 0::2], x32_bthk[..., 1::2]
        else:
            a_bthf, b_bthf = jnp.split(x32_bthk, 2, axis=-1)
        parts = (a_bthf * cos_bt1f - b_bthf * sin_bt1f, b_bthf * cos_bt1f + a_bthf * sin_bt1f)
        return jnp.concatenate([*(part.astype(x_bthk.dtype) for part in parts), rest_bthk], -1)


def make_rotary(config: ModelConfig, size: int) -> Rotary:
    """The rotation of `size` numbers of a head by `config`: frequencies theta^(-2f / size), or YaRN's."""
    frequencies = config.rope_theta ** (-np.arange(0, size, 2) / size)
    magnitude = 1.0
    if config.yarn_factor is not None:
        stretched_f = _stretched(config, size)
        frequencies *= 1 - stretched_f + stretched_f / config.yarn_factor
        magnitude = _magnitude(config)
    return Rotary(tuple(frequencies.tolist()), magnitude, config.rope_interleave)


def mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 · weight · ln(factor) + 1: how much YaRN scales up attention's inputs for `factor` times the context."""
    return 0.1 * weight * math.log(factor) + 1


def _magnitude(config: ModelConfig) -> float:
    """The scale of the rotated part of queries and keys, as in transformers 5: the ratio if both weights are set."""
    factor = config.yarn_factor
    if config.yarn_mscale is not None and config.yarn_mscale_all_dim is not None:
        return mscale(factor, config.yarn_mscale) / mscale(factor, config.yarn_mscale_all_dim)
    return mscale(factor)


def _stretched(config: ModelConfig, size: int) -> np.ndarray:
    """(f,) the share of each frequency that is divided by the factor: 0 if it rotates more than beta_fast times within
    the original context, 1 if fewer than beta_slow times, linear in f in between (YaRN, section 3.2)."""

    def index(turns: float) -> float:  # the f whose frequency rotates that often
        wavelengths = config.yarn_original_positions / (turns * 2 * math.pi)
        return size * math.log(wavelengths) / (2 * math.log(config.rope_theta))

    low, high = index(config.yarn_beta_fast), index(config.yarn_beta_slow)
    if config.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    # The bounds of transformers: `high` may exceed the last frequency, and equal bounds make a step.
    low, high = max(low, 0), min(high, size - 1)
    return np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)
