"""Attention by cuDNN's fused kernels, whose packed form keeps documents apart.

Axes: b batch, t time, h query heads, g key heads, k head size, r runs of equal segments.
"""

import functools
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn has no argument for documents
from jax._src.cudnn.fused_attention_stablehlo import AttentionLayout, MaskType
from jax.ad_checkpoint import checkpoint_name

from orogen.kernels.attention.blocked import attention_blocked
from orogen.kernels.attention.operands import Operands
from orogen.parallel.target import platform
from orogen.parallel.varying import vary_like

# The most runs per row that the packed form has room for: FEW with a whole batch at once, RUNS with one row and key
# head at a time. Its gradient needs 8 t h k bytes per run, where h counts all heads or those of one key head.
FEW, RUNS = 8, 32
SEED, DROPOUT, NO_BIAS = 42, 0.0, (False, False)


def attention_cudnn(o: Operands, *, scale: float, window: int | None) -> Array:
    """See `attention`, on an NVIDIA GPU, in bfloat16 or float16. The indices are assumed to be 0, 1, ..., and the
    keys' segments to be the queries'.

    The form is chosen at run time by the row with the most runs. One run takes cuDNN's plain form, up to RUNS runs its
    packed form: all rows at once up to FEW runs, else one row and key head at a time. A batch with more runs in a row
    is computed in blocks, which is correct but slow.
    Raises ValueError for what cuDNN does not support: a window, sinks, keys of another length, other dtypes, no GPU.
    """
    require_gpu()
    if window is not None or o.sinks_h is not None:
        raise ValueError(f"implementation='cudnn' with window={window} or sinks: expected neither, or 'blocked'")
    if o.q_bthk.shape[1] != o.k_bsgk.shape[1] or o.q_bthk.shape[-1] != o.v_bsgk.shape[-1]:
        raise ValueError(f"implementation='cudnn' with q {o.q_bthk.shape}, v {o.v_bsgk.shape}: expected equal t and k")
    require_half_precision(o.q_bthk, o.k_bsgk, o.v_bsgk)
    # The caller has checked that the keys' segments and both indices are the queries' own.
    return _attend(o.q_bthk, o.k_bsgk, o.v_bsgk, o.segments_bt, scale)


def require_gpu() -> None:
    """Raises ValueError if the backend is no GPU's."""
    if platform() != "gpu":
        raise ValueError(f"implementation='cudnn' needs a GPU and finds {platform()!r}: expected 'blocked'")


def require_half_precision(*qkv: Array) -> None:
    """Raises ValueError if queries, keys and values are not all bfloat16 or all float16."""
    dtypes = {a.dtype for a in qkv}
    if len(dtypes) > 1 or qkv[0].dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"implementation='cudnn' with q of {qkv[0].dtype}: expected all bfloat16 or all float16")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_bthk: Array, k_btgk: Array, v_btgk: Array, segments_bt: Array, scale: float) -> Array:
    return _forward(q_bthk, k_btgk, v_btgk, segments_bt, scale)[0]


def _forward(q_bthk, k_btgk, v_btgk, segments_bt, scale):
    """The outputs and cuDNN's softmax statistics (FEW b, h, t): per row if every row is one run, per run if no row has
    more than FEW, else zeros."""
    batch, time, heads, _ = q_bthk.shape
    operands = (q_bthk, k_btgk, v_btgk, segments_bt)
    none = jnp.zeros((FEW * batch, heads, time), jnp.float32)

    def kept(packed: bool):
        def run(q_bthk, k_btgk, v_btgk, segments_bt):
            y_bthk, residuals = _kept_forward(q_bthk, k_btgk, v_btgk, segments_bt if packed else None, scale)
            # Not `at[].set`, whose empty array of indices would be a constant: see `checkpointed`.
            return vary_like((y_bthk, lax.dynamic_update_slice(none, residuals[-2], (0, 0, 0))), operands)

        return run

    def other(function):
        return lambda *operands: vary_like((function(*operands, scale=scale), none), operands)

    branches = (kept(False), kept(True), other(_packed), other(_blocked))
    y_bthk, statistics_mht = lax.switch(_form(segments_bt), branches, *operands)
    # Named, so that a remat policy can save them; otherwise it would look into the branches.
    y_bthk, statistics_mht = (checkpoint_name(a, "attention") for a in (y_bthk, statistics_mht))
    return y_bthk, (*operands, y_bthk, statistics_mht)


def _backward(scale, saved, dy_bthk):
    *operands, y_bthk, statistics_mht = saved

    def kept(packed: bool):
        def run(q_bthk, k_btgk, v_btgk, segments_bt, y_bthk, statistics_mht, dy_bthk):
            mask, mask_operands = _mask(q_bthk, segments_bt if packed else None)
            statistics_mht = statistics_mht if packed else statistics_mht[: len(q_bthk)]
            residuals = (q_bthk, k_btgk, v_btgk, *mask_operands, statistics_mht, y_bthk)
            layout = AttentionLayout.BTNH.value
            gradients = cudnn._dot_product_attention_bwd_rule(
                scale, SEED, DROPOUT, NO_BIAS, mask, layout, None, True, False, residuals, dy_bthk
            )
            return vary_like(tuple(gradients[:3]), operands)

        return run

    def other(function):
        # Recomputed: the residuals of these forms are many times as large as their outputs.
        def run(q_bthk, k_btgk, v_btgk, segments_bt, _y, _statistics, dy_bthk):
            run_forward = lambda q, k, v: function(q, k, v, segments_bt, scale=scale)  # noqa: E731
            return vary_like(jax.vjp(run_forward, q_bthk, k_btgk, v_btgk)[1](dy_bthk), operands)

        return run

    branches = (kept(False), kept(True), other(_packed), other(_blocked))
    inputs = (*operands, y_bthk, statistics_mht, dy_bthk)
    return *lax.switch(_form(operands[3]), branches, *inputs), None


_attend.defvjp(_forward, _backward)


def _starts(segments_bt: Array) -> Array:
    """Where a run begins, bool (b, t)."""
    changes_bt = segments_bt[:, 1:] != segments_bt[:, :-1]
    return jnp.pad(changes_bt, ((0, 0), (1, 0)), constant_values=True)


def _form(segments_bt: Array) -> Array:
    """0: every row is one run; 1: no row has more than FEW; 2: no row has more than RUNS; 3: some row has more."""
    runs = jnp.max(jnp.sum(_starts(segments_bt), axis=1))
    return sum((runs > most).astype(jnp.int32) for most in (1, FEW, RUNS))  # pyright: ignore[reportReturnType]


def _kept_forward(q_bthk, k_btgk, v_btgk, segments_bt, scale):
    """The outputs, and what the gradient needs; without segments every row is one run."""
    mask, mask_operands = _mask(q_bthk, segments_bt)
    rule: Any = cudnn._dot_product_attention_fwd_rule  # its arguments are those of jax 0.11
    return rule(
        q_bthk, k_btgk, v_btgk, *mask_operands, scale, SEED, DROPOUT, NO_BIAS, mask, AttentionLayout.BTNH.value, None,
        cudnn.check_cudnn_version(), False,
    )  # fmt: skip


def _mask(q_bthk: Array, segments_bt: Array | None) -> tuple[MaskType, tuple[Array, ...]]:
    """cuDNN's mask and its operands from the bias on: bias, lengths and starts of queries and keys, two page tables."""
    none = jnp.zeros(0, q_bthk.dtype)
    if segments_bt is None:
        return MaskType.CAUSAL, (none,) * 7
    length_br, first_br = _runs(segments_bt, FEW)
    return MaskType.PADDING_CAUSAL, (none, length_br, length_br, first_br, first_br, none, none)


def _runs(segments_bt: Array, most: int) -> tuple[Array, Array]:
    """The lengths (b, most) and starts (b, most + 1) of each row's runs, -1 where there is none."""
    batch, time = segments_bt.shape
    starts_bt = _starts(segments_bt)
    runs_b1 = jnp.sum(starts_bt, axis=1, keepdims=True, dtype=jnp.int32)
    first_br = jax.vmap(lambda s: jnp.nonzero(s, size=most, fill_value=time)[0])(starts_bt).astype(jnp.int32)
    length_br = jnp.diff(first_br, axis=1, append=jnp.full((batch, 1), time, jnp.int32))
    used_br = jnp.arange(most) < runs_b1
    first_br = jnp.pad(jnp.where(used_br, first_br, -1), ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where(used_br, length_br, -1), first_br


def _packed(q_bthk: Array, k_btgk: Array, v_btgk: Array, segments_bt: Array, *, scale: float) -> Array:
    """cuDNN's packed form for one row and key head at a time, since its workspace grows with both."""
    batch, time, heads, size = q_bthk.shape
    groups = k_btgk.shape[2]
    split = lambda a, n: jnp.moveaxis(a.reshape(batch, time, groups, n, size), 2, 1).reshape(-1, 1, time, n, size)  # noqa: E731
    length_br, first_br = _runs(segments_bt, RUNS)
    each = lambda a_br: jnp.repeat(a_br, groups, axis=0)[:, None]  # noqa: E731

    def one(inputs):
        q_1thk, k_1t1k, v_1t1k, length_1r, first_1r = inputs
        return cudnn.dot_product_attention(
            q_1thk, k_1t1k, v_1t1k, q_seqlen=length_1r, kv_seqlen=length_1r, q_offsets=first_1r, kv_offsets=first_1r,
            scale=scale, mask_type=MaskType.PADDING_CAUSAL,
        )  # fmt: skip

    parts = (split(q_bthk, heads // groups), split(k_btgk, 1), split(v_btgk, 1), each(length_br), each(first_br))
    y = vary_like(lax.map(one, parts), parts).reshape(batch, groups, time, heads // groups, size)
    return jnp.moveaxis(y, 1, 2).reshape(q_bthk.shape)


def _blocked(q_bthk: Array, k_btgk: Array, v_btgk: Array, segments_bt: Array, *, scale: float) -> Array:
    run_bt = jnp.cumsum(_starts(segments_bt), axis=1, dtype=jnp.int32)
    index_t = jnp.arange(q_bthk.shape[1])
    operands = Operands(q_bthk, k_btgk, v_btgk, run_bt, run_bt, index_t, index_t, None)
    return attention_blocked(operands, scale=scale, window=None)
