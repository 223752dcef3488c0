"""One token's step of both recurrences in one Triton kernel, for NVIDIA GPUs: the state is read once, written once.

Axes: b batch, h heads, p head size, g groups, n state, i channels (of a head, or all of Mamba-1's).

Tiling: the grid is (blocks of channels, heads, batch); Mamba-1 has one head of all channels. A program holds ELEMENTS
numbers of a state, or the n numbers of one channel if that is more: enough to keep 16-byte loads in flight in every
thread, and few enough that a single sequence with 64 heads occupies every multiprocessor of an H100. Programs of
inactive sequences neither read nor write the state.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import both, call, inside, load, require_gpu, store
from orogen.kernels.state_blocks import BLOCK, INVERSE, LARGEST, Blocks, count
from orogen.kernels.state_update.operands import Operands, SelectiveOperands
from orogen.kernels.stochastic import random_bits, to_float16

ELEMENTS = 2048  # of the state per program
WARPS = 4


class Sizes(NamedTuple):
    """Channels and state size of a head, and how many channels a program takes (`block`)."""

    channels: int
    state: int
    block: int


def ssm_update_triton(o: Operands, *, interpret: bool = False) -> tuple[Array, Any]:
    """`ssm_update` on an NVIDIA GPU; `interpret` runs the same kernel anywhere, slowly.

    Raises ValueError if there is no GPU and `interpret` is False.
    """
    heads, (groups, state) = o.x_bhp.shape[1], o.b_bgn.shape[1:]
    sizes, per_group, wide = _sizes(o.x_bhp.shape[2], state), heads // groups, pl.next_power_of_2(state)
    of_group = pl.BlockSpec((None, None, wide), lambda i, h, b: (b, h // per_group, 0))
    of_head = pl.BlockSpec((None,), lambda i, h, b: (h,))
    of_state = lambda width: pl.BlockSpec((None, None, sizes.block, width), lambda i, h, b: (b, h, i, 0))  # noqa: E731
    operands = {
        **_stored(o.state_bhpn, of_state, wide),
        "x": (o.x_bhp, pl.BlockSpec((None, None, sizes.block), lambda i, h, b: (b, h, i))),
        "dt": (o.dt_bh, pl.BlockSpec((None, None), lambda i, h, b: (b, h))),
        "a": (o.a_h, of_head),
        "b": (o.b_bgn, of_group),
        "c": (o.c_bgn, of_group),
        "skip": (o.skip_h, of_head),
    }
    return _call(operands, o.active_b, o.seeds_b2, sizes, heads=heads, interpret=interpret)


def selective_update_triton(o: SelectiveOperands, *, interpret: bool = False) -> tuple[Array, Any]:
    """`selective_update` on an NVIDIA GPU, as `ssm_update_triton`."""
    state = o.B_bn.shape[1]
    sizes, wide = _sizes(o.x_bi.shape[1], state), pl.next_power_of_2(state)
    of_channels = pl.BlockSpec((None, sizes.block), lambda i, h, b: (b, i))
    of_row = pl.BlockSpec((None, wide), lambda i, h, b: (b, 0))
    of_state = lambda width: pl.BlockSpec((None, sizes.block, width), lambda i, h, b: (b, i, 0))  # noqa: E731
    operands = {
        **_stored(o.state_bin, of_state, wide),
        "x": (o.x_bi, of_channels),
        "dt": (o.dt_bi, of_channels),
        "a": (o.A_in, pl.BlockSpec((sizes.block, wide), lambda i, h, b: (i, 0))),
        "b": (o.B_bn, of_row),
        "c": (o.C_bn, of_row),
    }
    return _call(operands, o.active_b, o.seeds_b2, sizes, heads=1, interpret=interpret)


def _stored(state_b: Array | Blocks, of_state: Callable[[int], Any], wide: int) -> dict[str, tuple[Array, Any]]:
    """The arrays of a state with their blocks: its numbers and, of int8, its scales."""
    if not isinstance(state_b, Blocks):
        return {"state": (state_b, of_state(wide))}
    scales = pl.next_power_of_2(count(state_b.values.shape[-1]))
    return {"state": (state_b.values, of_state(wide)), "scales": (state_b.scales, of_state(scales))}


def _sizes(channels: int, state: int) -> Sizes:
    block = max(1, ELEMENTS // pl.next_power_of_2(state))
    return Sizes(channels, state, min(block, pl.next_power_of_2(channels)))


def _call(
    operands: dict[str, tuple[Array, Any]], active_b: Array, seeds_b2: Array | None, sizes: Sizes, *, heads: int,
    interpret: bool,
) -> tuple[Array, Any]:  # fmt: skip
    require_gpu(interpret=interpret)
    of_row = pl.BlockSpec((None,), lambda i, h, b: (b,))
    operands = {**operands, "active": (active_b.astype(jnp.int32), of_row)}
    if seeds_b2 is not None:
        operands |= {f"seed{k}": (seeds_b2[:, k], of_row) for k in range(2)}
    kept = [name for name in ("state", "scales") if name in operands]
    of = lambda name: (operands[name][0].shape, operands[name][0].dtype, operands[name][1])  # noqa: E731
    outputs = {"y": of("x"), **{f"new_{name}": of(name) for name in kept}}
    results = call(
        functools.partial(_kernel, names=(*operands, *outputs), sizes=sizes),
        [array for array, _ in operands.values()],
        [spec for _, spec in operands.values()],
        outputs,
        grid=(pl.cdiv(sizes.channels, sizes.block), heads, len(active_b)),
        warps=WARPS,
        in_place={f"new_{name}": list(operands).index(name) for name in kept},
        interpret=interpret,
    )
    state = [results[f"new_{name}"] for name in kept]
    return results["y"], Blocks(*state) if len(state) > 1 else state[0]


def _kernel(*refs, names: tuple[str, ...], sizes: Sizes):
    ref = dict(zip(names, refs, strict=True))
    channels, wide = ref["state"].shape
    channel_i = pl.program_id(0) * channels + jnp.arange(channels)
    in_i = inside(channel_i, sizes.channels, channels)
    in_n = inside(jnp.arange(wide), sizes.state, wide)
    # Outside `pl.when`, because the interpreter does not know the program's index inside.
    first_of_head = pl.program_id(1) * sizes.channels
    active = ref["active"][...] != 0

    @pl.when(active)
    def _():
        read = lambda name, mask: load(ref[name], mask).astype(jnp.float32)  # noqa: E731
        state_in, x_i = read("state", both(in_i, in_n)), read("x", in_i)
        if "scales" in ref:
            column = lambda k: load(ref["scales"].at[:, pl.ds(k, 1)], both(in_i, None))  # noqa: E731
            state_in *= _spread([column(k) for k in range(count(sizes.state))], wide)
        b_n, c_n = read("b", in_n), read("c", in_n)
        if "skip" in ref:  # Mamba-2: one step and one rate per head
            dt, of_dt = ref["dt"][...], ref["dt"][...]
            a, skip_i = ref["a"][...], ref["skip"][...] * x_i
        else:
            dt = read("dt", in_i)
            of_dt, a, skip_i = dt[:, None], read("a", both(in_i, in_n)), 0.0
        state_in = jnp.exp(of_dt * a) * state_in + (dt * x_i)[:, None] * b_n[None, :]
        store(ref["y"], jnp.sum(state_in * c_n[None, :], axis=1) + skip_i, in_i)
        if "seed0" in ref:
            element_in = (first_of_head + channel_i)[:, None] * sizes.state + jnp.arange(wide)
            bits_in = random_bits((ref["seed0"][...], ref["seed1"][...]), element_in)
            if "scales" in ref:
                held_in = state_in if in_n is None else jnp.where(in_n[None, :], state_in, 0.0)
                state_in, scales = _in_blocks(held_in, bits_in, count(sizes.state))
                for k, scale_i1 in enumerate(scales):
                    store(ref["new_scales"].at[:, pl.ds(k, 1)], scale_i1, both(in_i, None))
            else:
                state_in = to_float16(state_in, bits_in)
        store(ref["new_state"], state_in, both(in_i, in_n))

    @pl.when(~active)
    def _():
        store(ref["y"], jnp.zeros(channels), in_i)


def _spread(parts: Sequence[Array], wide: int) -> Array:
    """Numbers (i, 1) per block as (i, n): each for the block's columns. Of one block: (i, 1)."""
    spread = parts[0]
    for k, part_i1 in enumerate(parts[1:], 1):
        spread = jnp.where(jnp.arange(wide)[None, :] >= k * BLOCK, part_i1, spread)
    return spread


def _in_blocks(state_in: Array, bits_in: Array, blocks: int) -> tuple[Array, list[Array]]:
    """`state_blocks.encode` of a tile, whose masked numbers are 0: whole numbers, and the scales (i, 1) by block."""
    wide = state_in.shape[1]
    size_in = jnp.abs(state_in)
    finite_in, column_n = size_in < jnp.inf, jnp.arange(wide)
    found, spoilt = [], []
    for k in range(blocks):
        mine_in = (column_n >= k * BLOCK)[None, :] & (column_n < (k + 1) * BLOCK)[None, :]
        found.append(jnp.max(jnp.where(mine_in & finite_in, size_in, 0.0), axis=1)[:, None] * INVERSE)
        spoilt.append(jnp.sum(jnp.where(mine_in & ~finite_in, 1.0, 0.0), axis=1)[:, None])
    scale_in, spoilt_in = _spread(found, wide), _spread(spoilt, wide) > 0
    steps_in = state_in / jnp.where(scale_in > 0, scale_in, 1.0)
    below_in = jnp.floor(steps_in)
    uniform_in = (bits_in >> np.uint32(8)).astype(jnp.float32) * 2.0**-24
    whole_in = below_in + (uniform_in < steps_in - below_in).astype(jnp.float32)
    whole_in = jnp.minimum(jnp.maximum(whole_in, -float(LARGEST)), float(LARGEST))
    scales = [jnp.where(bad_i1 > 0, jnp.nan, scale_i1) for bad_i1, scale_i1 in zip(spoilt, found, strict=True)]
    return jnp.where(spoilt_in, 1.0, whole_in).astype(jnp.int32), scales
