"""RMS norm over groups of channels as one Triton kernel per direction, for NVIDIA GPUs.

Axes: n tokens, c channels (of one group inside a kernel), r tokens per step, i blocks of tokens.

Tiling: the grid is (groups, blocks of tokens). A program walks over its block in steps of as many tokens as fit into
TILE elements of its group, at least one. Only the operands are saved. With u = x silu(z), m = mean(u²) + ε and
v = weight · dy,

    du = (v - u mean(u v) / m) / sqrt(m)        dweight = sum_n dy u / sqrt(m)
    dx = du silu(z)                             dz = du x silu'(z)
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.pallas_triton import both, call, inside, load, require_gpu, sigmoid, store
from orogen.kernels.rms_norm.reference import Reduce
from orogen.kernels.tiny import LEAST_EPSILON
from orogen.kernels.traced import traced_once

# The fastest of those tried on an H100 at 16,384 tokens of 8 groups of 512 channels and of one group of 2048.
TOKENS = 16  # per program
TILE = 2048  # elements per step, unless a group has more channels
WARPS = 4


class Launch(NamedTuple):
    """Tile sizes and how to run: a program takes `tokens` tokens in steps of `rows` tokens."""

    group_size: int
    epsilon: float
    tokens: int
    rows: int
    warps: int
    interpret: bool


def rms_norm_triton(
    x_nc: Array,
    weight_c: Array,
    gate_nc: Array | None,
    *,
    group_size: int,
    epsilon: float,
    reduce_sum: Reduce | None,
    interpret: bool = False,
) -> Array:
    """`rms_norm` on an NVIDIA GPU; `interpret` runs the same kernels anywhere, slowly.

    Differentiable once, in reverse mode only; the gradient repeats to the bit.
    Raises ValueError if there is no GPU and `interpret` is False, and if a group's channels lie on several ranks.
    """
    require_gpu(interpret=interpret)
    if reduce_sum is not None:
        raise ValueError("implementation='triton' normalises whole groups: expected 'plain' where ranks share one")
    rows = max(1, TILE // pl.next_power_of_2(group_size))
    launch = Launch(group_size, epsilon, max(TOKENS, rows), rows, WARPS, interpret)
    return _normalise(launch, x_nc, weight_c, gate_nc)  # pyright: ignore[reportReturnType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalise(launch: Launch, x_nc: Array, weight_c: Array, gate_nc: Array | None) -> Array:
    return _forward(launch, x_nc, weight_c, gate_nc)[0]


@traced_once("launch")
def _forward(launch, x_nc, weight_c, gate_nc):
    operands = {"x": x_nc, "weight": weight_c, "z": gate_nc}
    return _call(_forward_kernel, launch, operands, {"y": x_nc})["y"], (x_nc, weight_c, gate_nc)


@traced_once("launch")
def _backward(launch, operands, dy_nc):
    x_nc, weight_c, gate_nc = operands
    operands = {"x": x_nc, "weight": weight_c, "z": gate_nc, "dy": dy_nc}
    shares_ic = jax.ShapeDtypeStruct((pl.cdiv(len(x_nc), launch.tokens), len(weight_c)), jnp.float32)
    outputs = {"dx": x_nc, "dz": gate_nc, "dweight": shares_ic}
    results = _call(_backward_kernel, launch, operands, outputs)
    return results["dx"], results["dweight"].sum(0), results.get("dz")


_normalise.defvjp(_forward, _backward)


def _call(kernel, launch: Launch, operands: dict[str, Any], outputs: dict[str, Any]) -> dict[str, Array]:
    """The outputs by name. `outputs` holds, for each, an array of its shape and dtype; operands and outputs that are
    None are left out."""
    operands, outputs = ({k: v for k, v in arrays.items() if v is not None} for arrays in (operands, outputs))
    tokens, channels = operands["x"].shape
    width = pl.next_power_of_2(launch.group_size)
    groups = channels // launch.group_size
    # Groups have an axis of their own, so that the tile of one never reaches into the next.
    tile = pl.BlockSpec((tokens, None, width), lambda g, i: (0, g, 0))
    per_program = pl.BlockSpec((None, None, width), lambda g, i: (i, g, 0))
    vector = pl.BlockSpec((None, width), lambda g, i: (g, 0))
    split = lambda shape: (*shape[:-1], groups, launch.group_size)  # noqa: E731
    spec = lambda name: {"weight": vector, "dweight": per_program}.get(name, tile)  # noqa: E731
    results = call(
        functools.partial(kernel, launch=launch, tokens=tokens, names=(*operands, *outputs)),
        [array.reshape(split(array.shape)) for array in operands.values()],
        [spec(name) for name in operands],
        {name: (split(array.shape), array.dtype, spec(name)) for name, array in outputs.items()},
        grid=(groups, pl.cdiv(tokens, launch.tokens)),
        warps=launch.warps,
        interpret=launch.interpret,
    )
    return {name: array.reshape(outputs[name].shape) for name, array in results.items()}


def _steps(launch: Launch, tokens: int, width: int, body, carry) -> Any:
    """Runs body(rows, in_time, mask, carry) over the program's tokens; in_time: which of a step's tokens exist."""
    in_group = inside(jnp.arange(width), launch.group_size, width)
    first = pl.program_id(1) * launch.tokens

    def step(number: Array, carry):
        start = first + number * launch.rows
        in_time = inside(start + jnp.arange(launch.rows), tokens, launch.tokens)
        return body(pl.ds(start, launch.rows), in_time, both(in_time, in_group), carry)

    return lax.fori_loop(0, launch.tokens // launch.rows, step, carry)


def _read(ref, rows, mask: Array | None) -> Array:
    return load(ref.at[rows], mask).astype(jnp.float32)


def _scale(u_rc: Array, launch: Launch) -> Array:
    """1 / sqrt(m) of each token; scaled up first if ε is too small for tiny ones, see `kernels.tiny`."""
    if launch.epsilon >= LEAST_EPSILON:
        return lax.rsqrt(jnp.sum(u_rc * u_rc, axis=1) / launch.group_size + launch.epsilon)
    root = math.sqrt(launch.epsilon)
    size_r = jnp.maximum(jnp.sum(jnp.abs(u_rc), axis=1), root)
    size_r = jnp.where(size_r > 0, size_r, 1.0)
    larger_rc, root_r = u_rc / size_r[:, None], root / size_r
    return lax.rsqrt(jnp.sum(larger_rc * larger_rc, axis=1) / launch.group_size + root_r * root_r) / size_r


def _forward_kernel(*refs, launch: Launch, tokens: int, names: tuple[str, ...]):
    ref = dict(zip(names, refs, strict=True))
    width = ref["x"].shape[1]
    weight_c = load(ref["weight"], inside(jnp.arange(width), launch.group_size, width))

    def body(rows, _, mask, carry):
        u_rc = _read(ref["x"], rows, mask)
        if "z" in ref:
            z_rc = _read(ref["z"], rows, mask)
            u_rc *= z_rc * sigmoid(z_rc)
        scale_r = _scale(u_rc, launch)
        store(ref["y"].at[rows], u_rc * scale_r[:, None] * weight_c, mask)
        return carry

    _steps(launch, tokens, width, body, 0)


def _backward_kernel(*refs, launch: Launch, tokens: int, names: tuple[str, ...]):
    ref = dict(zip(names, refs, strict=True))
    width = ref["x"].shape[1]
    in_group = inside(jnp.arange(width), launch.group_size, width)
    weight_c = load(ref["weight"], in_group)

    def body(rows, in_time, mask, dweight_rc):
        x_rc, dy_rc = _read(ref["x"], rows, mask), _read(ref["dy"], rows, mask)
        u_rc = x_rc
        if "z" in ref:
            z_rc = _read(ref["z"], rows, mask)
            gate_rc = sigmoid(z_rc)
            silu_rc = z_rc * gate_rc
            u_rc = x_rc * silu_rc
        scale_r = _scale(u_rc, launch)
        # Tokens past the end are zeros, and without an epsilon their scale is infinite.
        scale_r = scale_r if in_time is None else jnp.where(in_time, scale_r, 0.0)
        v_rc = dy_rc * weight_c
        along_r = jnp.sum(u_rc * v_rc, axis=1) / launch.group_size * scale_r * scale_r
        du_rc = (v_rc - u_rc * along_r[:, None]) * scale_r[:, None]
        if "z" in ref:
            store(ref["dx"].at[rows], du_rc * silu_rc, mask)
            store(ref["dz"].at[rows], du_rc * x_rc * gate_rc * (1 + z_rc * (1 - gate_rc)), mask)
        else:
            store(ref["dx"].at[rows], du_rc, mask)
        return dweight_rc + dy_rc * u_rc * scale_r[:, None]

    dweight_rc = _steps(launch, tokens, width, body, jnp.zeros((launch.rows, width), jnp.float32))
    store(ref["dweight"], jnp.sum(dweight_rc, axis=0), in_group)
