"""Triton kernels of the chunked Mamba-2 recurrence and of its gradient.

Axes: b batch, t time, h heads, p head size, g groups, r heads of a group, n state, c chunks,
q position in a chunk, s position in the chunk that q reads from.

The gradient is the same computation read backwards: where the outputs add up what earlier tokens give, through a state
that runs forward, the gradient of x adds up what later tokens take, through the gradient of the state, which runs
backward. So one kernel has a direction:

    scan    walks the chunks of one head with its state in registers: y from x, or dx from dy.

Two are for both at once, for one chunk of one group, over its heads:

    near    what the tokens have to do with each other.
    far     what they and their decays have to do with states, which with near's scores makes dC and dB.

Every sum runs in one order, so results repeat to the bit.
"""

import dataclasses
import functools
from typing import NamedTuple

from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import both, call, inside, load, store

SMALLEST_TILE = 16  # of a matrix product in Triton


@dataclasses.dataclass(frozen=True)
class Launch:
    """How to cut and run: `width` tokens a chunk, of which `scan` takes `step` at once and `columns` of a head a
    program, `near` takes pairs of `near_rows` tokens with as many, and `far` takes `far_states` rows of the states.

    dt_in_decays: `scan` takes dt into the decays' exponents: a product less for each pair of tokens, and an error of
    half a unit of the exponent's last place, which is more than float32 has where decays are strong.
    """

    width: int
    step: int
    columns: int
    scan_warps: int
    scan_stages: int
    near_rows: int
    near_warps: int
    near_stages: int
    far_states: int
    far_warps: int
    far_stages: int
    dt_in_decays: bool
    interpret: bool


class FarGradients(NamedTuple):
    """read: y . dy of what y_q gets from the entering state; left: x . dx / dt of what x_q gives to the leaving one;
    whole: the gradient of the log of a chunk's decay."""

    db_btgn: Array
    dc_btgn: Array
    read_bhcq: Array
    left_bhcq: Array
    whole_bhc: Array


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
    *,
    reverse: bool,
    save: bool,
    launch: Launch,
) -> tuple[Array, Array, Array | None]:
    """Outputs (b, t, h, p), the last state (b, h, p, n) and each chunk's first one (b, h, c, n, p).

    `sums_bhcq` are base-2 logs of the decay since the chunk's or the segment's start; what decays from a token on does
    so times its dt. Forward: query C, key B, value x. In reverse: query B, key C, value dy, and the state is the
    gradient of the forward one. Both add the skip D value.
    States are float32 in registers, `save`d in the dtype of the values, which is how matrix products read them.
    """
    batch, time, heads, head_size = value_bthp.shape
    groups, state = key_btgn.shape[2:]
    chunks, padded_time, share = sums_bhcq.shape[2], sums_bhcq.shape[2] * launch.width, heads // groups
    columns, padded_state, blocks = launch.columns, tile(state), pl.cdiv(head_size, launch.columns)
    steps_bhcq = sums_bhcq - jnp.log2(dt_bhcq) if launch.dt_in_decays else dt_bhcq
    sums_bht, steps_bht = (array.reshape(batch, heads, padded_time) for array in (sums_bhcq, steps_bhcq))
    runs_bt = runs_bcq.reshape(batch, padded_time)
    operands = [query_btgn, key_btgn, value_bthp, sums_bht, steps_bht, runs_bt, start_bhpn, skip_h]
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
    kernel = functools.partial(
        _scan_kernel, width=launch.width, step=launch.step, time=time, head_size=head_size, state=state,
        dt_in_decays=launch.dt_in_decays, reverse=reverse,
    )  # fmt: skip
    results = call(
        kernel, operands, in_specs, outputs, grid=(heads, blocks, batch), warps=launch.scan_warps,
        stages=launch.scan_stages, interpret=launch.interpret,
    )  # fmt: skip
    return results["out"], results["end"], results.get("saved")


def _scan_kernel(
    query_ref, key_ref, value_ref, sums_ref, steps_ref, runs_ref, start_ref, skip_ref, out_ref, end_ref, *saved_refs,
    width, step, time, head_size, state, dt_in_decays, reverse,
):  # fmt: skip
    """Walks in steps of a part of a chunk: decays are differences of the chunk's sums."""
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
        sums_q, steps_q, runs_q = sums_ref[tokens], steps_ref[tokens], runs_ref[tokens]
        before = jnp.maximum(i * step - 1, 0)
        base, base_run = (jnp.where(part == 0, 0.0, ref[before]) for ref in (sums_ref, runs_ref))
        total, last_run = sums_ref[i * step + step - 1], runs_ref[i * step + step - 1]
        whole = jnp.where(last_run == base_run, jnp.exp2(total - base), 0.0)
        # What decays from a token on does so times its dt: forward what it writes, in reverse what it reads.
        given_q = steps_q if dt_in_decays else sums_q
        to_q = _exp2_where(runs_q == base_run, sums_q - base)
        from_q = _exp2_where(runs_q == last_run, total - given_q)
        pairs_qs = sums_q[None, :] - given_q[:, None] if reverse else sums_q[:, None] - given_q[None, :]
        weights_qs = _exp2_where(causal_qs & (runs_q[:, None] == runs_q[None, :]), pairs_qs)
        if not dt_in_decays:
            from_q *= steps_q
            weights_qs *= steps_q[:, None] if reverse else steps_q[None, :]
        read_q, write_s = (from_q, to_q) if reverse else (to_q, from_q)
        weights_qs *= _dot(query_qn, key_sn, 1, 1)
        out_qp = read_q[:, None] * _dot(query_qn, state_np.astype(dtype), 1, 0)
        out_qp += _dot(weights_qs.astype(dtype), value_sp, 1, 0)
        out_qp += skip * value_sp.astype(jnp.float32)
        store(out_ref.at[tokens, :], out_qp.astype(dtype), both(in_time, in_head))
        for saved_ref in saved_refs:
            store(saved_ref.at[c], state_np.astype(dtype), both(edge_n, in_head))
        written_sp = (value_sp.astype(jnp.float32) * write_s[:, None]).astype(dtype)
        return whole * state_np + _dot(key_sn, written_sp, 0, 0)

    start_pn = load(start_ref, both(in_head, in_state))
    end_np = lax.fori_loop(0, steps, advance, start_pn.T)
    store(end_ref, end_np.T, both(in_head, in_state))


def near(
    x_bthp: Array,
    dy_bthp: Array,
    b_btgn: Array,
    c_btgn: Array,
    dt_bhcq: Array,
    sums_bhcq: Array,
    runs_bcq: Array,
    *,
    launch: Launch,
) -> tuple[Array, Array, Array, Array, Array]:
    """What the tokens of one chunk are to each other: the gradient of their scores C . B, summed over a group's heads,
    (b, g, c, q, s), and four shares of each token's gradient (b, h, c, q).

    received: y . dy of what y_q gets from earlier tokens; given: x . dx / dt of what x_q gives to later ones; own: that
    of what it gives to its own output; skip: x . dy. The chunk's pairs are cut into square tiles. Those with a later s
    than q hold nothing: they are left out, and so not written.
    """
    batch, time, heads, head_size = x_bthp.shape
    groups, state = b_btgn.shape[2:]
    chunks, width, rows, share = sums_bhcq.shape[2], launch.width, launch.near_rows, heads // groups
    tiles = tiles_of(width // rows)
    head_spec = pl.BlockSpec((None, chunks * width, share, tile(head_size)), lambda i, g, b: (b, 0, g, 0))
    group_spec = pl.BlockSpec((None, chunks * width, None, tile(state)), lambda i, g, b: (b, 0, g, 0))
    token_spec = pl.BlockSpec((None, share, chunks, width), lambda i, g, b: (b, g, 0, 0))
    runs_spec = pl.BlockSpec((None, chunks, width), lambda i, g, b: (b, 0, 0))
    scores_spec = pl.BlockSpec((None, None, chunks, width, width), lambda i, g, b: (b, g, 0, 0, 0))
    share_spec = pl.BlockSpec((None, share, chunks, len(tiles), rows), lambda i, g, b: (b, g, 0, 0, 0))
    outputs = {
        "scores": ((batch, groups, chunks, width, width), x_bthp.dtype, scores_spec),
        **dict.fromkeys(("received", "given"), ((batch, heads, chunks, len(tiles), rows), jnp.float32, share_spec)),
        **dict.fromkeys(("own", "skip"), (sums_bhcq.shape, jnp.float32, token_spec)),
    }
    results = call(
        functools.partial(_near_kernel, time=time, head_size=head_size, state=state, rows=rows),
        [x_bthp, dy_bthp, b_btgn, c_btgn, dt_bhcq, sums_bhcq, runs_bcq],
        [head_spec, head_spec, group_spec, group_spec, token_spec, token_spec, runs_spec],
        outputs, grid=(len(tiles) * chunks, groups, batch), warps=launch.near_warps, stages=launch.near_stages,
        interpret=launch.interpret,
    )  # fmt: skip

    def joined(name: str, axis: int) -> Array:
        """By block of a chunk's tokens, the sum of the tiles that have it as q (axis 0), or as s (axis 1)."""
        of_block = ([t for t, blocks in enumerate(tiles) if blocks[axis] == i] for i in range(width // rows))
        return jnp.concatenate([sum(results[name][..., t, :] for t in of) for of in of_block], axis=-1)

    return results["scores"], joined("received", 0), joined("given", 1), results["own"], results["skip"]


def tiles_of(blocks: int) -> list[tuple[int, int]]:
    """The (q, s) blocks of a chunk's pairs that hold any, in order."""
    return [(q, s) for q in range(blocks) for s in range(q + 1)]


def _near_kernel(
    x_ref, dy_ref, b_ref, c_ref, dt_ref, sums_ref, runs_ref,
    scores_ref, received_ref, given_ref, own_ref, skip_ref, *, time, head_size, state, rows,
):  # fmt: skip
    share, _, width = sums_ref.shape
    tiles = tiles_of(width // rows)
    c = lax.div(pl.program_id(0), len(tiles))
    t = pl.program_id(0) - c * len(tiles)
    block_q = sum(lax.convert_element_type(t >= k * (k + 1) // 2, jnp.int32) for k in range(1, width // rows))
    q, s = block_q * rows, (t - lax.div(block_q * (block_q + 1), 2)) * rows
    rows_q, rows_s = q + jnp.arange(rows), s + jnp.arange(rows)
    here_q, here_s = pl.ds(c * width + q, rows), pl.ds(c * width + s, rows)
    in_q, in_s = (inside(c * width + positions, time, width) for positions in (rows_q, rows_s))
    in_state = inside(jnp.arange(b_ref.shape[1]), state, b_ref.shape[1])
    in_head = inside(jnp.arange(x_ref.shape[2]), head_size, x_ref.shape[2])
    dtype = x_ref.dtype

    scores_qs = _dot(
        load(c_ref.at[here_q, :], both(in_q, in_state)), load(b_ref.at[here_s, :], both(in_s, in_state)), 1, 1
    )
    itself_qs = rows_q[:, None] == rows_s[None, :]
    runs_q, runs_s = runs_ref[c, pl.ds(q, rows)], runs_ref[c, pl.ds(s, rows)]
    seen_qs = (rows_q[:, None] >= rows_s[None, :]) & (runs_q[:, None] == runs_s[None, :])
    own_q, scores_qs = _diagonal(itself_qs, scores_qs), jnp.where(seen_qs & ~itself_qs, scores_qs, 0.0)

    on_diagonal = jnp.broadcast_to(q == s, (rows,))

    def tokens(r):
        """A head's numbers, loaded a turn ahead: the products' time hides that."""
        return sums_ref[r, c, pl.ds(q, rows)], sums_ref[r, c, pl.ds(s, rows)], dt_ref[r, c, pl.ds(s, rows)]

    def head(r, carry):
        dscores_qs, (sums_q, sums_s, dt_s) = carry
        ahead = tokens(jnp.minimum(r + 1, share - 1))
        dy_qp = load(dy_ref.at[here_q, r, :], both(in_q, in_head))
        x_sp = load(x_ref.at[here_s, r, :], both(in_s, in_head))
        products_qs = _dot(dy_qp, x_sp, 1, 1)
        same_q = _diagonal(itself_qs, products_qs)
        store(own_ref.at[r, c, pl.ds(q, rows)], same_q * own_q, on_diagonal)
        store(skip_ref.at[r, c, pl.ds(q, rows)], same_q, on_diagonal)
        # Where q sees s no decay is above 1; what it does not see is masked out of the scores, not here for each head.
        products_qs *= jnp.exp2(jnp.minimum(sums_q[:, None] - sums_s[None, :], 0.0))
        shares_qs = products_qs * scores_qs
        given_ref[r, c, t, :] = jnp.sum(shares_qs, axis=0)
        received_ref[r, c, t, :] = jnp.sum(shares_qs * dt_s[None, :], axis=1)
        return dscores_qs + products_qs * dt_s[None, :], ahead

    dscores_qs, _ = lax.fori_loop(0, share, head, (jnp.zeros((rows, rows), jnp.float32), tokens(0)))
    store(scores_ref.at[c, pl.ds(q, rows), pl.ds(s, rows)], jnp.where(seen_qs, dscores_qs, 0.0).astype(dtype))


def far(
    x_bthp: Array,
    dy_bthp: Array,
    b_btgn: Array,
    c_btgn: Array,
    scores_bgcqs: Array,
    dt_bhcq: Array,
    sums_bhcq: Array,
    runs_bcq: Array,
    states_bhcnp: Array,
    dstates_bhcnp: Array,
    *,
    launch: Launch,
) -> FarGradients:
    """The gradients of B and C, and what the tokens and the decay of a chunk have to do with its states.

    `states_bhcnp` are those that enter the chunks, `dstates_bhcnp` the gradients of those that leave. `scores_bgcqs`
    are `near`'s, through which the chunk's own tokens add to the gradients.
    """
    batch, time, heads, head_size = x_bthp.shape
    groups, state = b_btgn.shape[2:]
    chunks, width, share = sums_bhcq.shape[2], launch.width, heads // groups
    parts = tile(state) // launch.far_states
    head_spec = pl.BlockSpec((None, chunks * width, share, tile(head_size)), lambda i, g, b: (b, 0, g, 0))
    group_spec = pl.BlockSpec((None, chunks * width, None, tile(state)), lambda i, g, b: (b, 0, g, 0))
    token_spec = pl.BlockSpec((None, share, chunks, width), lambda i, g, b: (b, g, 0, 0))
    runs_spec = pl.BlockSpec((None, chunks, width), lambda i, g, b: (b, 0, 0))
    scores_spec = pl.BlockSpec((None, None, chunks, width, width), lambda i, g, b: (b, g, 0, 0, 0))
    states_spec = pl.BlockSpec((None, share, chunks, tile(state), tile(head_size)), lambda i, g, b: (b, g, 0, 0, 0))
    token_parts_spec = pl.BlockSpec((None, share, chunks, parts, width), lambda i, g, b: (b, g, 0, 0, 0))
    parts_spec = pl.BlockSpec((None, share, chunks, parts), lambda i, g, b: (b, g, 0, 0))
    outputs = {
        **dict.fromkeys(("db", "dc"), (b_btgn.shape, b_btgn.dtype, group_spec)),
        **dict.fromkeys(("read", "left"), ((batch, heads, chunks, parts, width), jnp.float32, token_parts_spec)),
        "whole": ((batch, heads, chunks, parts), jnp.float32, parts_spec),
    }
    results = call(
        functools.partial(_far_kernel, time=time, head_size=head_size, state=state, part=launch.far_states),
        [x_bthp, dy_bthp, b_btgn, c_btgn, scores_bgcqs, dt_bhcq, sums_bhcq, runs_bcq, states_bhcnp, dstates_bhcnp],
        [*[head_spec] * 2, *[group_spec] * 2, scores_spec, *[token_spec] * 2, runs_spec, *[states_spec] * 2],
        outputs, grid=(parts * chunks, groups, batch), warps=launch.far_warps, stages=launch.far_stages,
        interpret=launch.interpret,
    )  # fmt: skip
    read_bhcq, left_bhcq, whole_bhc = (jnp.sum(results[name], axis=3) for name in ("read", "left", "whole"))
    return FarGradients(results["db"], results["dc"], read_bhcq, left_bhcq, whole_bhc)


def _far_kernel(
    x_ref, dy_ref, b_ref, c_ref, scores_ref, dt_ref, sums_ref, runs_ref, states_ref, dstates_ref,
    db_ref, dc_ref, read_ref, left_ref, whole_ref, *, time, head_size, state, part,
):  # fmt: skip
    """Takes part of the states' rows, which no other program reads, and all tokens of the chunk.

    The states are most of what there is to read, and both products of one take the same part of it.
    """
    share, _, width = sums_ref.shape
    padded_state, padded_head = states_ref.shape[2:]
    parts = padded_state // part
    c = lax.div(pl.program_id(0), parts)
    i = pl.program_id(0) - c * parts
    here, mine_n = pl.ds(c * width, width), pl.ds(i * part, part)
    positions = jnp.arange(width)
    in_time = inside(c * width + positions, time, width)
    in_mine = inside(i * part + jnp.arange(part), state, padded_state)
    in_head = inside(jnp.arange(padded_head), head_size, padded_head)
    b_qn, c_qn = (load(ref.at[here, mine_n], both(in_time, in_mine)) for ref in (b_ref, c_ref))
    runs_q, last_run = runs_ref[c, :], runs_ref[c, width - 1]

    def tokens(r):
        """A head's numbers, loaded a turn ahead: the products' time hides that."""
        return sums_ref[r, c, :], dt_ref[r, c, :], sums_ref[r, c, width - 1]

    def head(r, carry):
        dc_qn, db_qn, (sums_q, dt_q, total) = carry
        ahead = tokens(jnp.minimum(r + 1, share - 1))
        x_qp, dy_qp = (load(ref.at[here, r, :], both(in_time, in_head)) for ref in (x_ref, dy_ref))
        state_np, dstate_np = (
            load(ref.at[r, c, mine_n, :], both(in_mine, in_head)) for ref in (states_ref, dstates_ref)
        )
        # What each token has with the state is the product of its key and the key's gradient: no product of its own.
        read_qn = _exp2_where(runs_q == 0, sums_q)[:, None] * _dot(dy_qp, state_np, 1, 1)
        read_ref[r, c, i, :] = jnp.sum(read_qn * c_qn.astype(jnp.float32), axis=1)
        left_qn = _exp2_where(runs_q == last_run, total - sums_q)[:, None] * _dot(x_qp, dstate_np, 1, 1)
        left_ref[r, c, i, :] = jnp.sum(left_qn * b_qn.astype(jnp.float32), axis=1)
        product = jnp.sum(state_np.astype(jnp.float32) * dstate_np.astype(jnp.float32))
        whole_ref[r, c, i] = jnp.where(last_run == 0, jnp.exp2(total), 0.0) * product
        return dc_qn + read_qn, db_qn + dt_q[:, None] * left_qn, ahead

    zeros_qn = jnp.zeros((width, part), jnp.float32)
    dc_qn, db_qn, _ = lax.fori_loop(0, share, head, (zeros_qn, zeros_qn, tokens(0)))
    # Read whole and then masked: a mask in the load would make it one by one.
    scores_qs = load(scores_ref.at[c])
    scores_qs = jnp.where(_earlier(positions, positions, False), scores_qs, jnp.zeros_like(scores_qs))
    dc_qn += _dot(scores_qs, b_qn, 1, 0)
    db_qn += _dot(scores_qs, c_qn, 0, 0)
    for ref, gradient_qn in ((dc_ref, dc_qn), (db_ref, db_qn)):
        store(ref.at[here, mine_n], gradient_qn.astype(ref.dtype), both(in_time, in_mine))


def _diagonal(itself_qs: Array, values_qs: Array) -> Array:
    return jnp.sum(jnp.where(itself_qs, values_qs, 0.0), axis=1)


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
