"""Where kernels' results are kept, recomputation finds them: the forward kernel of an operation runs once.

A policy of `jax.checkpoint` sees the operations of a function's own derivative rule, but not into another function with
such a rule that it calls.
"""

import jax
import pytest
from jax import numpy as jnp
from tests.kernels.calls import NAMES, calls


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_kernel_runs_once(name: str):
    run, shapes, kernels = calls("triton_interpreted")[name]
    # Sine reads what the kernel gives, also backward.
    loss = lambda operands: jnp.sin(run(*operands)).sum()  # noqa: E731
    gradient = jax.grad(jax.checkpoint(loss, policy=lambda primitive, *_, **__: primitive.name == "pallas_call"))
    program = str(jax.make_jaxpr(gradient)([jnp.ones(shape) for shape in shapes]))
    assert program.count("pallas_call[") == kernels
