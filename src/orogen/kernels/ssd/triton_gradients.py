"""Triton kernels for the gradients of the chunked Mamba-2 recurrence, except that of x, which `scan` computes.

Axes: b batch, t time, h heads, p head size, g groups, r heads per group, n state, c chunks, q position in a chunk,
s position in the chunk that q reads from, u position passed over on the way from s to q.

Each program takes part of one chunk of one group and loops over the group's heads:

    near    the gradients that pass between tokens of the chunk.
    far     those that pass between its tokens and the states; with near's scores, also dC and dB.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import both, call, dot, inside, load, store, tile
from orogen.kernels.ssd.sums import masked_sum
from orogen.kernels.ssd.triton_kernels import (
    ByChunk,
    Launch,
    between,
    column,
    decay,
    decay_where,
    earlier,
    row,
    total,
)


class NearGradients(NamedTuple):
    """The gradient of a group's scores C . B, summed over its heads, and terms of each token's gradients.

    received: y . dy, for what y_q gets from earlier tokens; given: x . dx / dt, for what x_q gives to later ones; own:
    the same for what it gives to its own output; skip: x . dy; across: the gradient of the log decay of u from all
    terms that pass over it from token to token, None unless the launch is exact.
    """

    scores_bgcqs: Array
    received_bhcq: Array
    given_bhcq: Array
    own_bhcq: Array
    skip_bhcq: Array
    across_bhcu: Array | None


class FarGradients(NamedTuple):
    """db and dc: the gradients of B and C; read: y . dy, for what y_q gets from the entering state; left: x . dx / dt,
    for what x_q gives to the leaving one; whole: the gradient of the log of a chunk's decay."""

    db_btgn: Array
    dc_btgn: Array
    read_bhcq: Array
    left_bhcq: Array
    whole_bhc: Array


class States(NamedTuple):
    """The states that enter the chunks, and the gradients of those that leave them."""

    entering_bhcnp: Array
    dleaving_bhcnp: Array


def near(o: ByChunk, dy_bthp: Array, sums_bhcq: Sequence[Array], *, launch: Launch) -> NearGradients:
    """The gradients that pass between tokens of one chunk.

    Tiling: the grid is (tiles of pairs of all chunks, groups, batch). A chunk's (q, s) pairs form square tiles of
    `near_rows`. Tiles whose s are all later than their q are empty: no program takes them, and their scores are not
    written.
    """
    x_bthp, b_btgn, dt_bhcq = o.x_bthp, o.b_btgn, o.dt_bhcq
    batch, time, heads, head_size = x_bthp.shape
    groups, state = b_btgn.shape[2:]
    chunks, width, rows, per_group = dt_bhcq.shape[2], launch.width, launch.near_rows, heads // groups
    tiles = tiles_of(width // rows)
    head_spec = pl.BlockSpec((None, chunks * width, per_group, tile(head_size)), lambda i, g, b: (b, 0, g, 0))
    group_spec = pl.BlockSpec((None, chunks * width, None, tile(state)), lambda i, g, b: (b, 0, g, 0))
    token_spec = pl.BlockSpec((None, per_group, chunks, width), lambda i, g, b: (b, g, 0, 0))
    runs_spec = pl.BlockSpec((None, chunks, width), lambda i, g, b: (b, 0, 0))
    scores_spec = pl.BlockSpec((None, None, chunks, width, width), lambda i, g, b: (b, g, 0, 0, 0))
    tile_spec = pl.BlockSpec((None, per_group, chunks, len(tiles), rows), lambda i, g, b: (b, g, 0, 0, 0))
    outputs = {
        "scores": ((batch, groups, chunks, width, width), x_bthp.dtype, scores_spec),
        **dict.fromkeys(("received", "given"), ((batch, heads, chunks, len(tiles), rows), jnp.float32, tile_spec)),
        **dict.fromkeys(("own", "skip"), (dt_bhcq.shape, jnp.float32, token_spec)),
    }
    if launch.exact:
        outputs["within"] = outputs["own"]
    results = call(
        functools.partial(
            _near_kernel, time=time, head_size=head_size, state=state, rows=rows, exact=launch.exact
        ),
        [x_bthp, dy_bthp, b_btgn, o.c_btgn, dt_bhcq, list(sums_bhcq), o.runs_bcq],
        [head_spec, head_spec, group_spec, group_spec, token_spec, [token_spec] * len(sums_bhcq), runs_spec],
        outputs, grid=(len(tiles) * chunks, groups, batch), warps=launch.near_warps, stages=launch.near_stages,
        interpret=launch.interpret,
    )  # fmt: skip
    received_bhctq, given_bhcts, within_bhcu = results["received"], results["given"], results.get("within")
    return NearGradients(
        scores_bgcqs=results["scores"],
        received_bhcq=_by_block(received_bhctq, tiles, 0),
        given_bhcq=_by_block(given_bhcts, tiles, 1),
        own_bhcq=results["own"],
        skip_bhcq=results["skip"],
        across_bhcu=None if within_bhcu is None else _across_tiles(received_bhctq, given_bhcts, within_bhcu, dt_bhcq),
    )


def _by_block(shares_bhctq: Array, tiles: list[tuple[int, int]], axis: int) -> Array:
    """For each block of a chunk's tokens, the sum of the tiles that have it as q (axis 0), or as s (axis 1)."""
    of_blocks = ([t for t, blocks in enumerate(tiles) if blocks[axis] == block] for block in range(tiles[-1][0] + 1))
    return jnp.concatenate([sum(shares_bhctq[..., t, :] for t in of_block) for of_block in of_blocks], axis=-1)


def _across_tiles(received_bhctq: Array, given_bhcts: Array, within_bhcu: Array, dt_bhcs: Array) -> Array:
    """For each token u of a chunk, the sum of the pairs with s < u <= q. (b, h, c, u)

    `within` has the pairs whose q and s are both in u's block. In a tile of two blocks, all pairs pass over a u between
    the blocks, those with s < u over a u in the block of s, and those with q >= u over a u in the block of q. So every
    sum adds only its own terms. A running sum of what tokens receive minus what they give would lose to cancellation
    the little that passes over a strong decay.
    """
    rows = received_bhctq.shape[-1]
    blocks = within_bhcu.shape[-1] // rows
    across, dt = (jnp.split(array, blocks, axis=-1) for array in (within_bhcu, dt_bhcs))
    for t, (q, s) in enumerate(tiles_of(blocks)):
        if q == s:
            continue
        received_bhcq, given_bhcs = received_bhctq[..., t, :], given_bhcts[..., t, :] * dt[s]
        across[s] += masked_sum(jnp.tri(rows, k=-1), "us,bhcs->bhcu", given_bhcs)
        across[q] += masked_sum(jnp.tri(rows), "qu,bhcq->bhcu", received_bhcq)
        for block in range(s + 1, q):
            across[block] += jnp.sum(received_bhcq, axis=-1, keepdims=True)
    return jnp.concatenate(across, axis=-1)


def tiles_of(blocks: int) -> list[tuple[int, int]]:
    """The (q, s) blocks of a chunk that are not empty, in order."""
    return [(q, s) for q in range(blocks) for s in range(q + 1)]


def _near_kernel(
    x_ref, dy_ref, b_ref, c_ref, dt_ref, sums_refs, runs_ref,
    scores_ref, received_ref, given_ref, own_ref, skip_ref, *within_refs, time, head_size, state, rows,
    exact,
):  # fmt: skip
    per_group, _, width = dt_ref.shape
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

    scores_qs = dot(
        load(c_ref.at[here_q, :], both(in_q, in_state)), load(b_ref.at[here_s, :], both(in_s, in_state)), 1, 1
    )
    itself_qs = rows_q[:, None] == rows_s[None, :]
    runs_q, runs_s = runs_ref[c, pl.ds(q, rows)], runs_ref[c, pl.ds(s, rows)]
    seen_qs = (rows_q[:, None] >= rows_s[None, :]) & (runs_q[:, None] == runs_s[None, :])
    own_q, scores_qs = _diagonal(itself_qs, scores_qs), jnp.where(seen_qs & ~itself_qs, scores_qs, 0.0)

    on_diagonal = jnp.broadcast_to(q == s, (rows,))

    def tokens(r):
        """One head's numbers, loaded one iteration ahead, so that the products hide the latency."""
        sums_q, sums_s = ([ref[r, c, pl.ds(block, rows)] for ref in sums_refs] for block in (q, s))
        return sums_q, sums_s, dt_ref[r, c, pl.ds(s, rows)]

    def head(r, carry):
        dscores_qs, (sums_q, sums_s, dt_s) = carry
        ahead = tokens(jnp.minimum(r + 1, per_group - 1))
        dy_qp = load(dy_ref.at[here_q, r, :], both(in_q, in_head))
        x_sp = load(x_ref.at[here_s, r, :], both(in_s, in_head))
        products_qs = dot(dy_qp, x_sp, 1, 1)
        same_q = _diagonal(itself_qs, products_qs)
        store(own_ref.at[r, c, pl.ds(q, rows)], same_q * own_q, on_diagonal)
        store(skip_ref.at[r, c, pl.ds(q, rows)], same_q, on_diagonal)
        # Where q sees s, no decay is above 1. Pairs it does not see are masked in the scores, not here for each head.
        products_qs *= decay(jnp.minimum(between(column(sums_q), row(sums_s)), 0.0), exact)
        shares_qs = products_qs * scores_qs
        given_ref[r, c, t, :] = jnp.sum(shares_qs, axis=0)
        received_qs = shares_qs * dt_s[None, :]
        received_ref[r, c, t, :] = jnp.sum(received_qs, axis=1)
        if exact:
            (within_ref,) = within_refs

            @pl.when(q == s)
            def _():
                store(within_ref.at[r, c, pl.ds(q, rows)], _across(received_qs))

        return dscores_qs + products_qs * dt_s[None, :], ahead

    dscores_qs, _ = lax.fori_loop(0, per_group, head, (jnp.zeros((rows, rows), jnp.float32), tokens(0)))
    store(scores_ref.at[c, pl.ds(q, rows), pl.ds(s, rows)], jnp.where(seen_qs, dscores_qs, 0.0).astype(dtype))


def far(
    o: ByChunk, dy_bthp: Array, sums_bhcq: Sequence[Array], scores_bgcqs: Array, states: States, *, launch: Launch
) -> FarGradients:
    """The gradients of B and C, and those that pass between a chunk's tokens and its states.

    `scores_bgcqs` come from `near`; through them the chunk's own tokens add to the gradients.

    Tiling: the grid is (parts of `far_states` of the states' n rows, for all chunks, groups, batch). A program takes
    its part of a chunk's states and all tokens of the chunk, head after head.
    """
    x_bthp, b_btgn, dt_bhcq = o.x_bthp, o.b_btgn, o.dt_bhcq
    batch, time, heads, head_size = x_bthp.shape
    groups, state = b_btgn.shape[2:]
    chunks, width, per_group = dt_bhcq.shape[2], launch.width, heads // groups
    parts = tile(state) // launch.far_states
    head_spec = pl.BlockSpec((None, chunks * width, per_group, tile(head_size)), lambda i, g, b: (b, 0, g, 0))
    group_spec = pl.BlockSpec((None, chunks * width, None, tile(state)), lambda i, g, b: (b, 0, g, 0))
    token_spec = pl.BlockSpec((None, per_group, chunks, width), lambda i, g, b: (b, g, 0, 0))
    runs_spec = pl.BlockSpec((None, chunks, width), lambda i, g, b: (b, 0, 0))
    scores_spec = pl.BlockSpec((None, None, chunks, width, width), lambda i, g, b: (b, g, 0, 0, 0))
    states_spec = pl.BlockSpec((None, per_group, chunks, tile(state), tile(head_size)), lambda i, g, b: (b, g, 0, 0, 0))
    token_parts_spec = pl.BlockSpec((None, per_group, chunks, parts, width), lambda i, g, b: (b, g, 0, 0, 0))
    parts_spec = pl.BlockSpec((None, per_group, chunks, parts), lambda i, g, b: (b, g, 0, 0))
    outputs = {
        **dict.fromkeys(("db", "dc"), (b_btgn.shape, b_btgn.dtype, group_spec)),
        **dict.fromkeys(("read", "left"), ((batch, heads, chunks, parts, width), jnp.float32, token_parts_spec)),
        "whole": ((batch, heads, chunks, parts), jnp.float32, parts_spec),
    }
    results = call(
        functools.partial(
            _far_kernel, time=time, head_size=head_size, state=state, part=launch.far_states, exact=launch.exact
        ),
        [
            x_bthp, dy_bthp, b_btgn, o.c_btgn, scores_bgcqs, dt_bhcq, list(sums_bhcq), o.runs_bcq, *states,
        ],
        [
            *[head_spec] * 2, *[group_spec] * 2, scores_spec, token_spec, [token_spec] * len(sums_bhcq), runs_spec,
            *[states_spec] * 2,
        ],
        outputs, grid=(parts * chunks, groups, batch), warps=launch.far_warps, stages=launch.far_stages,
        interpret=launch.interpret,
    )  # fmt: skip
    read_bhcq, left_bhcq, whole_bhc = (jnp.sum(results[name], axis=3) for name in ("read", "left", "whole"))
    return FarGradients(results["db"], results["dc"], read_bhcq, left_bhcq, whole_bhc)


def _far_kernel(
    x_ref, dy_ref, b_ref, c_ref, scores_ref, dt_ref, sums_refs, runs_ref, states_ref, dstates_ref,
    db_ref, dc_ref, read_ref, left_ref, whole_ref, *, time, head_size, state, part, exact,
):  # fmt: skip
    """Takes part of the states' rows, which no other program reads, and all tokens of the chunk.

    The states are most of what is read, and both products of a state use the same part of it.
    """
    per_group, _, width = dt_ref.shape
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
        """One head's numbers, loaded one iteration ahead, so that the products hide the latency."""
        return [ref[r, c, :] for ref in sums_refs], dt_ref[r, c, :], [ref[r, c, width - 1] for ref in sums_refs]

    def head(r, carry):
        dc_qn, db_qn, (sums_q, dt_q, last) = carry
        ahead = tokens(jnp.minimum(r + 1, per_group - 1))
        x_qp, dy_qp = (load(ref.at[here, r, :], both(in_time, in_head)) for ref in (x_ref, dy_ref))
        state_np, dstate_np = (
            load(ref.at[r, c, mine_n, :], both(in_mine, in_head)) for ref in (states_ref, dstates_ref)
        )
        # Each token's term with the state is its key times the key's gradient, so it needs no matrix product.
        read_qn = decay_where(runs_q == 0, total(sums_q), exact)[:, None] * dot(dy_qp, state_np, 1, 1)
        read_ref[r, c, i, :] = jnp.sum(read_qn * c_qn.astype(jnp.float32), axis=1)
        out_of_q = decay_where(runs_q == last_run, between(last, sums_q), exact)
        left_qn = out_of_q[:, None] * dot(x_qp, dstate_np, 1, 1)
        left_ref[r, c, i, :] = jnp.sum(left_qn * b_qn.astype(jnp.float32), axis=1)
        product = jnp.sum(state_np.astype(jnp.float32) * dstate_np.astype(jnp.float32))
        whole_ref[r, c, i] = jnp.where(last_run == 0, decay(total(last), exact), 0.0) * product
        return dc_qn + read_qn, db_qn + dt_q[:, None] * left_qn, ahead

    zeros_qn = jnp.zeros((width, part), jnp.float32)
    dc_qn, db_qn, _ = lax.fori_loop(0, per_group, head, (zeros_qn, zeros_qn, tokens(0)))
    # Loaded whole and then masked: a masked load would go element by element.
    scores_qs = load(scores_ref.at[c])
    scores_qs = jnp.where(earlier(positions, positions, False), scores_qs, jnp.zeros_like(scores_qs))
    dc_qn += dot(scores_qs, b_qn, 1, 0)
    db_qn += dot(scores_qs, c_qn, 0, 0)
    for ref, gradient_qn in ((dc_ref, dc_qn), (db_ref, db_qn)):
        store(ref.at[here, mine_n], gradient_qn.astype(ref.dtype), both(in_time, in_mine))


def _across(pairs_qs: Array) -> Array:
    """For each token u of a diagonal tile's block, the sum of the pairs with s < u <= q."""
    positions = jnp.arange(pairs_qs.shape[0])
    later_qu = earlier(positions, positions, False)
    from_before_qu = dot(pairs_qs, jnp.where(later_qu, 0.0, 1.0), 1, 0)
    return jnp.sum(jnp.where(later_qu, from_before_qu, 0.0), axis=0)


def _diagonal(itself_qs: Array, values_qs: Array) -> Array:
    return jnp.sum(jnp.where(itself_qs, values_qs, 0.0), axis=1)
