"""Causal attention within packed documents, and its gradients.

Letters: b batch, t time, h query heads, g key heads, k head size, r query heads per key head.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.bench.operation import MissingError, Operation, Shape, Work, largest_errors, not_finite
from orogen.bench.timing import Program, compiled
from orogen.config.checks import ConfigError
from orogen.kernels.attention import IMPLEMENTATIONS, attention

# documents: the number of equally long documents per sequence, or their lengths joined by +.
NANO = {"b": 2, "t": 8192, "h": 32, "g": 2, "k": 128}
SHAPES: dict[str, Shape] = {
    "nano": {**NANO, "documents": "1"},
    "nano_8": {**NANO, "documents": "8"},
    "nano_32": {**NANO, "documents": "32"},
    "nano_8191_1": {**NANO, "documents": "8191+1"},
}


class Operands(NamedTuple):
    """Bfloat16 queries, keys, values and the outputs' gradient; int32 segments from 1."""

    q_bthk: Array
    k_btgk: Array
    v_btgk: Array
    segments_bt: Array
    grad_bthk: Array


def lengths(shape: Shape) -> list[int]:
    """Lengths of a sequence's documents. Raises ConfigError if they do not fill the sequence."""
    time, text = shape["t"], shape["documents"]
    parts = text.split("+")
    if all(part.isdecimal() for part in parts):
        found = [int(part) for part in parts]
        if len(found) == 1 and found[0] and time % found[0] == 0:
            return [time // found[0]] * found[0]
        if sum(found) == time and all(found):
            return found
    raise ConfigError(
        f"documents={text}; expected a divisor of t={time}, or lengths such as {time - 1}+1 with sum {time}"
    )


def draw(shape: Shape, seed: int) -> Operands:
    """Random operands; all sequences have the same documents."""
    b, t, h, g, k = (shape[key] for key in "bthgk")
    keys = jax.random.split(jax.random.key(seed), 4)
    normal = lambda key, heads: jax.random.normal(key, (b, t, heads, k), jnp.bfloat16)  # noqa: E731
    segments_t = np.repeat(np.arange(1, len(lengths(shape)) + 1, dtype=np.int32), lengths(shape))
    segments_bt = jnp.asarray(np.broadcast_to(segments_t, (b, t)))
    return Operands(normal(keys[0], h), normal(keys[1], g), normal(keys[2], g), segments_bt, normal(keys[3], h))


def works(shape: Shape) -> dict[str, Work]:
    """Four FLOPs per visible pair, head and unit of the head size; the gradients, which recompute the scores, take 2.5
    times as many. A causal document of n tokens counts n² / 2 pairs."""
    b, t, h, g, k = (shape[key] for key in "bthgk")
    flops = 4.0 * b * h * k * sum(n * n / 2 for n in lengths(shape))
    # Bytes of q, k, v and y; with the gradients also of dy, dq, dk, dv, and of y once more, which is read again.
    moved = 2.0 * b * t * k * np.array([2 * h + 2 * g, 5 * h + 4 * g])
    return {"forward": Work(flops, moved[0]), "forward_backward": Work(3.5 * flops, moved[1])}


def ours(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """Our programs: outputs, and outputs with the gradients of q, k and v."""
    scale = shape["k"] ** -0.5

    def forward(q_bthk: Array, k_btgk: Array, v_btgk: Array, segments_bt: Array) -> Array:
        return attention(
            q_bthk, k_btgk, v_btgk, segments_bt=segments_bt, scale=scale, implementation=implementation
        )  # fmt: skip

    def both(q_bthk: Array, k_btgk: Array, v_btgk: Array, segments_bt: Array, grad_bthk: Array) -> Any:
        y_bthk, back = jax.vjp(lambda q, k, v: forward(q, k, v, segments_bt), q_bthk, k_btgk, v_btgk)
        return y_bthk, *back(grad_bthk)

    return {"forward": compiled(forward, *operands[:4]), "forward_backward": compiled(both, *operands)}


def peer(shape: Shape, operands: Operands, implementation: str) -> dict[str, Program]:
    """torch's scaled_dot_product_attention on the same numbers, in its own layout (heads before time).

    Raises MissingError for packed documents, which it does not support, and where torch lacks the kernel.
    """
    if len(lengths(shape)) > 1:
        raise MissingError("torch's scaled_dot_product_attention has no argument for documents")
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    from orogen.bench.torch_programs import to_torch, torch_program

    backend = getattr(SDPBackend, implementation.upper())
    inputs = (operands.q_bthk, operands.k_btgk, operands.v_btgk)
    q, k, v = (to_torch(a).transpose(1, 2).contiguous().requires_grad_() for a in inputs)
    grad = to_torch(operands.grad_bthk).transpose(1, 2).contiguous()

    def forward() -> Any:
        with sdpa_kernel([backend]):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def both() -> Any:
        y = forward()
        return y, *torch.autograd.grad(y, (q, k, v), grad)

    try:
        forward()
    except RuntimeError as error:
        raise MissingError(f"torch's {implementation} cannot run here: {error}") from None
    made = {"forward": torch_program(forward), "forward_backward": torch_program(both, gradient=True)}
    turn = lambda result: jax.tree.map(lambda a: jnp.swapaxes(a, 1, 2), result)  # noqa: E731
    return {name: p._replace(read=lambda result, p=p: turn(p.read(result))) for name, p in made.items()}


def check(shape: Shape, operands: Operands, results: dict[str, Any]) -> dict[str, float]:
    """Errors against float32 attention with all scores, each the largest over sequences and key heads (a key head is
    compared together with its query heads)."""
    names = ("forward", "forward_again", "gradient_q", "gradient_k", "gradient_v")
    every = results["forward"], *results["forward_backward"]
    pairs = itertools.product(range(shape["b"]), range(shape["g"]))
    errors = largest_errors(names, (_part(operands, every, row, head) for row, head in pairs))
    return {**errors, "not_finite": not_finite(results)}


@jax.jit
def _part(operands: Operands, results: tuple[Array, ...], row: Array, head: Array) -> Any:
    """The results of one sequence and key head, and those of attention with all scores."""
    groups = operands.k_btgk.shape[2]

    def of_head(array: Array) -> Array:
        size = array.shape[2] // groups
        return lax.dynamic_slice_in_dim(lax.dynamic_slice_in_dim(array, row, 1), head * size, size, 2)

    q_1trk, k_1t1k, v_1t1k, grad_1trk = (of_head(a).astype(jnp.float32) for a in (*operands[:3], operands.grad_bthk))
    segments_1t = lax.dynamic_slice_in_dim(operands.segments_bt, row, 1)
    y_1trk, *gradients = _exact(q_1trk, k_1t1k, v_1t1k, segments_1t, grad_1trk)
    return tuple(map(of_head, results)), (y_1trk, y_1trk, *gradients)


def _exact(q_1trk: Array, k_1t1k: Array, v_1t1k: Array, segments_1t: Array, grad_1trk: Array) -> tuple[Array, ...]:
    """y, dq (1, t, r, k), dk, dv (1, t, 1, k) in float32, one query head at a time: each has t² scores."""
    run = partial(attention, segments_bt=segments_1t, scale=q_1trk.shape[-1] ** -0.5, implementation="full")
    by_head = lambda a: jnp.moveaxis(a, 2, 0)[:, :, :, None]  # noqa: E731

    def one(sums, inputs):
        q_1t1k, grad_1t1k = inputs
        y_1t1k, back = jax.vjp(run, q_1t1k, k_1t1k, v_1t1k)
        dq_1t1k, *shared = back(grad_1t1k)
        return jax.tree.map(jnp.add, sums, tuple(shared)), (y_1t1k[:, :, 0], dq_1t1k[:, :, 0])

    with jax.default_matmul_precision("highest"):
        zeros = (jnp.zeros_like(k_1t1k), jnp.zeros_like(v_1t1k))
        (dk_1t1k, dv_1t1k), (y_r1tk, dq_r1tk) = lax.scan(one, zeros, (by_head(q_1trk), by_head(grad_1trk)))
    return jnp.moveaxis(y_r1tk, 0, 2), jnp.moveaxis(dq_r1tk, 0, 2), dk_1t1k, dv_1t1k


OPERATION = Operation(
    name="attention", shapes=SHAPES, implementations=tuple(IMPLEMENTATIONS), draw=draw, works=works, ours=ours,
    peers=("cudnn_attention", "flash_attention"), peer=peer, check=check,
)  # fmt: skip
