"""Attention of the few newest tokens of a sequence to all its tokens, with keys and values in pages of a pool.

Axes: b sequences, t new tokens, h query heads, g key heads, k head size, n pages of the pool, s tokens per page,
p pages per table.
"""

import functools

from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen, require_shapes
from orogen.kernels.paged_attention.operands import Operands
from orogen.kernels.paged_attention.reference import paged_attention_reference
from orogen.kernels.paged_attention.triton import paged_attention_triton
from orogen.parallel.varying import vary_like

IMPLEMENTATIONS = {
    "reference": paged_attention_reference,
    "triton": paged_attention_triton,
    "triton_interpreted": functools.partial(paged_attention_triton, interpret=True),
}


def paged_attention(
    q_bthk: Array,
    k_nsgk: Array,
    v_nsgk: Array,
    table_bp: Array,
    length_b: Array,
    *,
    sinks_h: Array | None = None,
    window: int | None = None,
    scale: float,
    stored: tuple[float, float] | None = None,
    implementation: str,
) -> Array:
    """Outputs (b, t, h, k) in q's dtype: softmax(scale q kᵀ) v over the tokens that each query sees.

    Token i of a sequence is entry i % s of page `table_bp[b, i // s]`, in both pools. `length_b` (int32) is a
    sequence's length with its t new tokens, which come last; their keys and values are in the pools already. A query
    sees every token up to and including its own; with a `window`, only the last `window` of these. Table entries past
    a sequence's length and pages wholly outside the window do not count and may hold anything. A sequence of length 0,
    and queries before a sequence's first token, give zeros. Query head i reads key head i // (h / g); `sinks_h` is as
    in `attention`, and values may have a different head size. Scores, softmax and sums are float32, except that
    `triton` rounds the softmax's numerators to v's dtype before it multiplies them by v.

    stored: scales of keys and of values whose pools are in E4M3 (`precision.key_values`): they are decoded to q's dtype
    where they are read; None: pools are in q's dtype.

    Raises ValueError if shapes or dtypes disagree, the query heads are not a multiple of the key heads, the window is
    below 1, or the name is unknown or cannot run here. Source: arXiv:2309.06180, section 4.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected 1 or more")
    operands = Operands(q_bthk, k_nsgk, v_nsgk, table_bp, length_b, sinks_h)
    _check(operands, stored is not None)
    if sinks_h is not None:
        operands = operands._replace(sinks_h=sinks_h.astype(jnp.float32))
    return run(vary_like(operands, operands), scale=scale, window=window, stored=stored)


def _check(o: Operands, stored: bool) -> None:
    """Raises ValueError naming the first operand that does not fit q and k. stored: whether the pools are in E4M3."""
    if o.q_bthk.ndim != 4 or o.k_nsgk.ndim != 4 or o.v_nsgk.ndim != 4 or o.table_bp.ndim != 2:
        found = f"q {o.q_bthk.shape}, k {o.k_nsgk.shape}, v {o.v_nsgk.shape}, table {o.table_bp.shape}"
        raise ValueError(f"{found}: expected (b, t, h, k), (n, s, g, k) twice, and (b, p)")
    (batch, _, heads, size), (pages, page_size, groups, _) = o.q_bthk.shape, o.k_nsgk.shape
    if not groups or heads % groups:
        raise ValueError(f"{heads} query heads over {groups} key heads: expected a multiple")
    expected = {
        "k": (o.k_nsgk, (pages, page_size, groups, size)),
        "v": (o.v_nsgk, (pages, page_size, groups, o.v_nsgk.shape[3])),
        "table": (o.table_bp, (batch, o.table_bp.shape[1])),
        "length": (o.length_b, (batch,)),
        "sinks": (o.sinks_h, (heads,)),
    }
    require_shapes(expected, beside=f"q {o.q_bthk.shape}")
    wanted = jnp.dtype(jnp.float8_e4m3fn) if stored else o.q_bthk.dtype
    if not wanted == o.k_nsgk.dtype == o.v_nsgk.dtype:
        kinds = f"{o.q_bthk.dtype}, {o.k_nsgk.dtype} and {o.v_nsgk.dtype}"
        raise ValueError(f"q, k and v of {kinds}: expected {f'k and v of {wanted}' if stored else 'one dtype'}")
