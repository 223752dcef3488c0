"""One decoding step of Mamba-2, with float32, float16 and int8 states, and of Mamba-1, at the sizes of R1.

Letters: b batch, h heads, p head size, g groups, n state; of Mamba-1: i channels (h p), m state.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from orogen.bench.layers import carried, draws, errors_of_layers
from orogen.bench.operation import Operation, Shape, Work, not_finite
from orogen.bench.timing import Program
from orogen.kernels.state_blocks import Blocks, count, decode, encode
from orogen.kernels.state_update import IMPLEMENTATIONS, selective_update, ssm_update

# Enough layers that each layer's state has left an H100's cache (50 MB) before its next turn.
R1 = {"b": 1, "h": 64, "p": 64, "g": 8, "n": 128, "m": 16, "layers": 64}
SHAPES: dict[str, Shape] = {"b1": R1, "b64": {**R1, "b": 64, "layers": 2}, "b256": {**R1, "b": 256, "layers": 2}}
WORKS = ("ssm", "ssm_float16", "ssm_int8", "selective")


class Operands(NamedTuple):
    """Per layer, the inputs of each update (activations in bfloat16, the rest in float32) and its state; and the bits
    that round float16 and int8 states."""

    ssm: tuple[tuple[Array, ...], ...]
    selective: tuple[tuple[Array, ...], ...]
    ssm_states: tuple[Array, ...]
    selective_states: tuple[Array, ...]
    seeds_b2: Array


def draw(shape: Shape, seed: int) -> Operands:
    """Random operands; step sizes and decay rates are distributed as after initialisation."""
    b, h, p, g, n, m, layers = (shape[key] for key in ("b", "h", "p", "g", "n", "m", "layers"))
    draw_one = draws(seed)
    half = lambda *size: draw_one(*size).astype(jnp.bfloat16)  # noqa: E731
    steps = lambda *size: jax.nn.softplus(1.5 * draw_one(*size) - 3)  # noqa: E731
    rates = lambda *size: -jnp.exp(draw_one(*size))  # noqa: E731
    i = h * p
    return Operands(
        tuple((half(b, h, p), steps(b, h), rates(h), half(b, g, n), half(b, g, n)) for _ in range(layers)),
        tuple((half(b, i), steps(b, i), rates(i, m), half(b, m), half(b, m)) for _ in range(layers)),
        tuple(draw_one(b, h, p, n) for _ in range(layers)),
        tuple(draw_one(b, i, m) for _ in range(layers)),
        jax.random.bits(jax.random.key(seed), (b, 2), jnp.uint32),
    )


def works(shape: Shape) -> dict[str, Work]:
    """Each state is read and written once; five FLOPs per number of it."""
    b, h, p, g, n, m, layers = (shape[key] for key in ("b", "h", "p", "g", "n", "m", "layers"))
    tokens, i = b * layers, h * p
    state, inputs = i * n, 2 * 2 * i + 4 * h + 2 * 2 * g * n
    selective = Work(
        5.0 * tokens * i * m, tokens * (2 * 4 * i * m + 2 * 2 * i + 4 * i + 2 * 2 * m) + 4 * layers * i * m
    )
    sizes = 4, 2, 1 + 4 * count(n) / n
    ssm = [Work(5.0 * tokens * state, tokens * (2 * size * state + inputs)) for size in sizes]
    return dict(zip(WORKS, (*ssm, selective), strict=True))


def ours(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """Our programs, over all layers: each layer updates its own state in place."""
    del shape

    def ssm(states: Any, layers: Any, seeds_b2: Array | None = None) -> Any:
        return _each(
            lambda inputs, state: ssm_update(
                *inputs, state_bhpn=state, seeds_b2=seeds_b2, implementation=implementation
            ), states, layers,
        )  # fmt: skip

    def selective(states: Any, layers: Any) -> Any:
        return _each(
            lambda inputs, state: selective_update(*inputs, state_bin=state, implementation=implementation),
            states, layers,
        )  # fmt: skip

    half = tuple(state.astype(jnp.float16) for state in operands.ssm_states)
    return {
        "ssm": carried(ssm, operands.ssm_states, operands.ssm),
        "ssm_float16": carried(ssm, half, operands.ssm, operands.seeds_b2),
        "ssm_int8": carried(ssm, _in_blocks(operands), operands.ssm, operands.seeds_b2),
        "selective": carried(selective, operands.selective_states, operands.selective),
    }


def _in_blocks(operands: Operands) -> tuple[Blocks, ...]:
    return tuple(jax.jit(encode)(state) for state in operands.ssm_states)


def _each(update: Any, states: Any, layers: Any) -> tuple[Any, Any]:
    """The outputs and the new states of all layers."""
    results = [update(inputs, state) for inputs, state in zip(layers, states, strict=True)]
    return tuple(y for y, _ in results), tuple(state for _, state in results)


def check(shape: Shape, operands: Operands, results: dict[str, Any]) -> dict[str, float]:
    """Errors of outputs and states against one step in float32, of int8 states against the reference's, which is
    rounded with the same bits; each is the largest over layers."""
    del shape
    halves = tuple(state.astype(jnp.float16) for state in operands.ssm_states)
    references = {
        "ssm": (_exact_ssm, operands.ssm, operands.ssm_states),
        "ssm_float16": (_exact_ssm, operands.ssm, halves),
        "selective": (_exact_selective, operands.selective, operands.selective_states),
    }
    errors: dict[str, float] = {}
    y, states = results["ssm_int8"]
    blocks = ((*pair, operands.seeds_b2) for pair in zip(operands.ssm, _in_blocks(operands), strict=True))
    errors |= errors_of_layers("ssm_int8", ("y", "state"), _exact_int8, blocks, (y, tuple(map(decode, states))))
    for work, (exact, layers, states) in references.items():
        errors |= errors_of_layers(work, ("y", "state"), exact, zip(layers, states, strict=True), results[work])
    return {**errors, "not_finite": not_finite(results)}


@jax.jit
def _exact_ssm(inputs: tuple[Any, ...], state: Array) -> tuple[Array, Array]:
    return ssm_update(*inputs, state_bhpn=state, implementation="reference")


@jax.jit
def _exact_int8(inputs: tuple[Any, ...], state: Blocks, seeds_b2: Array) -> tuple[Array, Array]:
    y_bhp, after = ssm_update(*inputs, state_bhpn=state, seeds_b2=seeds_b2, implementation="reference")
    return y_bhp, decode(after)


@jax.jit
def _exact_selective(inputs: tuple[Any, ...], state: Array) -> tuple[Array, Array]:
    return selective_update(*inputs, state_bin=state, implementation="reference")


OPERATION = Operation(
    name="state_update", shapes=SHAPES, implementations=tuple(IMPLEMENTATIONS), draw=draw, works=works, ours=ours,
    check=check,
)  # fmt: skip
