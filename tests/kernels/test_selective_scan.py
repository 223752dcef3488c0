"""What is Mamba-1's alone: float64 fixtures of the published scan, and the memory of the backward pass.

Axes: b batch, t time, i channels, n state.

The fixtures hold state-spaces/mamba's selective scan in float64, with softplus, bias of dt and skip D around it. What
it shares with Mamba-2 is tested in test_recurrences.
"""

import functools
import pathlib

import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp
from tests.kernels.recurrences import SELECTIVE_SCAN, assert_close, differentiate
from tests.kernels.rounding import tolerance

from orogen.kernels.selective_scan import IMPLEMENTATIONS, selective_scan

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "selscan"


class TestFixtures:
    """Outputs, final state and every gradient of the published scan."""

    @staticmethod
    def model(inputs: dict, *, chunk_size: int, implementation: str) -> tuple[Array, Array]:
        x_bti, dt_bti, B_btn, C_btn = (jnp.swapaxes(inputs[name], 1, 2) for name in ("u", "delta", "B", "C"))
        dt_bti = jax.nn.softplus(dt_bti + inputs["delta_bias"])
        y_bti, final_bin = selective_scan(
            x_bti, dt_bti, inputs["A"], B_btn, C_btn, chunk_size=chunk_size, implementation=implementation
        )
        return jnp.swapaxes(y_bti + inputs["D"] * x_bti, 1, 2), final_bin

    @pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
    @pytest.mark.parametrize("case, chunk_size", [("var", 4), ("var", 64), ("t65", 16)])
    def test_equals_float64(self, case: str, chunk_size: int, implementation: str):
        arrays = np.load(FIXTURES / f"{case}.npz")
        inputs = {name[3:]: jnp.asarray(arrays[name]) for name in arrays if name.startswith("in_")}
        model = functools.partial(self.model, chunk_size=chunk_size, implementation=implementation)
        results, gradient = jax.jit(functools.partial(differentiate, model))(inputs, (arrays["gy"], arrays["gfinal"]))
        limit = tolerance(jnp.float32, terms=arrays["in_u"].shape[2] * arrays["in_A"].shape[1])
        assert_close(results, (arrays["y_f64"], arrays["final_f64"]), limit)
        assert_close(gradient, {name: arrays[f"g{name}_f64"] for name in inputs}, limit)


def test_the_backward_pass_keeps_one_state_per_chunk():
    """What the gradient holds at once: entering states and a chunk's own, not one state per token."""
    b, t, i, n = 1, 400, 64, 16
    ops = SELECTIVE_SCAN.operands(b=b, t=t, i=i, n=n)

    def peak(implementation: str) -> int:
        loss = lambda o: jnp.sum(SELECTIVE_SCAN.run(o, implementation=implementation, chunk_size=20)[0])  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(ops).compile().memory_analysis().temp_size_in_bytes

    state = 4 * b * i * n
    assert peak("reference") > 2 * t * state
    assert peak("chunked") < 4 * 20 * state + 6 * ops.x_bt.nbytes
