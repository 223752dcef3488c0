"""Equal calls of a kernel are traced and lowered once, in both directions and under a remat policy.

Axes: b batch, t time, n tokens, k choices or taps, r rows, c channels, d width in, f width out, e groups.
"""

import functools
from unittest import mock

import jax
import pytest
from jax import numpy as jnp
from jax._src.pallas.triton import lowering as triton
from tests.kernels.lowering import kernels, lowered

from orogen.kernels.causal_conv1d import causal_conv1d
from orogen.kernels.grouped_matmul import grouped_matmul, mosaic
from orogen.kernels.permutation import sum_rows, take_rows
from orogen.kernels.rms_norm import rms_norm
from orogen.kernels.ssd import ssd
from orogen.precision.fp8 import fp8_matmul

TRITON = {"implementation": "triton"}
PLACES = {"slots_nk": jnp.zeros((4, 2), jnp.int32), "source_r": jnp.zeros(8, jnp.int32)}
# The operation, the shapes of its operands, and the number of its kernels forward and backward.
CASES = {
    "causal_conv1d": (functools.partial(causal_conv1d, activation="silu", **TRITON), [(1, 4, 3), (3, 2)], 2),
    "rms_norm": (functools.partial(rms_norm, group_size=4, epsilon=1e-5, **TRITON), [(3, 8), (8,), (3, 8)], 2),
    "take_rows": (functools.partial(take_rows, **PLACES, **TRITON), [(4, 8)], 2),
    "sum_rows": (functools.partial(sum_rows, **PLACES, **TRITON), [(8, 8), (4, 2)], 2),
    # Operands are rounded once forward, x and the weight, and the gradient once backward.
    "fp8_matmul": (lambda x, w: fp8_matmul(x, (w,), quantize="triton")[0], [(4, 8), (8, 3)], 3),
    "ssd": (
        lambda *operands: ssd(*operands, chunk_size=16, **TRITON)[0],
        [(1, 4, 2, 3), (1, 4, 2), (2,), (1, 4, 1, 5), (1, 4, 1, 5)],
        4,
    ),
}  # fmt: skip


def layers(run, policy):
    """The gradient of two layers, each under its own checkpoint, that run the same operation on other operands."""

    def loss(first, second):
        of_layer = lambda operands: jax.checkpoint(lambda *o: jnp.sin(run(*o)).sum(), policy=policy)(*operands)  # noqa: E731
        return of_layer(first) + of_layer(second)

    return jax.grad(loss, argnums=(0, 1))


def keeps_kernels(primitive, *_, **__):
    return primitive.name in ("pallas_call", "custom_vmap_call")


@pytest.mark.parametrize("name", CASES)
def test_equal_triton_kernels_are_lowered_once(name):
    run, shapes, number = CASES[name]
    first, second = ([jnp.ones(shape) + i for shape in shapes] for i in range(2))
    with mock.patch.object(triton, "lower_jaxpr_to_triton_module", wraps=triton.lower_jaxpr_to_triton_module) as lower:
        text = lowered(layers(run, keeps_kernels), first, second)
    assert kernels(text) == 2 * number
    assert lower.call_count == number


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Mosaic kernels need jax 0.11")
def test_equal_mosaic_kernels_are_the_same_bytes(monkeypatch):
    monkeypatch.setattr(mosaic, "_require_hopper", lambda: None)
    sizes_e = jnp.array([13, 0, 280], jnp.int32)
    run = lambda rows_nd, weights_edf: grouped_matmul(rows_nd, weights_edf, sizes_e, implementation="mosaic")  # noqa: E731
    first, second = ([jnp.full((300, 192), i, jnp.bfloat16), jnp.ones((3, 192, 256), jnp.bfloat16)] for i in range(2))
    text = lowered(layers(run, keeps_kernels), first, second)
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 6
    assert len({call.partition("backend_config = ")[2] for call in calls}) == 3
