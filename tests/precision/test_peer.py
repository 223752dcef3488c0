"""Rounding and products beside other programs: qwix, and JAX's own products with scaled blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orogen.config.rounded import Operand
from orogen.precision.rounding import encode

RNG = np.random.default_rng(5)
X, W = (RNG.normal(size=(n, 64)).astype(np.float32) * np.exp(RNG.normal(size=(n, 1))) for n in (24, 40))
X, W = X.astype(np.float32), W.astype(np.float32)
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
        x = X.copy()
        x[0, 0] = 2688
        how = qarray.HowToQuantize(qtype=name, channelwise_axes=(0,), tiled_axes={1: block})
        theirs = np.asarray(qarray.dequantize(qarray.quantize(jnp.asarray(x), how)))
        mine = rounded(x, operand, block)
        np.testing.assert_array_equal(np.asarray(mine.value) * float(mine.scale.item()), theirs, err_msg=name)


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_jax(name):
    """jax.nn.scaled_dot_general rounds both operands itself, and multiplies what it rounded."""
    operand, block = FORMATS[name]
    mine = [rounded(a, operand, block) for a in (X, W)]
    tensor = [{"global_scale": m.scale.reshape(())} if name == "nvfp4" else {} for m in mine]
    configs = [jax.nn.get_scaled_dot_general_config(name, **settings) for settings in tensor]
    configs.append(configs[0])  # of the gradient, which is not taken
    dims = (((1,), (1,)), ((), ()))
    theirs = jax.nn.scaled_dot_general(X, W, dims, configs=configs, preferred_element_type=jnp.float32)
    left, right = (np.asarray(m.value, np.float64) * float(m.scale.item()) for m in mine)
    np.testing.assert_allclose(theirs, left @ right.T, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
