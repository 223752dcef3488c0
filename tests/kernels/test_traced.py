"""Equal calls of a kernel are traced and lowered once, in both directions and under a remat policy.

Axes: n tokens, d width in, f width out, e groups.
"""

from unittest import mock

import jax
import pytest
from jax import numpy as jnp
from jax._src.pallas.triton import lowering as triton
from tests.kernels.calls import NAMES, calls
from tests.kernels.lowering import kernels, lowered

from orogen.kernels.grouped_matmul import grouped_matmul, mosaic


def layers(run, policy):
    """The gradient of two layers, each under its own checkpoint, that run the same operation on other operands."""

    def loss(first, second):
        of_layer = lambda operands: jax.checkpoint(lambda *o: jnp.sin(run(*o)).sum(), policy=policy)(*operands)  # noqa: E731
        return of_layer(first) + of_layer(second)

    return jax.grad(loss, argnums=(0, 1))


def keeps_kernels(primitive, *_, **__):
    return primitive.name in ("pallas_call", "custom_vmap_call")


@pytest.mark.parametrize("name", NAMES)
def test_equal_triton_kernels_are_lowered_once(name):
    run, shapes, number = calls("triton")[name]
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
