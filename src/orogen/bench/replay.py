"""Mamba-2 decoding by replay, and its flush, at the sizes of R1.

Letters: b batch, t new tokens, l entries of the ring, c entries in use, h heads, p head size, g groups, n state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from orogen.bench.layers import carried, draws, errors_of_layers
from orogen.bench.operation import Operation, Shape, Work, not_finite
from orogen.bench.timing import Program
from orogen.config.checks import ConfigError
from orogen.kernels.replay import IMPLEMENTATIONS, Ring, flush, replay

# The ring is half full, its average; as many layers as in `state_update`.
R1 = {"b": 1, "t": 1, "l": 16, "c": 8, "h": 64, "p": 64, "g": 8, "n": 128, "layers": 64}
SHAPES: dict[str, Shape] = {
    "b1": R1,
    "b64": {**R1, "b": 64, "layers": 2},
    "b256": {**R1, "b": 256, "layers": 2},
    "b64_drafts": {**R1, "b": 64, "t": 4, "layers": 2},
}


class Operands(NamedTuple):
    """Per layer: state and decay rates (float32), ring and piece (activations in bfloat16), C; and shared cursors."""

    states: tuple[Array, ...]
    rates: tuple[Array, ...]
    rings: tuple[Ring, ...]
    pieces: tuple[Ring, ...]
    c: tuple[Array, ...]
    cursor_b: Array


def draw(shape: Shape, seed: int) -> Operands:
    """Random operands; step sizes and decay rates are distributed as after initialisation."""
    b, t, entries, h, p, g, n, layers = (shape[key] for key in ("b", "t", "l", "h", "p", "g", "n", "layers"))
    draw_one = draws(seed)
    half = lambda *size: draw_one(*size).astype(jnp.bfloat16)  # noqa: E731

    def inputs(count: int) -> Ring:
        dt_bth = jax.nn.softplus(1.5 * draw_one(b, count, h) - 3)
        return Ring(half(b, count, h, p), half(b, count, g, n), dt_bth)

    every = range(layers)
    return Operands(
        tuple(draw_one(b, h, p, n) for _ in every),
        tuple(-jnp.exp(draw_one(h)) for _ in every),
        tuple(inputs(entries) for _ in every),
        tuple(inputs(t) for _ in every),
        tuple(half(b, t, g, n) for _ in every),
        jnp.full(b, shape["c"], jnp.int32),
    )


def works(shape: Shape) -> dict[str, Work]:
    """A replay reads the state, the entries in use, the piece and C, and writes the piece and y. A flush reads the
    entries in use, and reads and writes the state. Raises ConfigError if the piece does not fit into the ring."""
    b, t, entries, c, h, p, g, n = (shape[key] for key in "btlchpgn")
    if not c + t <= entries:
        raise ConfigError(f"l={entries}; expected at least c + t = {c + t} entries")
    states, state, token, c_and_y = b * shape["layers"], h * p * n, 2 * h * p + 2 * g * n + 4 * h, 2 * (h * p + g * n)
    # Each new token takes a product with the state; each pair with an earlier token, B . C once per group and x once.
    pairs = t * c + t * (t + 1) / 2
    flops, read = 2.0 * t * state + 2 * pairs * (g * n + h * p), 4 * state + c * token
    replayed = Work(states * flops, states * (read + t * (2 * token + c_and_y)))
    return {"replay": replayed, "flush": Work(3.0 * states * c * state, states * (2 * 4 * state + c * token))}


def ours(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """Our programs, over all layers: each layer overwrites its own ring, or its own state."""
    del shape
    states, rates, rings, pieces, c, cursor_b = operands

    def run_replay(rings: Any, layers: Any, cursor_b: Array) -> Any:
        results = [
            replay(piece, a_h, c_btgn, state_bhpn=state, ring=ring, cursor_b=cursor_b, implementation=implementation)
            for ring, (state, a_h, piece, c_btgn) in zip(rings, layers, strict=True)
        ]
        return tuple(y for y, _ in results), tuple(ring for _, ring in results)

    def run_flush(states: Any, rings: Any, rates: Any, cursor_b: Array) -> Any:
        results = [
            flush(ring, a_h, cursor_b, state_bhpn=state, implementation=implementation)
            for state, ring, a_h in zip(states, rings, rates, strict=True)
        ]
        return results[0][1], tuple(state for state, _ in results)

    return {
        "replay": carried(run_replay, rings, tuple(zip(states, rates, pieces, c, strict=True)), cursor_b),
        "flush": carried(run_flush, states, rings, rates, cursor_b),
    }


def check(shape: Shape, operands: Operands, results: dict[str, Any]) -> dict[str, float]:
    """Errors of outputs, rings and states against the float32 recurrence; each is the largest over layers."""
    del shape
    states, rates, rings, pieces, c, cursor_b = operands
    y, after = results["replay"]
    layers = zip(states, rates, pieces, c, strict=True)
    found = y, *zip(*after, strict=True)
    every = ((ring, layer, cursor_b) for ring, layer in zip(rings, layers, strict=True))
    errors = errors_of_layers("replay", ("y", "x", "b", "dt"), _exact_replay, every, found)
    every = zip(rings, states, rates, strict=True)
    errors |= errors_of_layers(
        "flush", ("state",), _exact_flush, ((*layer, cursor_b) for layer in every), (results["flush"][1],)
    )
    return {**errors, "not_finite": not_finite(results)}


@jax.jit
def _exact_replay(ring: Ring, layer: tuple[Any, ...], cursor_b: Array) -> Any:
    state, a_h, piece, c_btgn = layer
    return replay(piece, a_h, c_btgn, state_bhpn=state, ring=ring, cursor_b=cursor_b, implementation="recurrence")


@jax.jit
def _exact_flush(ring: Ring, state: Array, a_h: Array, cursor_b: Array) -> Array:
    return flush(ring, a_h, cursor_b, state_bhpn=state, implementation="recurrence")[0]


OPERATION = Operation(
    name="replay", shapes=SHAPES, implementations=tuple(IMPLEMENTATIONS), draw=draw, works=works, ours=ours,
    check=check,
)  # fmt: skip
