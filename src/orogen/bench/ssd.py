"""The Mamba-2 recurrence and its gradients, at the sizes of Nemotron-3 Nano and Super and others.

Letters: b batch, t time, h heads, p head size, g groups, n state, c tokens per chunk.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.bench.operation import MissingError, Operation, Shape, Work, largest_errors, not_finite
from orogen.bench.timing import Program, compiled
from orogen.kernels.ssd import IMPLEMENTATIONS, ssd

NANO = {"b": 2, "t": 8192, "h": 64, "p": 64, "g": 8, "n": 128, "c": 128}
SHAPES: dict[str, Shape] = {
    "nano": NANO,
    "super": {**NANO, "h": 128},
    "h96_p80_g1": {**NANO, "h": 96, "p": 80, "g": 1},
    "h96_p80_g8_c256": {**NANO, "h": 96, "p": 80, "c": 256},
}
PIECE = 256  # the reference keeps the states of so many tokens at once
OPERANDS = ("x", "dt", "a", "B", "C")
PEER_MODULE, PEER_FUNCTION = "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"

Operands = tuple[Array, Array, Array, Array, Array, Array]  # x, dt, a, B, C, and the outputs' gradient


def draw(shape: Shape, seed: int) -> Operands:
    """x, B, C and the outputs' gradient in bfloat16; step sizes and decay rates as after initialisation, in float32."""
    b, t, h, p, g, n = (shape[key] for key in "bthpgn")
    rng = np.random.default_rng(seed)
    keys = jax.random.split(jax.random.key(seed), 4)
    normal = lambda key, *size: jax.random.normal(key, (b, t, *size), jnp.bfloat16)  # noqa: E731
    dt_bth = jnp.asarray(np.log1p(np.exp(rng.normal(size=(b, t, h)) * 1.5 - 3)), jnp.float32)
    a_h = jnp.asarray(-rng.uniform(1, 16, h), jnp.float32)
    x_bthp, grad_bthp = normal(keys[0], h, p), normal(keys[1], h, p)
    return x_bthp, dt_bth, a_h, normal(keys[2], g, n), normal(keys[3], g, n), grad_bthp


def works(shape: Shape) -> dict[str, Work]:
    """FLOPs per chunk: the causal half of C·B and of its product with x, and the products that read and update the
    state. The gradients take twice as many."""
    b, t, h, p, g, n, c = (shape[key] for key in "bthpgnc")
    chunk = min(c, t)
    flops = 2.0 * b * t * ((g * n + h * p) * chunk / 2 + 2 * h * p * n)
    inputs, outputs = b * t * (2 * h * p + 4 * h + 2 * 2 * g * n), b * t * 2 * h * p
    return {"forward": Work(flops, inputs + outputs), "forward_backward": Work(3 * flops, 2 * (inputs + outputs))}


def ours(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """Our programs: outputs, and outputs with the gradients of x, dt, a, B and C."""

    def forward(*inputs: Array) -> Array:
        return ssd(*inputs, chunk_size=shape["c"], implementation=implementation)[0]  # pyright: ignore

    def both(*operands: Array) -> tuple[Array, ...]:
        *inputs, grad_bthp = operands
        y_bthp, back = jax.vjp(forward, *inputs)
        return y_bthp, *back(grad_bthp)

    return {"forward": compiled(forward, *operands[:-1]), "forward_backward": compiled(both, *operands)}


def peer(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """mamba_ssm's Triton kernels on the same arrays, without softplus, bias and skip. Raises MissingError."""
    del implementation
    try:
        function = getattr(importlib.import_module(PEER_MODULE), PEER_FUNCTION)
    except ImportError as error:
        raise MissingError(f"{PEER_MODULE} cannot be imported: {error}; expected mamba_ssm on PYTHONPATH") from None
    import torch  # pyright: ignore[reportMissingImports]

    from orogen.bench.torch_programs import to_torch, torch_program

    *inputs, grad = (to_torch(array) for array in operands)
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def forward() -> Any:
        return function(*inputs, shape["c"])

    def both() -> Any:
        y = forward()
        return y, *torch.autograd.grad(y, inputs, grad)

    return {"forward": torch_program(forward), "forward_backward": torch_program(both, gradient=True)}


def check(shape: Shape, operands: Operands, results: dict[str, Any]) -> dict[str, float]:
    """Errors against the float32 recurrence, each the largest over groups (a group's heads are compared together)."""
    names = ("forward", "forward_again", *(f"gradient_{name}" for name in OPERANDS))
    every = results["forward"], *results["forward_backward"]
    groups = shape["g"]
    errors = largest_errors(names, (_group(operands, every, group, groups=groups) for group in range(groups)))
    return {**errors, "not_finite": not_finite(results)}


@functools.partial(jax.jit, static_argnames="groups")
def _group(operands: Operands, results: tuple[Array, ...], group: Array, *, groups: int) -> Any:
    """The results of one group, and those of the recurrence."""

    def of_group(array: Array) -> Array:
        axis = min(2, array.ndim - 1)  # the axis of heads or groups: the only one of the decay rates, else the third
        size = array.shape[axis] // groups
        return lax.dynamic_slice_in_dim(array, group * size, size, axis)

    y_bthp, *gradients = _exact(*map(of_group, operands))
    return tuple(map(of_group, results)), (y_bthp, y_bthp, *gradients)


def _exact(*operands: Array) -> tuple[Array, ...]:
    """y and the gradients of x, dt, a, B, C by the float32 recurrence, which recomputes its states piece by piece."""
    *inputs, grad_bthp = (operand.astype(jnp.float32) for operand in operands)
    time = inputs[0].shape[1]
    piece = next(size for size in range(min(PIECE, time), 0, -1) if time % size == 0)
    split = lambda a: jnp.moveaxis(a.reshape(a.shape[0], -1, piece, *a.shape[2:]), 1, 0)  # noqa: E731

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, tokens, a_h):
        x_bthp, dt_bth, b_btgn, c_btgn = tokens
        y_bthp, state = ssd(
            x_bthp, dt_bth, a_h, b_btgn, c_btgn, initial_state_bhpn=state, chunk_size=1, implementation="recurrence"
        )
        return state, y_bthp

    def run(x_bthp, dt_bth, a_h, b_btgn, c_btgn):
        b, _, h, p = x_bthp.shape
        state_bhpn = jnp.zeros((b, h, p, b_btgn.shape[-1]), jnp.float32)
        pieces = tuple(map(split, (x_bthp, dt_bth, b_btgn, c_btgn)))
        y = lax.scan(lambda state, tokens: step(state, tokens, a_h), state_bhpn, pieces)[1]
        return jnp.moveaxis(y, 0, 1).reshape(x_bthp.shape)

    with jax.default_matmul_precision("highest"):
        y_bthp, back = jax.vjp(run, *inputs)
        return y_bthp, *back(grad_bthp)


OPERATION = Operation(
    name="ssd", shapes=SHAPES, implementations=tuple(IMPLEMENTATIONS), draw=draw, works=works, ours=ours,
    peers=("mamba_ssm",), peer=peer, check=check,
)  # fmt: skip
