"""One token's step of both recurrences in one Triton kernel, for NVIDIA GPUs: the state is read once, written once.

Axes: b batch, h heads, p head size, g groups, n state, i channels (of a head, or all of Mamba-1's).

Tiling: the grid is (blocks of channels, heads, batch); Mamba-1 has one head of all channels. A program holds ELEMENTS
numbers of a state, or the n numbers of one channel if that is more: enough to keep 16-byte loads in flight in every
thread, and few enough that a single sequence with 64 heads occupies every multiprocessor of an H100. Programs of
inactive sequences neither read nor write the state.
"""

import functools
from typing import Any, NamedTuple

from jax import Array
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import both, call, inside, load, require_gpu, store
from orogen.kernels.state_update.operands import Operands, SelectiveOperands
from orogen.kernels.stochastic import random_bits, to_float16

ELEMENTS = 2048  # of the state per program
WARPS = 4


class Sizes(NamedTuple):
    """Channels and state size of a head, and how many channels a program takes (`block`)."""

    channels: int
    state: int
    block: int


def ssm_update_triton(o: Operands, *, interpret: bool = False) -> tuple[Array, Array]:
    """`ssm_update` on an NVIDIA GPU; `interpret` runs the same kernel anywhere, slowly.

    Raises ValueError if there is no GPU and `interpret` is False.
    """
    heads, (groups, state) = o.x_bhp.shape[1], o.b_bgn.shape[1:]
    sizes, per_group, wide = _sizes(o.x_bhp.shape[2], state), heads // groups, pl.next_power_of_2(state)
    of_group = pl.BlockSpec((None, None, wide), lambda i, h, b: (b, h // per_group, 0))
    of_head = pl.BlockSpec((None,), lambda i, h, b: (h,))
    operands = {
        "state": (o.state_bhpn, pl.BlockSpec((None, None, sizes.block, wide), lambda i, h, b: (b, h, i, 0))),
        "x": (o.x_bhp, pl.BlockSpec((None, None, sizes.block), lambda i, h, b: (b, h, i))),
        "dt": (o.dt_bh, pl.BlockSpec((None, None), lambda i, h, b: (b, h))),
        "a": (o.a_h, of_head),
        "b": (o.b_bgn, of_group),
        "c": (o.c_bgn, of_group),
        "skip": (o.skip_h, of_head),
    }
    return _call(operands, o.active_b, o.seeds_b2, sizes, heads=heads, interpret=interpret)


def selective_update_triton(o: SelectiveOperands, *, interpret: bool = False) -> tuple[Array, Array]:
    """`selective_update` on an NVIDIA GPU, as `ssm_update_triton`."""
    state = o.B_bn.shape[1]
    sizes, wide = _sizes(o.x_bi.shape[1], state), pl.next_power_of_2(state)
    of_channels = pl.BlockSpec((None, sizes.block), lambda i, h, b: (b, i))
    of_row = pl.BlockSpec((None, wide), lambda i, h, b: (b, 0))
    operands = {
        "state": (o.state_bin, pl.BlockSpec((None, sizes.block, wide), lambda i, h, b: (b, i, 0))),
        "x": (o.x_bi, of_channels),
        "dt": (o.dt_bi, of_channels),
        "a": (o.A_in, pl.BlockSpec((sizes.block, wide), lambda i, h, b: (i, 0))),
        "b": (o.B_bn, of_row),
        "c": (o.C_bn, of_row),
    }
    return _call(operands, o.active_b, o.seeds_b2, sizes, heads=1, interpret=interpret)


def _sizes(channels: int, state: int) -> Sizes:
    block = max(1, ELEMENTS // pl.next_power_of_2(state))
    return Sizes(channels, state, min(block, pl.next_power_of_2(channels)))


def _call(
    operands: dict[str, tuple[Array, Any]], active_b: Array, seeds_b2: Array | None, sizes: Sizes, *, heads: int,
    interpret: bool,
) -> tuple[Array, Array]:  # fmt: skip
    require_gpu(interpret=interpret)
    of_row = pl.BlockSpec((None,), lambda i, h, b: (b,))
    operands = {**operands, "active": (active_b.astype(jnp.int32), of_row)}
    if seeds_b2 is not None:
        operands |= {f"seed{k}": (seeds_b2[:, k], of_row) for k in range(2)}
    (state_b, state_spec), (x_b, x_spec) = operands["state"], operands["x"]
    outputs = {"y": (x_b.shape, x_b.dtype, x_spec), "new_state": (state_b.shape, state_b.dtype, state_spec)}
    results = call(
        functools.partial(_kernel, names=(*operands, *outputs), sizes=sizes),
        [array for array, _ in operands.values()],
        [spec for _, spec in operands.values()],
        outputs,
        grid=(pl.cdiv(sizes.channels, sizes.block), heads, len(active_b)),
        warps=WARPS,
        in_place={"new_state": list(operands).index("state")},
        interpret=interpret,
    )
    return results["y"], results["new_state"]


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
            state_in = to_float16(state_in, random_bits((ref["seed0"][...], ref["seed1"][...]), element_in))
        store(ref["new_state"], state_in, both(in_i, in_n))

    @pl.when(~active)
    def _():
        store(ref["y"], jnp.zeros(channels), in_i)
