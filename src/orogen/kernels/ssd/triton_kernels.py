"""Triton kernels of the chunked Mamba-2 recurrence and of its gradient.

Axes: b batch, t time, h heads, p head size, g groups, r heads of a group, n state, c chunks,
q position in a chunk, s position in the chunk that q reads from, i rows of a chunk that one program works on.

The gradient is the same computation read backwards: where the outputs add up what earlier tokens give, through a state
that runs forward, the gradient of x adds up what later tokens take, through the gradient of the state, which runs
backward. So there are two kernels, each with a direction:

    scan    walks the chunks of one head with its state in registers: y from x, or dx from dy.
    pairs   one chunk of one group, over its heads: dC and dB, and what the decays and steps need.

Every sum runs in one program in one order, so results repeat to the bit.
"""

import dataclasses
import functools

from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import both, call, inside, load, store

SMALLEST_TILE = 16  # of a matrix product in Triton


@dataclasses.dataclass(frozen=True)
class Launch:
    """How to cut and run: `width` tokens a chunk, of which `scan` takes `step` at once and `columns` of a head a
    program, and `pairs` takes `rows` a program."""

    width: int
    step: int
    rows: int
    columns: int
    scan_warps: int
    scan_stages: int
    pairs_warps: int
    pairs_stages: int
    interpret: bool


def tile(size: int) -> int:
    """The power of two that holds `size`, and that the hardware takes."""
    return max(SMALLEST_TILE, pl.next_power_of_2(size))


def scan(
    query_btgn: Array,
    key_btgn: Array,
    value_bthp: Array,
    dt_bhcq: Array,
    sums_bhcq: Array,
    runs_bcq: Array,
    start_bhpn: Array,
    skip_h: Array,
    states_bhcnp: Array | None,
    *,
    reverse: bool,
    save: bool,
    launch: Launch,
) -> tuple[Array, Array, Array | None, Array | None]:
    """Outputs (b, t, h, p), the last state (b, h, p, n), each chunk's first one, and its product with `states_bhcnp`.

    `sums_bhcq` are base-2 logs of the decay since the chunk's or the segment's start. Forward: query C, key B, value x.
    In reverse: query B, key C, value dy, and the state is the gradient of the forward one. Both add the skip D value.
    States are float32 in registers, `save`d in the dtype of the values, which is how matrix products read them. The
    products (b, h, c, p blocks) are those with `states_bhcnp`, times the chunk's whole decay: in reverse, the gradient
    of that decay's log.
    """
    batch, time, heads, head_size = value_bthp.shape
    groups, state = key_btgn.shape[2:]
    chunks, padded_time, share = sums_bhcq.shape[2], sums_bhcq.shape[2] * launch.width, heads // groups
    columns, padded_state, blocks = launch.columns, tile(state), pl.cdiv(head_size, launch.columns)
    dt_bht, sums_bht = (array.reshape(batch, heads, padded_time) for array in (dt_bhcq, sums_bhcq))
    runs_bt = runs_bcq.reshape(batch, padded_time)
    operands = [query_btgn, key_btgn, value_bthp, dt_bht, sums_bht, runs_bt, start_bhpn, skip_h]
    group_spec = pl.BlockSpec((None, padded_time, None, padded_state), lambda h, p, b: (b, 0, h // share, 0))
    head_spec = pl.BlockSpec((None, padded_time, None, columns), lambda h, p, b: (b, 0, h, p))
    token_spec = pl.BlockSpec((None, None, padded_time), lambda h, p, b: (b, h, 0))
    runs_spec = pl.BlockSpec((None, padded_time), lambda h, p, b: (b, 0))
    state_spec = pl.BlockSpec((None, None, columns, padded_state), lambda h, p, b: (b, h, p, 0))
    states_spec = pl.BlockSpec((None, None, chunks, padded_state, columns), lambda h, p, b: (b, h, 0, 0, p))
    skip_spec = pl.BlockSpec((None,), lambda h, p, b: (h,))
    in_specs = [group_spec, group_spec, head_spec, token_spec, token_spec, runs_spec, state_spec, skip_spec]
    outputs = {
        "out": (value_bthp.shape, value_bthp.dtype, head_spec),
        "end": (start_bhpn.shape, jnp.float32, state_spec),
    }
    if save:
        outputs["saved"] = ((batch, heads, chunks, state, head_size), value_bthp.dtype, states_spec)
    if states_bhcnp is not None:
        operands.append(states_bhcnp)
        in_specs.append(states_spec)
        products_spec = pl.BlockSpec((None, None, chunks, None), lambda h, p, b: (b, h, 0, p))
        outputs["products"] = ((batch, heads, chunks, blocks), jnp.float32, products_spec)
    kernel = functools.partial(
        _scan_kernel, names=tuple(outputs), inputs=len(operands), width=launch.width, step=launch.step, time=time,
        head_size=head_size, state=state, reverse=reverse,
    )  # fmt: skip
    results = call(
        kernel, operands, in_specs, outputs, grid=(heads, blocks, batch), warps=launch.scan_warps,
        stages=launch.scan_stages, interpret=launch.interpret,
    )  # fmt: skip
    return results["out"], results["end"], results.get("saved"), results.get("products")


def _scan_kernel(*refs, names, inputs, width, step, time, head_size, state, reverse):
    """Walks in steps of a part of a chunk: decays are differences of the chunk's sums."""
    query_ref, key_ref, value_ref, dt_ref, sums_ref, runs_ref, start_ref, skip_ref, *states_ref = refs[:inputs]
    to = dict(zip(names, refs[inputs:], strict=True))
    steps, parts = sums_ref.shape[0] // step, width // step
    columns, padded_state = start_ref.shape
    positions = jnp.arange(step)
    in_state = inside(jnp.arange(padded_state), state, padded_state)
    in_head = inside(pl.program_id(1) * columns + jnp.arange(columns), head_size, columns)
    causal_qs = _earlier(positions, positions, reverse)
    dtype, skip = value_ref.dtype, skip_ref[...]

    def advance(i, state_np):
        i = steps - 1 - i if reverse else i
        c = lax.div(i, parts)
        part = i - c * parts
        # The state at hand is the one that enters the chunk, or in reverse the one that leaves it.
        at_edge = part == (parts - 1 if reverse else 0)
        edge_n = jnp.broadcast_to(at_edge, (padded_state,))
        edge_n = edge_n if in_state is None else edge_n & in_state
        tokens = pl.ds(i * step, step)
        in_time = inside(i * step + positions, time, step)
        query_qn = load(query_ref.at[tokens, :], both(in_time, in_state))
        key_sn = load(key_ref.at[tokens, :], both(in_time, in_state))
        value_sp = load(value_ref.at[tokens, :], both(in_time, in_head))
        dt_q, sums_q, runs_q = dt_ref[tokens], sums_ref[tokens], runs_ref[tokens]
        before = jnp.maximum(i * step - 1, 0)
        base, base_run = (jnp.where(part == 0, 0.0, ref[before]) for ref in (sums_ref, runs_ref))
        total, last_run = sums_ref[i * step + step - 1], runs_ref[i * step + step - 1]
        # Before the products, for their time hides that of the load.
        other_np = load(states_ref[0].at[c], both(edge_n, in_head)) if states_ref else state_np
        into_q = _exp2_where(runs_q == base_run, sums_q - base)
        out_of_q = _exp2_where(runs_q == last_run, total - sums_q)
        whole = jnp.where(last_run == base_run, jnp.exp2(total - base), 0.0)
        pair_qs = _pair(sums_q, runs_q, sums_q, runs_q, causal_qs, reverse)
        if reverse:
            weights_qs, read_q, write_s = pair_qs, out_of_q, into_q
        else:
            weights_qs, read_q, write_s = pair_qs * dt_q[None, :], into_q, out_of_q * dt_q
        weights_qs *= _dot(query_qn, key_sn, 1, 1)
        out_qp = read_q[:, None] * _dot(query_qn, state_np.astype(dtype), 1, 0)
        out_qp += _dot(weights_qs.astype(dtype), value_sp, 1, 0)
        if reverse:
            out_qp *= dt_q[:, None]
        out_qp += skip * value_sp.astype(jnp.float32)
        store(to["out"].at[tokens, :], out_qp.astype(dtype), both(in_time, in_head))
        if "saved" in to:
            store(to["saved"].at[c], state_np.astype(dtype), both(edge_n, in_head))
        if states_ref:
            chunk_total, chunk_run = (ref[c * width + width - 1] for ref in (sums_ref, runs_ref))
            chunk_whole = jnp.where(chunk_run == 0, jnp.exp2(chunk_total), 0.0)
            product = chunk_whole * jnp.sum(state_np * other_np.astype(jnp.float32))
            store(to["products"].at[c], product, at_edge)
        written_sp = (value_sp.astype(jnp.float32) * write_s[:, None]).astype(dtype)
        return whole * state_np + _dot(key_sn, written_sp, 0, 0)

    start_pn = load(start_ref, both(in_head, in_state))
    end_np = lax.fori_loop(0, steps, advance, start_pn.T)
    store(to["end"], end_np.T, both(in_head, in_state))


def pairs(
    value_bthp: Array,
    other_bthp: Array,
    key_btgn: Array,
    other_key_btgn: Array,
    dt_bhcq: Array,
    sums_bhcq: Array,
    runs_bcq: Array,
    states_bhcnp: Array,
    *,
    reverse: bool,
    launch: Launch,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """The gradient of `key_btgn`, and shares of each token's gradient (b, h, c, q): near, far, in reverse own and skip.

    Forward: value dy, other x, key C, other key B, and the states that enter the chunks; the shares are y . dy of what
    y receives from the chunk's other tokens and from the entering state.
    In reverse: value x, other dy, key B, other key C, and the gradients of the states that leave; the shares are
    x . dx / dt of what x gives to the chunk's other tokens, to the leaving state and to its own output, and x . dy.
    """
    batch, time, heads, head_size = value_bthp.shape
    groups, state = key_btgn.shape[2:]
    chunks, width, rows, share = sums_bhcq.shape[2], launch.width, launch.rows, heads // groups
    blocks = width // rows
    head_spec = pl.BlockSpec((None, chunks * width, share, tile(head_size)), lambda i, g, b: (b, 0, g, 0))
    group_spec = pl.BlockSpec((None, chunks * width, None, tile(state)), lambda i, g, b: (b, 0, g, 0))
    token_spec = pl.BlockSpec((None, share, chunks, width), lambda i, g, b: (b, g, 0, 0))
    runs_spec = pl.BlockSpec((None, chunks, width), lambda i, g, b: (b, 0, 0))
    states_spec = pl.BlockSpec((None, share, chunks, tile(state), tile(head_size)), lambda i, g, b: (b, g, 0, 0, 0))
    operands = [value_bthp, other_bthp, key_btgn, other_key_btgn, dt_bhcq, sums_bhcq, runs_bcq, states_bhcnp]
    in_specs = [head_spec, head_spec, group_spec, group_spec, token_spec, token_spec, runs_spec, states_spec]
    outputs = {
        "gradient": (key_btgn.shape, key_btgn.dtype, group_spec),
        **dict.fromkeys(
            ("near", "far", "own", "skip")[: 4 if reverse else 2], (sums_bhcq.shape, jnp.float32, token_spec)
        ),
    }
    kernel = functools.partial(_pairs_kernel, time=time, head_size=head_size, state=state, rows=rows, reverse=reverse)
    results = call(
        kernel, operands, in_specs, outputs, grid=(blocks * chunks, groups, batch), warps=launch.pairs_warps,
        stages=launch.pairs_stages, interpret=launch.interpret,
    )  # fmt: skip
    return results["gradient"], results["near"], results["far"], results.get("own"), results.get("skip")


def _pairs_kernel(
    value_ref, other_ref, key_ref, other_key_ref, dt_ref, sums_ref, runs_ref, states_ref,
    gradient_ref, near_ref, far_ref, *own_refs, time, head_size, state, rows, reverse,
):  # fmt: skip
    share, _, width = sums_ref.shape
    padded_state, padded_head = states_ref.shape[2:]
    c = lax.div(pl.program_id(0), width // rows)
    first = pl.program_id(0) * rows - c * width
    here, chunk = pl.ds(c * width + first, rows), pl.ds(c * width, width)
    rows_i, all_s = first + jnp.arange(rows), jnp.arange(width)
    in_rows, in_chunk = (inside(c * width + positions, time, width) for positions in (rows_i, all_s))
    in_state = inside(jnp.arange(padded_state), state, padded_state)
    in_head = inside(jnp.arange(padded_head), head_size, padded_head)
    causal_is, itself_is = _earlier(rows_i, all_s, reverse), rows_i[:, None] == all_s[None, :]
    dtype = value_ref.dtype

    key_in = load(key_ref.at[here, :], both(in_rows, in_state))
    other_key_sn = load(other_key_ref.at[chunk, :], both(in_chunk, in_state))
    scores_is = _dot(key_in, other_key_sn, 1, 1)
    own_score_i, scores_is = _diagonal(itself_is, scores_is), jnp.where(itself_is, 0.0, scores_is)
    runs_i, runs_s, last_run = runs_ref[c, pl.ds(first, rows)], runs_ref[c, :], runs_ref[c, width - 1]

    def head(r, carry):
        gradient_in, dscores_is = carry
        value_ip = load(value_ref.at[here, r, :], both(in_rows, in_head))
        other_sp = load(other_ref.at[chunk, r, :], both(in_chunk, in_head))
        state_np = load(states_ref.at[r, c], both(in_state, in_head))
        sums_i, sums_s, total = sums_ref[r, c, pl.ds(first, rows)], sums_ref[r, c, :], sums_ref[r, c, width - 1]
        dt = dt_ref[r, c, pl.ds(first, rows)] if reverse else dt_ref[r, c, :]
        if reverse:
            read_i = _exp2_where(runs_i == last_run, total - sums_i)
        else:
            read_i = _exp2_where(runs_i == 0, sums_i)
        products_is = _dot(value_ip, other_sp, 1, 1) * _pair(sums_i, runs_i, sums_s, runs_s, causal_is, reverse)
        far_in = read_i[:, None] * _dot(value_ip, state_np, 1, 1)
        here_i = pl.ds(first, rows)
        if reverse:
            # Of itself, nothing has decayed.
            same_i = _diagonal(itself_is, products_is)
            own_refs[0][r, c, here_i], own_refs[1][r, c, here_i] = same_i * own_score_i, same_i
        else:
            products_is *= dt[None, :]
        near_ref[r, c, here_i] = jnp.sum(products_is * scores_is, axis=1)
        far_ref[r, c, here_i] = jnp.sum(far_in * key_in.astype(jnp.float32), axis=1)
        if reverse:
            products_is, far_in = products_is * dt[:, None], far_in * dt[:, None]
        return gradient_in + far_in, dscores_is + products_is

    zeros = jnp.zeros((rows, padded_state), jnp.float32), jnp.zeros((rows, width), jnp.float32)
    gradient_in, dscores_is = lax.fori_loop(0, share, head, zeros)
    gradient_in += _dot(dscores_is.astype(dtype), other_key_sn, 1, 0)
    store(gradient_ref.at[here, :], gradient_in.astype(gradient_ref.dtype), both(in_rows, in_state))


def _diagonal(itself_is: Array, values_is: Array) -> Array:
    return jnp.sum(jnp.where(itself_is, values_is, 0.0), axis=1)


def _pair(sums_q, runs_q, sums_s, runs_s, causal_qs, reverse) -> Array:
    """What is left of token s at q, or of q at s in reverse."""
    difference_qs = sums_q[:, None] - sums_s[None, :]
    seen_qs = causal_qs & (runs_q[:, None] == runs_s[None, :])
    return _exp2_where(seen_qs, -difference_qs if reverse else difference_qs)


def _exp2_where(mask: Array, exponent: Array) -> Array:
    """2^exponent, 0 where masked out; masked before, for it overflows on the pairs that must not be read."""
    return jnp.exp2(jnp.where(mask, exponent, -jnp.inf))


def _earlier(rows_q: Array, columns_s: Array, reverse: bool) -> Array:
    rows_q1, columns_1s = rows_q[:, None], columns_s[None, :]
    return rows_q1 <= columns_1s if reverse else rows_q1 >= columns_1s


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """The float32 product of two matrices over these axes."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
