"""Where kernels' results are kept, recomputation finds them: the forward kernel of an operation runs once.

A policy of `jax.checkpoint` sees the operations of a function's own derivative rule, but not into another function with
such a rule that it calls.

Axes: b batch, t time, n tokens, k choices or taps, r rows, c channels, d width.
"""

import functools

import jax
import pytest
from jax import numpy as jnp

from orogen.kernels.causal_conv1d import causal_conv1d
from orogen.kernels.permutation import sum_rows, take_rows
from orogen.kernels.rms_norm import rms_norm
from orogen.kernels.ssd import ssd
from orogen.precision.fp8 import fp8_matmul

TRITON = {"implementation": "triton_interpreted"}
PLACES = {"slots_nk": jnp.zeros((4, 2), jnp.int32), "source_r": jnp.zeros(8, jnp.int32)}
CASES = {
    "causal_conv1d": (functools.partial(causal_conv1d, activation="silu", **TRITON), [(1, 4, 3), (3, 2)], 2),
    "rms_norm": (functools.partial(rms_norm, group_size=4, epsilon=1e-5, **TRITON), [(3, 8), (8,), (3, 8)], 2),
    "take_rows": (functools.partial(take_rows, **PLACES, **TRITON), [(4, 8)], 2),
    "sum_rows": (functools.partial(sum_rows, **PLACES, **TRITON), [(8, 8), (4, 2)], 2),
    # Operands are rounded once forward, x and the weight, and the gradient once backward.
    "fp8_matmul": (lambda x, w: fp8_matmul(x, (w,), quantize="triton_interpreted")[0], [(4, 8), (8, 3)], 3),
    # Backward it walks once, looks at pairs once and at states once.
    "ssd": (
        lambda *operands: ssd(*operands, chunk_size=16, **TRITON)[0],
        [(1, 4, 2, 3), (1, 4, 2), (2,), (1, 4, 1, 5), (1, 4, 1, 5)],
        4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_forward_kernel_runs_once(name: str):
    run, shapes, kernels = CASES[name]
    # Sine reads what the kernel gives, also backward.
    loss = lambda operands: jnp.sin(run(*operands)).sum()  # noqa: E731
    gradient = jax.grad(jax.checkpoint(loss, policy=lambda primitive, *_, **__: primitive.name == "pallas_call"))
    program = str(jax.make_jaxpr(gradient)([jnp.ones(shape) for shape in shapes]))
    assert program.count("pallas_call[") == kernels
