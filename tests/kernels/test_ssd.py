"""What is Mamba-2's alone: float64 fixtures of the published scan, heads in groups, the skip, and the Triton kernels.

Axes: b batch, t time, h heads, p head size, g groups, n state.

The fixtures hold a numpy float64 recurrence and its hand-written adjoint, checked by finite differences, with the
options (softplus, bias and limits of dt, skip D) of the published model around it. What it shares with Mamba-1 is
tested in test_recurrences.
"""

import functools
import json
import pathlib

import chex
import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp
from tests.helpers import implementations
from tests.kernels.recurrences import CHUNK, SSD, Operands, assert_close, differentiate, segments
from tests.kernels.rounding import tolerance

from orogen.kernels.pallas_triton import tile
from orogen.kernels.ssd import IMPLEMENTATIONS, ssd, triton

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "ssd"
CASES = sorted(path.stem for path in FIXTURES.glob("*.npz"))
# Interpreted kernels take seconds each: of the others' sizes they equal the recurrence (test_recurrences), which equals
# the fixtures.
INTERPRETED = ("chunk5_odd", "packed")

every_implementation = pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))


class TestFixtures:
    """Outputs, final state and every gradient of the published model's scan."""

    @staticmethod
    def model(inputs: dict, *, segments_bt: Array, options: dict, chunk_size: int, implementation: str):
        dt_bth = inputs["dt"] + inputs.get("dt_bias", 0.0)
        dt_bth = jax.nn.softplus(dt_bth) if options["softplus"] else dt_bth
        dt_bth = jnp.clip(dt_bth, *(float(limit) for limit in options["lim"]))
        ops = Operands(inputs["x"], dt_bth, inputs["A"], inputs["B"], inputs["C"], inputs["S0"])
        y_bthp, final_bhpn = SSD.run(ops, segments_bt, chunk_size=chunk_size, implementation=implementation)
        return y_bthp + (inputs["D"][:, None] * inputs["x"] if "D" in inputs else 0.0), final_bhpn

    @pytest.mark.parametrize(
        "case, implementation",
        [
            pytest.param(case, *param.values, marks=param.marks)
            for case in CASES
            for param in implementations(IMPLEMENTATIONS)
            if param.values[0] != "triton_interpreted" or case in INTERPRETED
        ],
    )
    def test_equals_float64(self, case: str, implementation: str):
        summary = json.loads((FIXTURES / "summary.json").read_text())[case]
        arrays = np.load(FIXTURES / f"{case}.npz")
        inputs = {name[3:]: jnp.asarray(arrays[name]) for name in arrays if name.startswith("in_")}
        inputs.setdefault("S0", jnp.zeros(arrays["final_f64"].shape, jnp.float32))
        resets_bt = arrays["reset"] if "reset" in arrays else np.zeros(arrays["in_x"].shape[:2], np.int32)
        model = functools.partial(
            self.model,
            segments_bt=jnp.asarray(1 + np.cumsum(resets_bt, axis=1)),
            options=summary["opts"],
            chunk_size=summary["shape"]["chunk"],
            implementation=implementation,
        )
        results, gradient = jax.jit(functools.partial(differentiate, model))(inputs, (arrays["gy"], arrays["gfinal"]))
        limit = tolerance(jnp.float32, terms=summary["shape"]["T"] * summary["shape"]["N"])
        assert_close(results, (arrays["y_f64"], arrays["final_f64"]), limit)
        assert_close(gradient, {name: arrays[f"g{name}_f64"] for name in inputs}, limit)

    def test_are_there(self):
        assert len(CASES) >= 9


@every_implementation
class TestEveryImplementation:
    """What each must do by itself."""

    def test_neighbouring_heads_share_a_group(self, implementation: str):
        ops = SSD.operands(t=5, h=4, g=2)
        ops = ops._replace(b_bt=ops.b_bt.at[:, :, 0].set(0.0), initial_b=jnp.zeros_like(ops.initial_b))
        y_bthp, _ = SSD.run(ops, implementation=implementation)
        assert (np.abs(y_bthp).max((0, 1, 3)) > 0).tolist() == [False, False, True, True]

    def test_the_skip_adds_to_each_output_and_to_two_gradients(self, implementation: str):
        ops, segments_bt = SSD.operands(), segments((5, 12), t=29)
        skip_h, dy_bthp = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6)), jnp.float32)[0], ops.x_bt + 1

        def skipping(x_bthp: Array, skip_h: Array) -> Array:
            y_bthp, _ = ssd(
                x_bthp, *ops[1:5], segments_bt=segments_bt, skip_h=skip_h, chunk_size=CHUNK,
                implementation=implementation,
            )  # fmt: skip
            return y_bthp

        @jax.jit
        def both(x_bthp: Array, skip_h: Array):
            y_bthp, pullback = jax.vjp(skipping, x_bthp, skip_h)
            return y_bthp, *pullback(dy_bthp)

        (y, dx, dskip), (plain, dplain, _) = both(ops.x_bt, skip_h), both(ops.x_bt, jnp.zeros(6))
        limit = tolerance(jnp.float32, terms=ops.products())
        assert_close(y, plain + skip_h[:, None] * ops.x_bt, limit)
        assert_close(dx, dplain + skip_h[:, None] * dy_bthp, limit)
        assert_close(dskip, jnp.einsum("bthp,bthp->h", ops.x_bt, dy_bthp), limit)


@pytest.mark.parametrize("implementation", implementations({"triton", "triton_interpreted"}))
class TestTriton:
    """What only the Triton kernels do."""

    @pytest.mark.parametrize("chunk_size", [16, 128])
    def test_bfloat16_products_and_float32_sums(self, implementation: str, chunk_size: int):
        """Chunks of one tile, and of several in each direction."""
        ops, segments_bt = SSD.operands(t=150, h=4, g=2, p=20, n=17), segments((50, 50), t=150)
        half = jax.tree.map(lambda o: o.astype(jnp.bfloat16), ops)._replace(initial_b=ops.initial_b)
        single = jax.tree.map(lambda o: o.astype(jnp.float32), half)
        got, want = (
            SSD.outcome(o, segments_bt, implementation=i, chunk_size=chunk_size)
            for o, i in ((half, implementation), (single, "recurrence"))
        )
        assert got[0][1].dtype == jnp.float32
        # Every product has two rounded operands, and every result is rounded once more.
        assert_close(got, want, tolerance(jnp.bfloat16, terms=3))

    @pytest.mark.parametrize("dt", [(1e-12, 1e-9), (50.0, 1e4), (1e-9, 1e4)], ids=["tiny", "huge", "both"])
    def test_extreme_steps_in_bfloat16(self, implementation: str, dt: tuple[float, float]):
        """Whose decays have dt in their exponents; a step of none is among them."""
        ops, segments_bt = SSD.operands(dt=dt), segments((5, 12), t=29)
        ops = ops._replace(dt_bt=ops.dt_bt.at[:, ::7].set(0.0))
        half = jax.tree.map(lambda o: o.astype(jnp.bfloat16), ops)._replace(initial_b=ops.initial_b)
        single = jax.tree.map(lambda o: o.astype(jnp.float32), half)
        got, want = (
            SSD.outcome(o, segments_bt, implementation=i) for o, i in ((half, implementation), (single, "recurrence"))
        )
        assert_close(got, want, tolerance(jnp.bfloat16, terms=3))

    def test_gradient_repeats_to_the_bit(self, implementation: str):
        ops, segments_bt = SSD.operands(), segments((5, 12), t=29)
        first, second = (SSD.outcome(ops, segments_bt, implementation=implementation) for _ in range(2))
        chex.assert_trees_all_equal(first, second)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("head_size", [64, 80, 256, 512])
def test_a_wide_heads_states_fit_into_shared_memory(head_size: int, half: bool):
    """Of an H100's multiprocessor: x and dy of a chunk, the rows of two states, and B and C beside them, unbuffered."""
    launch = triton._launch(256, (2, 8192, 8, head_size), 128, half=half, interpret=True)
    numbers = 2 * (launch.width + launch.far_states) * tile(head_size) + 2 * launch.width * launch.far_states
    assert numbers * (2 if half else 4) <= 232_448
    assert min(launch.width, launch.far_states) >= 16


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_triton_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="implementation='triton' needs a GPU and finds 'cpu'"):
        SSD.run(SSD.operands(), implementation="triton")
