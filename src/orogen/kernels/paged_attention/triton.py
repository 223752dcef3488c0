"""Paged attention in two Triton kernels, for NVIDIA GPUs: splits of a sequence in parallel, then their sum.

Axes: b sequences, t new tokens, h query heads, g key heads, r query heads per key head, k head size, j head size of
values, n pages of the pool, s tokens per page, p pages per table, m new tokens times r, c tokens per step, i splits.

Tiling: the grid of the first kernel is (splits, key heads, sequences). A program takes all m queries of its key head
and walks over its split of the sequence in steps of c tokens. It looks up every token's page, so pages may have any
size. It leaves its softmax unnormalised: it stores the sum of exp(score - maximum) v, the sum of exp(score - maximum),
and the maximum. The second kernel, with one program per sequence, token and head, rescales the splits to a common
maximum and adds them up (arXiv:2311.01282, section 3). A sequence uses as many splits as it has steps, up to all of
them; so the whole GPU works even on a single long sequence.
"""

import functools
from typing import Any, NamedTuple

from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.paged_attention.operands import Operands, decoded
from orogen.kernels.pallas_triton import LOG2_E, both, call, dot, inside, load, require_gpu, store, tile

PROGRAMS = 264  # wanted in total: two per multiprocessor of an H100
MOST_SPLITS = 64
TILE = 2**14  # bytes of keys per step: 64 tokens of 128 numbers in bfloat16
WARPS, STAGES = 4, 3
HIDDEN = -1e30  # score of a token that a query does not see; maxima start at half of it, so that its exp2 is 0


class Walk(NamedTuple):
    """Sizes and settings of both kernels. per_group: query heads per key head. stored: scales of keys and of values in
    E4M3, None for each that is in q's dtype."""

    tokens: int
    per_group: int
    size: int
    value_size: int
    page_size: int
    step: int
    splits: int
    scale: float
    window: int | None
    stored: tuple[float | None, float | None] = (None, None)


def paged_attention_triton(
    o: Operands, *, scale: float, window: int | None, stored: tuple[float, float] | None = None, interpret: bool = False
) -> Array:
    """`paged_attention` on an NVIDIA GPU; `interpret` runs the same kernels anywhere, slowly.

    Raises ValueError if there is no GPU, or for E4M3 one that cannot convert it, and `interpret` is False.
    """
    require_gpu(interpret=interpret, e4m3=stored is not None)
    (batch, tokens, heads, size), (_, page_size, groups, value_size) = o.q_bthk.shape, o.v_nsgk.shape
    step = max(16, TILE // (pl.next_power_of_2(size) * o.q_bthk.dtype.itemsize))
    most = pl.cdiv(o.table_bp.shape[1] * page_size, step)
    splits = max(1, min(most, pl.cdiv(PROGRAMS, batch * groups), MOST_SPLITS))
    walk = Walk(
        tokens, heads // groups, size, value_size, page_size, step, splits, scale, window, stored or (None, None)
    )
    parts = _attend(o, walk, interpret=interpret)
    return _merge(o, parts, walk, interpret=interpret)


def _attend(o: Operands, walk: Walk, *, interpret: bool) -> dict[str, Array]:
    """The weighted sum of values (b, i, t, h, j), the sum of weights and the maximum (b, i, t, h) of each split."""
    (batch, tokens, heads, _), groups = o.q_bthk.shape, o.k_nsgk.shape[2]
    wide, value_wide = tile(walk.size), tile(walk.value_size)
    pool = lambda a, width: pl.BlockSpec((*a.shape[:2], None, width), lambda i, g, b: (0, 0, g, 0))  # noqa: E731
    statistics = pl.BlockSpec((None, None, tokens, walk.per_group), lambda i, g, b: (b, i, 0, g))
    sums = pl.BlockSpec((None, None, tokens, walk.per_group, value_wide), lambda i, g, b: (b, i, 0, g, 0))
    in_specs = [
        pl.BlockSpec((None, tokens, walk.per_group, wide), lambda i, g, b: (b, 0, g, 0)),
        pool(o.k_nsgk, wide),
        pool(o.v_nsgk, value_wide),
        pl.BlockSpec((None, o.table_bp.shape[1]), lambda i, g, b: (b, 0)),
        pl.BlockSpec((None,), lambda i, g, b: (b,)),
    ]
    shape = (batch, walk.splits, tokens, heads)
    outputs = {
        "sum": ((*shape, walk.value_size), jnp.float32, sums),
        "weight": (shape, jnp.float32, statistics),
        "maximum": (shape, jnp.float32, statistics),
    }
    return call(
        functools.partial(_attend_kernel, walk=walk), list(o[:5]), in_specs, outputs,
        grid=(walk.splits, groups, batch), warps=WARPS, stages=STAGES, interpret=interpret,
    )  # fmt: skip


def _steps(length: Array, walk: Walk) -> tuple[Array, Array, Array, Array]:
    """The first token that any query sees, the first step, the end of the last step, and the steps per split."""
    first = jnp.zeros_like(length)
    if walk.window is not None:
        first = jnp.maximum(length - walk.tokens - walk.window + 1, 0)
    begin, end = lax.div(first, walk.step), lax.div(length + walk.step - 1, walk.step)
    return first, begin, end, lax.div(end - begin + walk.splits - 1, walk.splits)


def _attend_kernel(q_ref, k_ref, v_ref, table_ref, length_ref, sum_ref, weight_ref, maximum_ref, *, walk: Walk):
    queries, length = walk.tokens * walk.per_group, length_ref[...]
    query_m = jnp.arange(tile(queries))
    in_m = inside(query_m, queries, len(query_m))
    of_m = lax.div(query_m, walk.per_group), lax.rem(query_m, walk.per_group)  # token and head
    in_k = inside(jnp.arange(q_ref.shape[2]), walk.size, q_ref.shape[2])
    in_j = inside(jnp.arange(v_ref.shape[2]), walk.value_size, v_ref.shape[2])
    q_mk = load(_rows(q_ref, *of_m), both(in_m, in_k))
    index_m = length - walk.tokens + of_m[0]
    first, begin, end, per_split = _steps(length, walk)
    begin += pl.program_id(0) * per_split

    def step(number: Array, carry: Any) -> Any:
        maximum_m, weight_m, sum_mj = carry
        token_c = number * walk.step + jnp.arange(walk.step)
        used_c = (token_c >= first) & (token_c < length)
        page_c = load(table_ref.at[lax.div(token_c, walk.page_size)], used_c)
        here_c = page_c, lax.rem(token_c, walk.page_size)
        k_ck = decoded(load(_rows(k_ref, *here_c), both(used_c, in_k)), walk.stored[0], q_mk.dtype)
        v_cj = decoded(load(_rows(v_ref, *here_c), both(used_c, in_j)), walk.stored[1], q_mk.dtype)
        seen_mc = token_c[None, :] <= index_m[:, None]
        if walk.window is not None:
            seen_mc &= token_c[None, :] > index_m[:, None] - walk.window
        score_mc = jnp.where(seen_mc, dot(q_mk, k_ck, 1, 1) * (walk.scale * LOG2_E), HIDDEN)
        highest_m = jnp.maximum(maximum_m, jnp.max(score_mc, axis=1))
        kept_m, p_mc = jnp.exp2(maximum_m - highest_m), jnp.exp2(score_mc - highest_m[:, None])
        sum_mj = sum_mj * kept_m[:, None] + dot(p_mc.astype(v_cj.dtype), v_cj, 1, 0)
        return highest_m, weight_m * kept_m + jnp.sum(p_mc, axis=1), sum_mj

    padded = len(query_m)
    start = (
        jnp.full(padded, HIDDEN / 2, jnp.float32),
        jnp.zeros(padded, jnp.float32),
        jnp.zeros((padded, v_ref.shape[2]), jnp.float32),
    )
    maximum_m, weight_m, sum_mj = lax.fori_loop(begin, jnp.minimum(begin + per_split, end), step, start)
    store(maximum_ref.at[of_m], maximum_m, in_m)
    store(weight_ref.at[of_m], weight_m, in_m)
    store(_rows(sum_ref, *of_m), sum_mj, both(in_m, in_j))


def _rows(ref, *indices: Array):
    """The rows of `ref` at these indices, which are arrays, one per axis but the last."""
    # The last axis has an index array too, because the interpreter cannot mix arrays and slices.
    return ref.at[(*(index[:, None] for index in indices), jnp.arange(ref.shape[-1])[None, :])]


def _merge(o: Operands, parts: dict[str, Array], walk: Walk, *, interpret: bool) -> Array:
    batch, tokens, heads, _ = o.q_bthk.shape
    splits, value_wide = pl.next_power_of_2(walk.splits), pl.next_power_of_2(walk.value_size)
    statistics = pl.BlockSpec((None, splits, None, None), lambda h, t, b: (b, 0, t, h))
    operands = {
        "sum": (parts["sum"], pl.BlockSpec((None, splits, None, None, value_wide), lambda h, t, b: (b, 0, t, h, 0))),
        "weight": (parts["weight"], statistics),
        "maximum": (parts["maximum"], statistics),
        "length": (o.length_b, pl.BlockSpec((None,), lambda h, t, b: (b,))),
    }
    if o.sinks_h is not None:
        operands["sinks"] = (o.sinks_h, pl.BlockSpec((None,), lambda h, t, b: (h,)))
    y_spec = pl.BlockSpec((None, None, None, value_wide), lambda h, t, b: (b, t, h, 0))
    outputs = {"y": ((batch, tokens, heads, walk.value_size), o.q_bthk.dtype, y_spec)}
    results = call(
        functools.partial(_merge_kernel, names=(*operands, *outputs), walk=walk),
        [array for array, _ in operands.values()], [spec for _, spec in operands.values()], outputs,
        grid=(heads, tokens, batch), warps=WARPS, interpret=interpret,
    )  # fmt: skip
    return results["y"]


def _merge_kernel(*refs, names: tuple[str, ...], walk: Walk):
    ref = dict(zip(names, refs, strict=True))
    splits, value_wide = ref["sum"].shape
    _, begin, end, per_split = _steps(ref["length"][...], walk)
    # Splits without a step wrote zeros and need not be read.
    used_i = (jnp.arange(splits) * per_split < end - begin) & (jnp.arange(splits) < walk.splits)
    in_j = inside(jnp.arange(value_wide), walk.value_size, value_wide)
    maximum_i = jnp.where(used_i, load(ref["maximum"], used_i), HIDDEN / 2)
    highest = jnp.max(maximum_i)
    sink = ref["sinks"][...] * LOG2_E if "sinks" in ref else None
    highest = highest if sink is None else jnp.maximum(highest, sink)
    kept_i = jnp.where(used_i, jnp.exp2(maximum_i - highest), 0.0)
    total = jnp.sum(kept_i * load(ref["weight"], used_i))
    total = total if sink is None else total + jnp.exp2(sink - highest)
    y_j = jnp.sum(kept_i[:, None] * load(ref["sum"], both(used_i, in_j)), axis=0)
    store(ref["y"], y_j / jnp.where(total == 0.0, 1.0, total), in_j)
