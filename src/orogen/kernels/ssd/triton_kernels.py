"""The Triton kernel that walks the chunks of the Mamba-2 recurrence, and helpers it shares with the gradient kernels.

Axes: b batch, t time, h heads, p head size, g groups, n state, c chunks, q position in a chunk,
s position in the chunk that q reads from.

The gradient is the same computation in reverse. The outputs add up what earlier tokens give, through a state that runs
forward; the gradient of x adds up what later tokens take, through the gradient of the state, which runs backward. So
one kernel serves both directions: `scan` walks the chunks of one head with its state in registers, and computes y from
x, or dx from dy. The kernels for the other gradients are in `triton_gradients`.

Every sum has a fixed order, so results repeat to the bit.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import both, call, dot, inside, load, store, tile


@dataclasses.dataclass(frozen=True)
class Launch:
    """Tile sizes and how to run. A chunk has `width` tokens.

    A program of `scan` takes `columns` elements of a head, `step` tokens at a time; one of `near` takes a square of
    `near_rows` by `near_rows` pairs of tokens, and one of `far` takes `far_states` of a state's n rows.

    exact: results are accurate to float32 however strong and weak decays are mixed. Log decays are natural and summed
    in two parts (`in_two`), and each gradient sums only its own terms. Otherwise logs are to base 2, exponents and
    gradients are differences of running sums, and `scan` takes dt into the exponents: two multiplications fewer per
    pair of tokens, with errors that bfloat16 operands hide.
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
    exact: bool
    interpret: bool


class ByChunk(NamedTuple):
    """The operands of the kernels; numbers that are computed once per token are laid out by chunk.

    `log_decay` is natural; `runs` counts the segment changes in the chunk so far.
    """

    x_bthp: Array
    dt_bhcq: Array
    log_decay_bcsh: Array
    b_btgn: Array
    c_btgn: Array
    runs_bcq: Array
    initial_bhpn: Array
    skip_h: Array


class Walk(NamedTuple):
    """A direction of `scan`, and the role of each array in it.

    Forward: query C, key B, value x, starting from the initial state. In reverse: query B, key C, value dy, and the
    state is the gradient of the forward state, starting from that of the final state.
    """

    query_btgn: Array
    key_btgn: Array
    value_bthp: Array
    start_bhpn: Array
    reverse: bool


def scan(
    o: ByChunk, sums_bhcq: Sequence[Array], walk: Walk, *, save: bool, launch: Launch
) -> tuple[Array, Array, Array | None]:
    """Outputs (b, t, h, p), the last state (b, h, p, n) and, if `save`, each chunk's first one (b, h, c, n, p).

    `sums_bhcq` are the parts of the log decay since the chunk's or the segment's start. A token's dt scales what it
    writes (forward) or reads (in reverse). Both directions add the skip, D times the value. States are float32 in
    registers, and saved in the dtype of the values, in which matrix products read them.

    Tiling: the grid is (heads, blocks of `columns` of a head's elements, batch). A program walks over its row of the
    batch in steps of `step` tokens and holds the state's columns in registers; per step, it multiplies query by state,
    query by key, and those scores by the values.
    """
    (query_btgn, key_btgn, value_bthp, start_bhpn, reverse), dt_bhcq = walk, o.dt_bhcq
    batch, time, heads, head_size = value_bthp.shape
    groups, state = key_btgn.shape[2:]
    chunks, padded_time, per_group = dt_bhcq.shape[2], dt_bhcq.shape[2] * launch.width, heads // groups
    columns, padded_state, blocks = launch.columns, tile(state), pl.cdiv(head_size, launch.columns)
    steps_bhcq = dt_bhcq if launch.exact else sums_bhcq[0] - jnp.log2(dt_bhcq)
    *sums_bht, steps_bht = (array.reshape(batch, heads, padded_time) for array in (*sums_bhcq, steps_bhcq))
    runs_bt = o.runs_bcq.reshape(batch, padded_time)
    operands = [query_btgn, key_btgn, value_bthp, sums_bht, steps_bht, runs_bt, start_bhpn, o.skip_h]
    group_spec = pl.BlockSpec((None, padded_time, None, padded_state), lambda h, p, b: (b, 0, h // per_group, 0))
    head_spec = pl.BlockSpec((None, padded_time, None, columns), lambda h, p, b: (b, 0, h, p))
    token_spec = pl.BlockSpec((None, None, padded_time), lambda h, p, b: (b, h, 0))
    runs_spec = pl.BlockSpec((None, padded_time), lambda h, p, b: (b, 0))
    state_spec = pl.BlockSpec((None, None, columns, padded_state), lambda h, p, b: (b, h, p, 0))
    states_spec = pl.BlockSpec((None, None, chunks, padded_state, columns), lambda h, p, b: (b, h, 0, 0, p))
    skip_spec = pl.BlockSpec((None,), lambda h, p, b: (h,))
    in_specs = [group_spec, group_spec, head_spec, [token_spec] * len(sums_bht), token_spec, runs_spec, state_spec]
    outputs = {
        "out": (value_bthp.shape, value_bthp.dtype, head_spec),
        "end": (start_bhpn.shape, jnp.float32, state_spec),
    }
    if save:
        outputs["saved"] = ((batch, heads, chunks, state, head_size), value_bthp.dtype, states_spec)
    kernel = functools.partial(
        _scan_kernel, width=launch.width, step=launch.step, time=time, head_size=head_size, state=state,
        exact=launch.exact, reverse=reverse,
    )  # fmt: skip
    results = call(
        kernel, operands, [*in_specs, skip_spec], outputs, grid=(heads, blocks, batch), warps=launch.scan_warps,
        stages=launch.scan_stages, interpret=launch.interpret,
    )  # fmt: skip
    return results["out"], results["end"], results.get("saved")


def _scan_kernel(
    query_ref, key_ref, value_ref, sums_refs, steps_ref, runs_ref, start_ref, skip_ref, out_ref, end_ref, *saved_refs,
    width, step, time, head_size, state, exact, reverse,
):  # fmt: skip
    """Walks in steps of part of a chunk; decays are differences of the chunk's sums."""
    steps, parts = steps_ref.shape[0] // step, width // step
    columns, padded_state = start_ref.shape
    positions = jnp.arange(step)
    in_state = inside(jnp.arange(padded_state), state, padded_state)
    in_head = inside(pl.program_id(1) * columns + jnp.arange(columns), head_size, columns)
    causal_qs = earlier(positions, positions, reverse)
    dtype, skip = value_ref.dtype, skip_ref[...]

    def advance(i, state_np):
        i = steps - 1 - i if reverse else i
        c = lax.div(i, parts)
        part = i - c * parts
        # At the edge, the current state is the one that enters the chunk or, in reverse, the one that leaves it.
        at_edge = part == (parts - 1 if reverse else 0)
        edge_n = jnp.broadcast_to(at_edge, (padded_state,))
        edge_n = edge_n if in_state is None else edge_n & in_state
        tokens = pl.ds(i * step, step)
        in_time = inside(i * step + positions, time, step)
        query_qn = load(query_ref.at[tokens, :], both(in_time, in_state))
        key_sn = load(key_ref.at[tokens, :], both(in_time, in_state))
        value_sp = load(value_ref.at[tokens, :], both(in_time, in_head))
        *sums_q, steps_q, runs_q = (ref[tokens] for ref in (*sums_refs, steps_ref, runs_ref))
        before = jnp.maximum(i * step - 1, 0)
        *base, base_run = (jnp.where(part == 0, 0.0, ref[before]) for ref in (*sums_refs, runs_ref))
        *last, last_run = (ref[i * step + step - 1] for ref in (*sums_refs, runs_ref))
        whole = jnp.where(last_run == base_run, decay(between(last, base), exact), 0.0)
        # A token's dt scales what it writes (forward) or reads (in reverse); if not exact, it is in the exponents.
        given_q = sums_q if exact else [steps_q]
        to_q = decay_where(runs_q == base_run, between(sums_q, base), exact)
        from_q = decay_where(runs_q == last_run, between(last, given_q), exact)
        pairs_qs = between(row(sums_q), column(given_q)) if reverse else between(column(sums_q), row(given_q))
        weights_qs = decay_where(causal_qs & (runs_q[:, None] == runs_q[None, :]), pairs_qs, exact)
        if exact:
            from_q *= steps_q
            weights_qs *= steps_q[:, None] if reverse else steps_q[None, :]
        read_q, write_s = (from_q, to_q) if reverse else (to_q, from_q)
        weights_qs *= dot(query_qn, key_sn, 1, 1)
        out_qp = read_q[:, None] * dot(query_qn, state_np.astype(dtype), 1, 0)
        out_qp += dot(weights_qs.astype(dtype), value_sp, 1, 0)
        out_qp += skip * value_sp.astype(jnp.float32)
        store(out_ref.at[tokens, :], out_qp.astype(dtype), both(in_time, in_head))
        for saved_ref in saved_refs:
            store(saved_ref.at[c], state_np.astype(dtype), both(edge_n, in_head))
        written_sp = (value_sp.astype(jnp.float32) * write_s[:, None]).astype(dtype)
        return whole * state_np + dot(key_sn, written_sp, 0, 0)

    start_pn = load(start_ref, both(in_head, in_state))
    end_np = lax.fori_loop(0, steps, advance, start_pn.T)
    store(end_ref, end_np.T, both(in_head, in_state))


def total(parts: Sequence[Array]) -> Array:
    """The sum of a number's parts."""
    first, *others = parts
    return sum(others, first)


def between(end: Sequence[Array], start: Sequence[Array]) -> Array:
    """The log decay from `start` to `end`, which are sums in parts.

    The parts are subtracted before they are added: the difference of the coarse ones is exact.
    """
    return total([end_part - start_part for end_part, start_part in zip(end, start, strict=True)])


def column(parts_q: Sequence[Array]) -> list[Array]:
    """Parts (q, 1)."""
    return [part_q[:, None] for part_q in parts_q]


def row(parts_s: Sequence[Array]) -> list[Array]:
    """Parts (1, s)."""
    return [part_s[None, :] for part_s in parts_s]


def decay(log: Array, exact: bool) -> Array:
    """The decay with this log, which is natural if exact, else to base 2."""
    return jnp.exp(log) if exact else jnp.exp2(log)


def decay_where(mask: Array, log: Array, exact: bool) -> Array:
    """`decay`, 0 where masked out; masked first, since it overflows on the pairs that must not be read."""
    return decay(jnp.where(mask, log, -jnp.inf), exact)


def earlier(rows_q: Array, columns_s: Array, reverse: bool) -> Array:
    """Whether s is no later than q, or no earlier if `reverse`. (q, s) bool"""
    rows_q1, columns_1s = rows_q[:, None], columns_s[None, :]
    return rows_q1 <= columns_1s if reverse else rows_q1 >= columns_1s
