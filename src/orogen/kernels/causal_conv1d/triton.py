"""The causal convolution and its activation as one Triton kernel per direction, for NVIDIA GPUs.

Axes: b batch, t time, c channels, k taps, i blocks of tokens.

Tiling: the grid is (tiles of channels, blocks of TOKENS tokens, batch). A program walks over its block token by token
and holds the last k inputs of its channels in registers, so that every input is read once. In the backward pass it
walks in the same direction and holds the gradients of the last inputs, to which later tokens still add. The
activation's input is recomputed: only the operands are saved.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.experimental import pallas as pl

from orogen.kernels.causal_conv1d.operands import Operands
from orogen.kernels.pallas_triton import call, inside, load, require_gpu, sigmoid, store
from orogen.kernels.traced import traced_once

# The fastest of those tried on an H100 at 2 x 8192 tokens of 4096 and 1024 channels.
TOKENS = 64  # per program
STEP = 4  # tokens whose inputs are loaded before the first is used
COLUMNS = 512
WARPS = 4


class Launch(NamedTuple):
    """Tile sizes and how to run."""

    activation: str
    tokens: int
    step: int
    columns: int
    warps: int
    interpret: bool


def causal_conv1d_triton(o: Operands, *, activation: str, interpret: bool = False) -> Array:
    """`causal_conv1d` on an NVIDIA GPU; `interpret` runs the same kernels anywhere, slowly.

    Differentiable once, in reverse mode only; the gradient repeats to the bit. A halo is copied in front of the row.
    Raises ValueError if there is no GPU and `interpret` is False.
    """
    require_gpu(interpret=interpret)
    before, channels = o.w_ck.shape[1] - 1, o.x_btc.shape[2]
    x_btc, reach_bt = o.x_btc, o.reach_bt
    if o.halo_bkc is not None:
        x_btc = jnp.concatenate([o.halo_bkc, x_btc], axis=1)
        # The halo's own outputs are not read.
        reach_bt = jnp.pad(reach_bt, ((0, 0), (before, 0)))
    columns = min(COLUMNS, pl.next_power_of_2(channels))
    launch = Launch(activation, TOKENS, STEP, columns, WARPS, interpret)
    y_btc: Any = _convolve(launch, x_btc, o.w_ck.T, o.bias_c, reach_bt)  # pyright: ignore[reportGeneralTypeIssues]
    return y_btc if o.halo_bkc is None else y_btc[:, before:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(launch: Launch, x_btc: Array, w_kc: Array, bias_c: Array, reach_bt: Array) -> Array:
    return _forward(launch, x_btc, w_kc, bias_c, reach_bt)[0]


@traced_once("launch")
def _forward(launch, x_btc, w_kc, bias_c, reach_bt):
    outputs = {"y": (x_btc.shape, x_btc.dtype, _specs(launch, x_btc, w_kc)[0])}
    operands = (x_btc, w_kc, bias_c, reach_bt)
    return _call(_forward_kernel, launch, operands, outputs)["y"], operands


@traced_once("launch")
def _backward(launch, operands, dy_btc):
    x_btc, w_kc, _, _ = operands
    batch, time, channels = x_btc.shape
    blocks, taps = pl.cdiv(time, launch.tokens), len(w_kc)
    x_spec = _specs(launch, x_btc, w_kc)[0]
    outputs = {
        "dx": (x_btc.shape, x_btc.dtype, x_spec),
        "dw": (
            (batch, blocks, taps + 1, channels),
            jnp.float32,
            pl.BlockSpec((None, None, taps + 1, launch.columns), lambda c, i, b: (b, i, 0, c)),
        ),
    }
    results = _call(_backward_kernel, launch, (*operands, dy_btc), outputs)
    # Each program's share of the gradient of the weights; the last row is that of the bias.
    dw_kc = jnp.sum(results["dw"], axis=(0, 1))
    return results["dx"], dw_kc[:taps], dw_kc[taps], None


_convolve.defvjp(_forward, _backward)


def _specs(launch: Launch, x_btc: Array, w_kc: Array) -> list[pl.BlockSpec]:
    """The blocks of x, weights, bias and reach."""
    time, columns = x_btc.shape[1], launch.columns
    return [
        pl.BlockSpec((None, time, columns), lambda c, i, b: (b, 0, c)),
        pl.BlockSpec((len(w_kc), columns), lambda c, i, b: (0, c)),
        pl.BlockSpec((columns,), lambda c, i, b: (c,)),
        pl.BlockSpec((None, time), lambda c, i, b: (b, 0)),
    ]


def _call(kernel, launch: Launch, operands: tuple[Array, ...], outputs: dict[str, Any]) -> dict[str, Array]:
    x_btc, w_kc = operands[:2]
    batch, time, channels = x_btc.shape
    specs = _specs(launch, x_btc, w_kc)
    kernel = functools.partial(kernel, launch=launch, time=time, channels=channels)
    grid = (pl.cdiv(channels, launch.columns), pl.cdiv(time, launch.tokens), batch)
    return call(
        kernel, operands, [*specs, specs[0]][: len(operands)], outputs, grid=grid, warps=launch.warps,
        interpret=launch.interpret,
    )  # fmt: skip


class _Taps(NamedTuple):
    """A program's weights (k vectors of its channels, the last one the current token's), bias, and reaches."""

    weights: list[Array]
    bias: Array
    reach_ref: Any
    time: int

    def inputs(self, t: Array, past: tuple[Array, ...]) -> list[Array]:
        """What each tap of token t reads from the `past` k inputs, oldest first: zero beyond the token's reach."""
        reach = self.reach_ref[jnp.minimum(t, self.time - 1)]
        before = len(past) - 1
        return [jnp.where(reach >= before - k, x_c, 0.0) for k, x_c in enumerate(past[:-1])] + [past[-1]]

    def sum(self, inputs: list[Array]) -> Array:
        """bias + Σ_k w_k x_k, the current token first."""
        terms = [w_c * x_c for w_c, x_c in zip(self.weights, inputs, strict=True)]
        return functools.reduce(jnp.add, reversed(terms)) + self.bias

    def visit(self, t: Array, past: tuple[Array, ...], open_: tuple[Array, ...], dy_c: Array, activation: str):
        """What token t's taps read, its sum's gradient, and the gradients of the inputs up to t (k)."""
        inputs = self.inputs(t, past)
        dsum_c = dy_c
        if activation == "silu":
            sum_c = self.sum(inputs)
            gate_c = sigmoid(sum_c)
            dsum_c = dy_c * gate_c * (1 + sum_c * (1 - gate_c))
        dsum_c = jnp.where(t < self.time, dsum_c, 0.0)
        reached = self.inputs(t, (dsum_c,) * len(past))
        before = zip((*open_, jnp.zeros_like(dsum_c)), self.weights, reached, strict=True)
        return inputs, dsum_c, tuple(d_c + w_c * r_c for d_c, w_c, r_c in before)


def _taps(w_ref, bias_ref, reach_ref, in_columns, time: int) -> _Taps:
    weights = [load(w_ref.at[np.int32(k)], in_columns) for k in range(w_ref.shape[0])]
    return _Taps(weights, load(bias_ref, in_columns), reach_ref, time)


def _block(launch: Launch, time: int, channels: int) -> tuple[Array, Array | None]:
    """The program's first token, and the mask of the columns that exist."""
    columns = pl.program_id(0) * launch.columns + jnp.arange(launch.columns)
    return pl.program_id(1) * launch.tokens, inside(columns, channels, launch.columns)


def _read(ref, t: Array, in_columns: Array | None) -> Array:
    """Token t's values in float32; if there is no such token, another's, which must not be used."""
    t = jnp.clip(t, 0, ref.shape[0] - 1)
    return load(ref.at[t], in_columns).astype(jnp.float32)


def _stored(mask: Array | None, condition: Array, columns: int) -> Array:
    condition_c = jnp.broadcast_to(condition, (columns,))
    return condition_c if mask is None else condition_c & mask


def _forward_kernel(x_ref, w_ref, bias_ref, reach_ref, y_ref, *, launch: Launch, time: int, channels: int):
    first, in_columns = _block(launch, time, channels)
    taps = _taps(w_ref, bias_ref, reach_ref, in_columns, time)
    before = len(taps.weights) - 1

    def step(number: Array, past: tuple[Array, ...]) -> tuple[Array, ...]:
        start = first + number * launch.step
        rows = [_read(x_ref, start + u, in_columns) for u in range(launch.step)]
        for u, x_c in enumerate(rows):
            past = (*past, x_c)
            sum_c = taps.sum(taps.inputs(start + u, past))
            y_c = sum_c * sigmoid(sum_c) if launch.activation == "silu" else sum_c
            store(
                y_ref.at[jnp.minimum(start + u, time - 1)], y_c, _stored(in_columns, start + u < time, launch.columns)
            )
            past = past[1:]
        return past

    past = tuple(_read(x_ref, first - before + k, in_columns) for k in range(before))
    lax.fori_loop(0, launch.tokens // launch.step, step, past)


def _backward_kernel(
    x_ref, w_ref, bias_ref, reach_ref, dy_ref, dx_ref, dw_ref, *, launch: Launch, time: int, channels: int
):
    first, in_columns = _block(launch, time, channels)
    taps = _taps(w_ref, bias_ref, reach_ref, in_columns, time)
    before = len(taps.weights) - 1

    def close(t: Array, dx_c: Array) -> None:
        """Stores the gradient of input t, if it is one of this program's."""
        mine = (t >= first) & (t < time)
        store(dx_ref.at[jnp.clip(t, 0, time - 1)], dx_c, _stored(in_columns, mine, launch.columns))

    def step(number: Array, carry: tuple) -> tuple:
        past, open_, dw = carry
        start = first + number * launch.step
        rows = [(_read(x_ref, start + u, in_columns), _read(dy_ref, start + u, in_columns)) for u in range(launch.step)]
        for u, (x_c, dy_c) in enumerate(rows):
            past = (*past, x_c)
            inputs, dsum_c, dpast = taps.visit(start + u, past, open_, dy_c, launch.activation)
            close(start + u - before, dpast[0])
            dw = tuple(d_c + dsum_c * i_c for d_c, i_c in zip(dw, [*inputs, jnp.ones_like(dsum_c)], strict=True))
            past, open_ = past[1:], dpast[1:]
        return past, open_, dw

    past = tuple(_read(x_ref, first - before + k, in_columns) for k in range(before))
    zero_c = jnp.zeros(launch.columns, jnp.float32)
    carry = past, (zero_c,) * before, (zero_c,) * (before + 2)
    past, open_, dw = lax.fori_loop(0, launch.tokens // launch.step, step, carry)
    # The next program's first tokens read this one's last inputs.
    end = first + launch.tokens
    for k in range(before):
        t = end + k
        past = (*past, _read(x_ref, t, in_columns))
        _, _, dpast = taps.visit(t, past, open_, _read(dy_ref, t, in_columns), launch.activation)
        close(t - before, dpast[0])
        past, open_ = past[1:], dpast[1:]
    for k, dw_c in enumerate(dw):
        store(dw_ref.at[np.int32(k)], dw_c, in_columns)
