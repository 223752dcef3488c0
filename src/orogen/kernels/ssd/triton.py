"""The chunked Mamba-2 recurrence in fused Triton kernels, for NVIDIA GPUs.

Axes: b batch, t time, h heads, p head size, g groups, n state, c chunks, q position in a chunk,
s position in the chunk that q reads from.

The formulas are those of `chunked`. The only (q, s) array that leaves a kernel is the gradient of a group's scores,
summed over its heads. The forward pass keeps its operands and the state that enters each chunk.
"""

import functools
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import LOG2_E, SMALLEST_TILE, require_gpu, tile
from orogen.kernels.ssd import sums
from orogen.kernels.ssd.operands import Operands
from orogen.kernels.ssd.triton_gradients import FarGradients, NearGradients, States, far, near
from orogen.kernels.ssd.triton_kernels import ByChunk, Launch, Walk, scan
from orogen.kernels.traced import traced_once

MULTIPROCESSORS = 132  # of an H100
# By bytes per number: the most tokens of a chunk, and the most numbers of a head's chunk that `far`, with half as many
# rows of its states, holds twice in shared memory.
LONGEST_CHUNK, LARGEST_CHUNK = {2: 128, 4: 64}, {2: 2**15, 4: 2**14}
SHARED_MEMORY = 215_000  # bytes of a multiprocessor's 232,448 that operands may take; the rest is scratch


def ssd_triton(o: Operands, *, chunk_size: int, interpret: bool = False) -> tuple[Array, Array]:
    """`ssd` on an NVIDIA GPU; `interpret` runs the same kernels anywhere, slowly.

    Matrix products take their operands in bfloat16 if x, B and C are bfloat16, else in float32, and accumulate in
    float32. States are float32; they are rounded to the operands' dtype where a product reads them and where they are
    saved for the gradient. The length of a chunk is a power of two from 16 to 128 (64 in float32): the least that is
    not below `chunk_size`, or less if a head is wider than 256.

    Differentiable once, in reverse mode only; the gradient repeats to the bit.
    Raises ValueError if there is no GPU and `interpret` is False.
    """
    require_gpu(interpret=interpret)
    half = all(array.dtype == jnp.bfloat16 for array in (o.x_bthp, o.b_btgn, o.c_btgn))
    dtype = jnp.bfloat16 if half else jnp.float32
    launch = _launch(chunk_size, o.x_bthp.shape, o.b_btgn.shape[3], half=half, interpret=interpret)
    by_chunk = ByChunk(
        x_bthp=o.x_bthp.astype(dtype),
        dt_bhcq=jnp.transpose(sums.in_chunks(o.dt_bth.astype(jnp.float32), launch.width), (0, 3, 1, 2)),
        log_decay_bcsh=sums.in_chunks(sums.log_decays(o.dt_bth, o.a_h), launch.width),
        b_btgn=o.b_btgn.astype(dtype),
        c_btgn=o.c_btgn.astype(dtype),
        runs_bcq=sums.runs_in_chunks(o.segments_bt, launch.width),
        initial_bhpn=o.initial_state_bhpn,
        skip_h=o.skip_h,
    )
    y_bthp, final_bhpn = _ssd(launch, by_chunk)  # pyright: ignore[reportGeneralTypeIssues]
    return y_bthp.astype(o.x_bthp.dtype), final_bhpn


def _launch(chunk_size: int, shape: tuple[int, ...], state: int, *, half: bool, interpret: bool) -> Launch:
    """The fastest of those tried on an H100 at 64 and 128 heads of 64, state 128, 2 x 8192 tokens, reduced to fit."""
    batch, time, heads, head_size = shape
    head_size, state = tile(head_size), tile(state)
    size = 2 if half else 4
    widest = max(SMALLEST_TILE, LARGEST_CHUNK[size] // head_size)
    width = min(tile(min(chunk_size, time)), LONGEST_CHUNK[size], widest)
    step = min(width, 64 if half else 32)
    columns = min(head_size, 64)
    # A scan alone on a multiprocessor must load further ahead; two share one only if each takes less memory.
    alone = batch * heads * pl.cdiv(head_size, columns) <= MULTIPROCESSORS
    scan_stages = _stages(3 if alone else 2, step * (2 * state + columns), columns * state)
    near_rows, far_states = min(width, 32), min(state, 64 if half else 32, max(SMALLEST_TILE, widest // 2))
    near_stages = _stages(3, 2 * near_rows * head_size, 2 * near_rows * state)
    far_stages = _stages(3, 2 * (width + far_states) * head_size, 2 * width * far_states)
    return Launch(
        width=width,
        step=step,
        columns=columns,
        scan_warps=4,
        scan_stages=scan_stages if half else 1,
        near_rows=near_rows,
        near_warps=1 if half else 4,
        near_stages=near_stages if half else 1,
        far_states=far_states,
        far_warps=8 if half else 4,
        far_stages=far_stages if half else 1,
        exact=not half,
        interpret=interpret,
    )


def _stages(wanted: int, stage: int, kept: int) -> int:
    """How many stages of `stage` bfloat16 elements, at most `wanted`, fit beside `kept` elements and the scratch."""
    return max(1, min(wanted, (SHARED_MEMORY - 2 * kept) // (2 * stage)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(launch: Launch, o: ByChunk) -> tuple[Array, Array]:
    """Outputs (b, t, h, p) in x's type and final state (b, h, p, n) float32."""
    y_bthp, final_bhpn, _ = scan(o, _sums(launch, o), _forward_walk(o), save=False, launch=launch)
    return y_bthp, final_bhpn


def _sums(launch: Launch, o: ByChunk) -> tuple[Array, ...]:
    """The log decay since the chunk's or the segment's start, in the parts and to the base that `Launch.exact` selects.
    (b, h, c, q) each"""
    since_start = functools.partial(_since_start, o.runs_bcq)
    if not launch.exact:
        return (since_start(o.log_decay_bcsh) * LOG2_E,)
    parts = sums.in_two(o.log_decay_bcsh, lowest=sums.LOWEST_LOG_DECAY, terms=launch.width)
    return tuple(map(since_start, parts))


def _since_start(runs_bcq: Array, log_decay_bcsh: Array) -> Array:
    """The sum since the chunk's or the segment's start. (b, h, c, q)"""
    return sums.masked_sum(sums.readable(runs_bcq), "bcqs,bcsh->bhcq", log_decay_bcsh)


def _forward_walk(o: ByChunk) -> Walk:
    return Walk(o.c_btgn, o.b_btgn, o.x_bthp, o.initial_bhpn, reverse=False)


@traced_once("launch")
def _forward(launch: Launch, o: ByChunk) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    """The outputs, and what `_backward` needs."""
    sums_bhcq = _sums(launch, o)
    y_bthp, final_bhpn, states_bhcnp = scan(o, sums_bhcq, _forward_walk(o), save=True, launch=launch)
    y_bthp, states_bhcnp = checkpoint_name(y_bthp, "ssd"), checkpoint_name(states_bhcnp, "ssd_states")
    return (y_bthp, final_bhpn), (o, sums_bhcq, states_bhcnp)


@traced_once("launch")
def _backward(launch: Launch, saved: tuple[Any, ...], gradients: tuple[Array, Array]) -> tuple[ByChunk]:
    """The gradient of every operand, from `dy` of the outputs and `dfinal` of the final state."""
    (o, sums_bhcq, states_bhcnp), (dy_bthp, dfinal_bhpn) = saved, gradients
    walk = Walk(o.b_btgn, o.c_btgn, dy_bthp, dfinal_bhpn, reverse=True)
    dx_bthp, dinitial_bhpn, dstates_bhcnp = scan(o, sums_bhcq, walk, save=True, launch=launch)
    assert dstates_bhcnp is not None  # since save=True
    n = near(o, dy_bthp, sums_bhcq, launch=launch)
    f = far(o, dy_bthp, sums_bhcq, n.scores_bgcqs, States(states_bhcnp, dstates_bhcnp), launch=launch)
    gradient = ByChunk(
        x_bthp=dx_bthp,
        dt_bhcq=n.given_bhcq + n.own_bhcq + f.left_bhcq,
        log_decay_bcsh=_log_decay_gradient(o, n, f),
        b_btgn=f.db_btgn,
        c_btgn=f.dc_btgn,
        runs_bcq=jnp.zeros_like(o.runs_bcq),
        initial_bhpn=dinitial_bhpn,
        skip_h=jnp.sum(n.skip_bhcq, axis=(0, 2, 3)),
    )
    return (gradient,)


def _log_decay_gradient(o: ByChunk, n: NearGradients, f: FarGradients) -> Array:
    """The gradient of each token's log decay: the terms that pass over it, from tokens or a state to tokens or a state.

    Unless the launch is exact, it follows from the gradient of the running sums. The sum up to q is in the exponent of
    everything that y_q receives from other tokens and, with a minus sign, of everything that token q gives to others.
    Both are sums of the same float32 products, so what must cancel in a later sum over q does, up to rounding.
    """
    left_bhcq = o.dt_bhcq * f.left_bhcq
    if n.across_bhcu is not None:
        across_bhcu = n.across_bhcu + sums.across_tokens(f.read_bhcq, left_bhcq, f.whole_bhc)
        return jnp.transpose(across_bhcu, (0, 2, 3, 1))
    dsums_bhcq = n.received_bhcq + f.read_bhcq - o.dt_bhcq * (n.given_bhcq + f.left_bhcq)
    last_bhc = jnp.sum(left_bhcq, axis=-1) + f.whole_bhc
    to_sums = functools.partial(_since_start, o.runs_bcq)
    (gradient_bcsh,) = jax.linear_transpose(to_sums, o.log_decay_bcsh)(dsums_bhcq.at[..., -1].add(last_bhc))
    return gradient_bcsh


_ssd.defvjp(_forward, _backward)
