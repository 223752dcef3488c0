"""Causal grouped-query attention within documents, by implementation name.

Axes: b batch, t queries, s keys, h query heads, g key heads, k head size.
"""

from jax import Array
from jax import numpy as jnp

from orogen.kernels.attention.blocked import attention_blocked
from orogen.kernels.attention.cudnn import attention_cudnn
from orogen.kernels.attention.operands import Operands
from orogen.kernels.attention.reference import attention_reference
from orogen.kernels.checks import chosen, require_shapes
from orogen.parallel.varying import vary_like

IMPLEMENTATIONS = {"full": attention_reference, "blocked": attention_blocked, "cudnn": attention_cudnn}


def attention(
    q_bthk: Array,
    k_bsgk: Array,
    v_bsgk: Array,
    *,
    segments_bt: Array | None = None,
    kv_segments_bs: Array | None = None,
    q_index: Array | None = None,
    k_index: Array | None = None,
    sinks_h: Array | None = None,
    window: int | None = None,
    scale: float,
    implementation: str,
) -> Array:
    """Outputs (b, t, h, k) in q's dtype: softmax(scale q kᵀ) v over the keys that each query sees.

    A query sees the keys of its segment whose index is at most its own; with a `window`, only the last `window` of
    these indices, including its own. `sinks_h` is one logit per head that joins the softmax and adds nothing to the
    output (gpt-oss, arXiv:2508.10925). `segments_bt` (int; None: one segment) are the queries', `kv_segments_bs` the
    keys' (None: the queries'). Padding (0) is a segment like any other. `q_index`, (t,) or (b, t), and `k_index`, (s,)
    or (b, s), are positions in the sequence, int32, by default 0, 1, ...: they tell which part of the sequence a rank
    holds, and let sequences of different lengths be decoded together.
    Without indices and `kv_segments_bs`, rows are whole, and each run of equal ids is a segment, as for
    convolutions and states. With them, a call may see part of a row, which does not show its runs: equal ids are then
    one segment wherever they lie, so every document needs its own id, as `layers.documents.numbered` assigns them.
    A query that sees no key gives zeros. Query head i reads key head i // (h / g); values may have a different head
    size. Scores and softmax are float32 whatever the inputs are.

    Raises ValueError if the shapes disagree, the query heads are not a multiple of the key heads, the window is below
    1, or the name is unknown.
    """
    run = chosen(IMPLEMENTATIONS, implementation)
    if implementation == "cudnn" and (q_index is not None or k_index is not None or kv_segments_bs is not None):
        raise ValueError("implementation='cudnn' with indices or segments of keys: expected whole rows, or 'blocked'")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: expected 1 or more")
    operands = _complete(q_bthk, k_bsgk, v_bsgk, segments_bt, kv_segments_bs, q_index, k_index, sinks_h)
    if segments_bt is not None and kv_segments_bs is None and q_index is None and k_index is None:
        # cuDNN's attention compares no pairs of tokens.
        run_bt = _runs(segments_bt, stored=implementation != "cudnn")
        operands = operands._replace(segments_bt=run_bt, kv_segments_bs=run_bt)
    # One varying type inside shard_map: gradients of shared keys are then summed over ranks once, not once per block.
    return run(vary_like(operands, operands), scale=scale, window=window)


def _complete(q_bthk, k_bsgk, v_bsgk, segments_bt, kv_segments_bs, q_index, k_index, sinks_h) -> Operands:
    """The operands with defaults for None. Raises ValueError."""
    if segments_bt is None and kv_segments_bs is not None:
        raise ValueError("kv_segments_bs without segments_bt: expected both or neither")
    if segments_bt is None:
        segments_bt, kv_segments_bs = (jnp.zeros(a.shape[:2], jnp.int32) for a in (q_bthk, k_bsgk))
    elif kv_segments_bs is None:
        kv_segments_bs = segments_bt
    q_index = jnp.arange(q_bthk.shape[1]) if q_index is None else q_index
    k_index = jnp.arange(k_bsgk.shape[1]) if k_index is None else k_index
    operands = Operands(q_bthk, k_bsgk, v_bsgk, segments_bt, kv_segments_bs, q_index, k_index, sinks_h)
    _check_shapes(operands)
    return operands


def _runs(segments_bt: Array, *, stored: bool) -> Array:
    """(b, t) int32: the number of the run of equal ids that each token is in, from 0.

    stored: whether they are put into an array of their own, element by element. XLA:CPU fuses a running sum into what
    reads it, so that it computed a part of the sum again in each of the (t, s) elements that compare runs: a training
    step of `bench cpu_train` was 4 % slower. It fuses no scatter. An optimization barrier does not prevent it, and a
    choice by platform is a condition, whose result recomputation would keep.
    """
    changes_bt = segments_bt[:, 1:] != segments_bt[:, :-1]
    runs_bt = jnp.cumsum(jnp.pad(changes_bt, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    if not stored:
        return runs_bt
    places = jnp.arange(runs_bt.shape[0])[:, None], jnp.arange(runs_bt.shape[1])
    once_each = {"mode": "promise_in_bounds", "unique_indices": True, "indices_are_sorted": True}
    return jnp.zeros_like(runs_bt).at[places].set(runs_bt, **once_each)


def _check_shapes(o: Operands) -> None:
    """Raises ValueError naming the first operand whose shape does not fit q and k."""
    if o.q_bthk.ndim != 4 or o.k_bsgk.ndim != 4:
        raise ValueError(f"q {o.q_bthk.shape}, k {o.k_bsgk.shape}: expected (b, t, h, k) and (b, s, g, k)")
    (batch, queries, heads, size), (_, keys, groups, _) = o.q_bthk.shape, o.k_bsgk.shape
    if heads % groups:
        raise ValueError(f"{heads} query heads over {groups} key heads: expected a multiple")
    expected = {
        "k": (o.k_bsgk, (batch, keys, groups, size)),
        "v": (o.v_bsgk, (batch, keys, groups, o.v_bsgk.shape[-1])),
        "segments": (o.segments_bt, (batch, queries)),
        "kv_segments": (o.kv_segments_bs, (batch, keys)),
        "sinks": (o.sinks_h, (heads,)),
        "q_index": (o.q_index, (queries,), (batch, queries)),
        "k_index": (o.k_index, (keys,), (batch, keys)),
    }
    require_shapes(expected, beside=f"q {o.q_bthk.shape}")
