"""Rounding beside another program, qwix. JAX's own scaled products do not run on CPU (jax 0.10.1)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orogen.config.rounded import Operand
from orogen.precision.rounding import encode

RNG = np.random.default_rng(5)
# Numbers of 8 bits: without its newer fusion emitters, which the tests switch off, XLA:CPU converts float32 to 8-bit
# formats by way of float16, and so rounds twice, here for qwix.
X = jnp.asarray(RNG.normal(size=(24, 64)) * np.exp(RNG.normal(size=(24, 1))), jnp.bfloat16)
FORMATS = {
    "mxfp8": (Operand(element="e4m3", scale="power", block=32), 32),
    "nvfp4": (Operand(element="e2m1", scale="two_level", block=16), 16),
}


def rounded(x, operand, block):
    largest = np.abs(x).max(keepdims=True)
    return jax.jit(encode, static_argnums=(1, 2))(x, operand, (1, block), largest)


@pytest.mark.peer
def test_numbers_are_those_of_qwix():
    """qwix has no scale per tensor for nvfp4: here it is 1."""
    qarray = pytest.importorskip("qwix._src.core.qarray", reason="needs qwix: pip install 'orogen[peer]'")
    for name, (operand, block) in FORMATS.items():
        x = np.array(X, np.float32)
        x[0, 0] = 2688
        how = qarray.HowToQuantize(qtype=name, channelwise_axes=(0,), tiled_axes={1: block})
        theirs = np.asarray(qarray.dequantize(qarray.quantize(jnp.asarray(x), how)))
        found = rounded(x, operand, block)
        mine = np.asarray(found.value) * float(found.scale.item())
        # Where they differ, x lies on the midpoint of both to the bits of float16.
        other = mine != theirs
        assert other.mean() < (0.001 if name == "mxfp8" else 0.01)
        np.testing.assert_allclose(x[other], ((mine + theirs) / 2)[other], rtol=2**-11, err_msg=name)
