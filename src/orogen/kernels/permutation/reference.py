"""The permutation of rows by XLA's gathers, forward and backward.

Axes: n tokens, k choices per token, r rows of the copies, d width.
"""

import jax
from jax import Array
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name


@jax.custom_vjp
def take_rows_reference(x_nd: Array, slots_nk: Array, source_r: Array) -> Array:
    """See `take_rows`."""
    k = slots_nk.shape[1]
    return jnp.take(x_nd, source_r // k, axis=0, mode="fill", fill_value=0)


def _take_rows_forward(x_nd, slots_nk, source_r):
    return take_rows_reference(x_nd, slots_nk, source_r), slots_nk


def _take_rows_backward(slots_nk, g_rd):
    g_nkd = jnp.take(g_rd, slots_nk, axis=0, mode="fill", fill_value=0)
    return g_nkd.sum(1), None, None


take_rows_reference.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def sum_rows_reference(rows_rd: Array, w_nk: Array, slots_nk: Array, source_r: Array) -> Array:
    """See `sum_rows`."""
    y_nkd = jnp.take(rows_rd, slots_nk, axis=0, mode="fill", fill_value=0)
    return jnp.einsum("nkd,nk->nd", y_nkd, w_nk, preferred_element_type=jnp.float32).astype(rows_rd.dtype)


def _sum_rows_forward(rows_rd, w_nk, slots_nk, source_r):
    kept = checkpoint_name(rows_rd, "expert_out"), w_nk, slots_nk, source_r
    return sum_rows_reference(rows_rd, w_nk, slots_nk, source_r), kept


def _sum_rows_backward(residuals, g_nd):
    rows_rd, w_nk, slots_nk, source_r = residuals
    k = slots_nk.shape[1]
    w_r = jnp.take(w_nk.reshape(-1), source_r, mode="fill", fill_value=0)
    g_rd = jnp.take(g_nd, source_r // k, axis=0, mode="fill", fill_value=0).astype(jnp.float32) * w_r[:, None]
    y_nkd = jnp.take(rows_rd, slots_nk, axis=0, mode="fill", fill_value=0)
    g_nk = jnp.einsum("nkd,nd->nk", y_nkd, g_nd, preferred_element_type=jnp.float32).astype(w_nk.dtype)
    return g_rd.astype(rows_rd.dtype), g_nk, None, None


sum_rows_reference.defvjp(_sum_rows_forward, _sum_rows_backward)
