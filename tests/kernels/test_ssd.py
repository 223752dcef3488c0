"""The Mamba-2 recurrence: every implementation against float64 fixtures, by hand, and against the others.

Axes: b batch, t time, h heads, p head size, g groups, n state.

The fixtures hold a numpy float64 recurrence and its hand-written adjoint, checked by finite differences, with the
options (softplus, bias and limits of dt, skip D) of the published model around it.
"""

import functools
import json
import math
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from tests.helpers import implementations

from orogen.kernels.ssd import IMPLEMENTATIONS, ssd, triton
from orogen.kernels.ssd.triton_kernels import tile

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "ssd"
CASES = sorted(path.stem for path in FIXTURES.glob("*.npz"))
CHUNK = 8
TIME = 43
# Documents of a row of 43 tokens, the rest of it padding: boundaries at a chunk border, one before and one after,
# documents of one token, and one over three chunks.
LENGTHS = {"around_the_border": (7, 1, 1, 8, 6, 15), "at_the_border": (8, 17, 1, 14), "one_token_each": (1,) * 9}

# Compiling takes far longer than running at these sizes; the test inside shard_map compiles in full.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


every_implementation = pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))


class Operands(NamedTuple):
    """What `ssd` is differentiated by."""

    x_bthp: Array
    dt_bth: Array
    a_h: Array
    b_btgn: Array
    c_btgn: Array
    initial_bhpn: Array


def tolerance(dtype, *, products: int) -> float:
    """Error allowed relative to the largest element, for sums of so many products: rounding grows as the root."""
    return 4 * float(jnp.finfo(dtype).eps) * math.sqrt(products)


def assert_close(got, want, limit: float) -> None:
    """Every leaf within `limit` of the reference's largest element; a leaf of zeros must be zero."""
    jax.tree.map(functools.partial(_assert_leaf_close, limit), got, want)


def _assert_leaf_close(limit: float, got, want) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    # A decay is at least about the smallest normal number: what sums of a few make of it a CPU flushes, a GPU keeps.
    kept = 8 * float(jnp.finfo(jnp.float32).tiny) if jax.default_backend() == "gpu" else 0.0
    assert np.abs(got - want).max() <= limit * np.abs(want).max() + kept


def operands(*, b=2, t=29, h=6, p=3, g=3, n=5, dt=(1e-3, 0.5), seed=0) -> Operands:
    rng = np.random.default_rng(seed)
    steps_bth = np.exp(rng.uniform(*np.log(dt), (b, t, h)))
    draws = (
        rng.normal(size=(b, t, h, p)),
        steps_bth,
        -rng.uniform(1, 16, h),
        rng.normal(size=(b, t, g, n)),
        rng.normal(size=(b, t, g, n)),
        rng.normal(size=(b, h, p, n)),
    )
    return Operands(*(jnp.asarray(draw, jnp.float32) for draw in draws))


def segments(lengths: tuple[int, ...], *, t: int = TIME, b: int = 2) -> Array:
    """Documents of these lengths and padding after them; the second row holds them in reverse."""
    rows = [np.repeat(np.arange(1, len(lengths) + 1), order) for order in (lengths, lengths[::-1])]
    return jnp.asarray([np.pad(rows[i % 2], (0, t - sum(lengths))) for i in range(b)])


Outcome = tuple[tuple[Array, Array], Operands]


def run(ops: Operands, segments_bt=None, *, implementation: str, chunk_size: int = CHUNK) -> tuple[Array, Array]:
    return ssd(
        *ops[:5],
        segments_bt=segments_bt,
        initial_state_bhpn=ops.initial_bhpn,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def differentiate(function, operands, weights=None) -> Outcome:
    """Both results of function(operands), and the gradient of their sums weighted by `weights`, random if None."""
    results, pullback = jax.vjp(function, operands)
    if weights is None:
        rng = np.random.default_rng(1)
        weights = tuple(jnp.asarray(rng.normal(size=r.shape), r.dtype) for r in results)
    return results, *pullback(weights)


@functools.partial(quick_jit, static_argnames=("implementation", "chunk_size"))
def outcome(ops: Operands, segments_bt: Array, *, implementation: str, chunk_size: int = CHUNK) -> Outcome:
    return differentiate(lambda o: run(o, segments_bt, implementation=implementation, chunk_size=chunk_size), ops)


@functools.partial(quick_jit, static_argnames="implementation")
def read(ops: Operands, segments_bt: Array, weights_t: Array, *, implementation: str) -> tuple[Array, Operands]:
    """The outputs summed with a weight a token, and its gradient."""
    return jax.value_and_grad(
        lambda o: jnp.einsum("bthp,t->", run(o, segments_bt, implementation=implementation)[0], weights_t)
    )(ops)


def tokens_read(gradient: Operands, name: str) -> list[int]:
    """The tokens of the only row that have a gradient."""
    leaf_td = np.asarray(getattr(gradient, name)[0]).reshape(TIME, -1)
    return np.flatnonzero(np.abs(leaf_td).max(1)).tolist()


def between(ops: Operands, start: int, stop: int) -> Operands:
    """The tokens from `start` to before `stop`, and the same initial state."""
    return Operands(*(o if o.ndim == 1 else o[:, start:stop] for o in ops[:5]), ops.initial_bhpn)


def products(ops: Operands) -> int:
    """In the longest sum: a state gathers over time, an output over the state, a gradient over both."""
    return ops.x_bthp.shape[1] * ops.b_btgn.shape[3]


class TestFixtures:
    """Outputs, final state and every gradient of the published model's scan."""

    @staticmethod
    def model(inputs: dict, *, segments_bt: Array, options: dict, chunk_size: int, implementation: str):
        dt_bth = inputs["dt"] + inputs.get("dt_bias", 0.0)
        dt_bth = jax.nn.softplus(dt_bth) if options["softplus"] else dt_bth
        dt_bth = jnp.clip(dt_bth, *(float(limit) for limit in options["lim"]))
        ops = Operands(inputs["x"], dt_bth, inputs["A"], inputs["B"], inputs["C"], inputs["S0"])
        y_bthp, final_bhpn = run(ops, segments_bt, chunk_size=chunk_size, implementation=implementation)
        return y_bthp + (inputs["D"][:, None] * inputs["x"] if "D" in inputs else 0.0), final_bhpn

    @every_implementation
    @pytest.mark.parametrize("case", CASES)
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
        results, gradient = quick_jit(functools.partial(differentiate, model))(inputs, (arrays["gy"], arrays["gfinal"]))
        limit = tolerance(jnp.float32, products=summary["shape"]["T"] * summary["shape"]["N"])
        assert_close(results, (arrays["y_f64"], arrays["final_f64"]), limit)
        assert_close(gradient, {name: arrays[f"g{name}_f64"] for name in inputs}, limit)

    def test_are_there(self):
        assert len(CASES) >= 9


@every_implementation
class TestEveryImplementation:
    """What each must do by itself."""

    def test_two_steps_worked_by_hand(self, implementation: str):
        # S1 = 0.5*2*3 = 3, y1 = 3*5 = 15; the decay is exp(-ln 4) = 1/4: S2 = 3/4 + 1*4*2 = 8.75, y2 = -17.5.
        x, dt, b, c = (jnp.asarray(v, jnp.float32).reshape(1, 2, 1, 1) for v in ((2, 4), (0.5, 1), (3, 2), (5, -2)))
        a_h = jnp.asarray([-math.log(4)])
        y_bthp, final_bhpn = ssd(x, dt[..., 0], a_h, b, c, chunk_size=CHUNK, implementation=implementation)
        np.testing.assert_allclose(y_bthp.ravel(), [15.0, -17.5], rtol=1e-6)
        np.testing.assert_allclose(final_bhpn.ravel(), [8.75], rtol=1e-6)

    def test_neighbouring_heads_share_a_group(self, implementation: str):
        ops = operands(t=5, h=4, g=2)
        ops = ops._replace(b_btgn=ops.b_btgn.at[:, :, 0].set(0.0), initial_bhpn=jnp.zeros_like(ops.initial_bhpn))
        y_bthp, _ = run(ops, implementation=implementation)
        assert (np.abs(y_bthp).max((0, 1, 3)) > 0).tolist() == [False, False, True, True]

    def test_no_segments_and_no_state_mean_one_segment_and_zero(self, implementation: str):
        ops = operands()._replace(initial_bhpn=jnp.zeros((2, 6, 3, 5)))
        plain = ssd(*ops[:5], chunk_size=CHUNK, implementation=implementation)
        assert_close(plain, run(ops, jnp.full((2, 29), 7), implementation=implementation), 0)

    def test_the_skip_adds_to_each_output_and_to_two_gradients(self, implementation: str):
        ops, segments_bt = operands(), segments((5, 12), t=29)
        skip_h, dy_bthp = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6)), jnp.float32)[0], ops.x_bthp + 1

        def skipping(x_bthp: Array, skip_h: Array) -> Array:
            y_bthp, _ = ssd(
                x_bthp, *ops[1:5], segments_bt=segments_bt, skip_h=skip_h, chunk_size=CHUNK,
                implementation=implementation,
            )  # fmt: skip
            return y_bthp

        @quick_jit
        def both(x_bthp: Array, skip_h: Array):
            y_bthp, pullback = jax.vjp(skipping, x_bthp, skip_h)
            return y_bthp, *pullback(dy_bthp)

        (y, dx, dskip), (plain, dplain, _) = both(ops.x_bthp, skip_h), both(ops.x_bthp, jnp.zeros(6))
        limit = tolerance(jnp.float32, products=products(ops))
        assert_close(y, plain + skip_h[:, None] * ops.x_bthp, limit)
        assert_close(dx, dplain + skip_h[:, None] * dy_bthp, limit)
        assert_close(dskip, jnp.einsum("bthp,bthp->h", ops.x_bthp, dy_bthp), limit)

    @pytest.mark.parametrize("cut", [1, 8, 21])
    def test_two_halves_chain(self, implementation: str, cut: int):
        def chained(ops: Operands) -> tuple[Array, Array]:
            first, second = between(ops, 0, cut), between(ops, cut, 29)
            y_first, middle_bhpn = run(first, implementation=implementation)
            y_second, final_bhpn = run(second._replace(initial_bhpn=middle_bhpn), implementation=implementation)
            return jnp.concatenate([y_first, y_second], axis=1), final_bhpn

        ops = operands()
        whole = outcome(ops, jnp.ones((2, 29), int), implementation=implementation)
        halves = quick_jit(functools.partial(differentiate, chained))(ops)
        assert_close(halves, whole, tolerance(jnp.float32, products=products(ops)))

    @pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
    def test_packed_row_equals_its_documents_apart(self, implementation: str, lengths: tuple[int, ...]):
        segments_bt = segments(lengths, b=1)
        # A row a document, its tokens first and then steps of length zero, which change nothing.
        token_dt = segments_bt == jnp.unique_values(segments_bt)[:, None]
        order_dt = jnp.argsort(~token_dt, axis=1, stable=True)

        def apart(ops: Operands) -> tuple[Array, Array]:
            rows = Operands(*(o if o.ndim == 1 else o[0][order_dt] for o in ops[:5]), None)
            length_d1 = token_dt.sum(1, keepdims=True)
            dt_dth = jnp.where((jnp.arange(TIME) < length_d1)[..., None], rows.dt_bth, 0.0)
            first_d = token_dt[:, 0]
            initial_dhpn = jnp.where(first_d[:, None, None, None], ops.initial_bhpn, 0.0)
            y_dthp, final_dhpn = run(
                rows._replace(dt_bth=dt_dth, initial_bhpn=initial_dhpn), implementation=implementation
            )
            y_thp = jnp.einsum("dthp,dts->shp", y_dthp, (order_dt[..., None] == jnp.arange(TIME)) * token_dt[:, None])
            return y_thp[None], final_dhpn[jnp.argmax(token_dt[:, -1])][None]

        ops = operands(b=1, t=TIME)
        packed = outcome(ops, segments_bt, implementation=implementation)
        assert_close(packed, quick_jit(functools.partial(differentiate, apart))(ops), 1e-5)

    def test_documents_do_not_see_each_other(self, implementation: str):
        segments_bt = segments(LENGTHS["around_the_border"], b=1)
        document_t = segments_bt[0] == 4
        ops = operands(b=1, t=TIME)
        scale_t = jnp.where(document_t, 1.0, 3.0)
        others_changed = ops._replace(
            x_bthp=ops.x_bthp * scale_t[:, None, None],
            dt_bth=ops.dt_bth * scale_t[:, None],
            initial_bhpn=ops.initial_bhpn * 3,
        )
        weights_t = document_t.astype(jnp.float32)
        value, gradient = read(ops, segments_bt, weights_t, implementation=implementation)
        assert value == read(others_changed, segments_bt, weights_t, implementation=implementation)[0]
        for name in ("x_bthp", "b_btgn", "c_btgn"):
            assert tokens_read(gradient, name) == np.flatnonzero(document_t).tolist()
        assert set(tokens_read(gradient, "dt_bth")) <= set(np.flatnonzero(document_t).tolist())
        assert not np.any(gradient.initial_bhpn)

    def test_an_id_that_comes_back_is_a_new_document(self, implementation: str):
        ops = operands()
        again, new = (
            outcome(ops, jnp.asarray([[1] * 12 + [2] * 7 + [last] * 10] * 2), implementation=implementation)
            for last in (1, 3)
        )
        assert_close(again, new, 0)

    @pytest.mark.parametrize("token", [0, 7, 8, 20])
    def test_no_output_sees_a_later_token(self, implementation: str, token: int):
        weights_t = jax.nn.one_hot(token, TIME)
        ops = operands(b=1, t=TIME)
        _, gradient = read(ops, jnp.ones((1, TIME), int), weights_t, implementation=implementation)
        for name in ("x_bthp", "dt_bth", "b_btgn"):
            assert tokens_read(gradient, name) == list(range(token + 1))
        assert tokens_read(gradient, "c_btgn") == [token]

    @pytest.mark.parametrize("dt", [(1e-12, 1e-9), (50.0, 1e4), (1e-9, 1e4)], ids=["tiny", "huge", "both"])
    def test_extreme_steps_stay_finite_and_right(self, implementation: str, dt: tuple[float, float]):
        ops, segments_bt = operands(dt=dt), segments((5, 12), t=29)
        got = outcome(ops, segments_bt, implementation=implementation)
        want = outcome(ops, segments_bt, implementation="recurrence")
        # An exponent is a difference of sums over a chunk, each term as low as -88 (exp is 0 below): eps of that much.
        assert_close(got, want, float(jnp.finfo(jnp.float32).eps) * 88 * CHUNK)

    def test_what_is_left_of_strong_decays_is_exact(self, implementation: str):
        """A token's own part of y and of dx has no decay, so that of the others may not cost it any digit."""
        ops = operands(dt=(4.0, 10.0))._replace(a_h=jnp.full(6, -8.0))  # e^-32 and less of any earlier token
        segments_bt = segments((5, 12), t=29)
        (y_bthp, _), gradient = outcome(ops, segments_bt, implementation=implementation)
        (want_y, _), want_gradient = outcome(ops, segments_bt, implementation="recurrence")
        got, want = (y_bthp, gradient.x_bthp), (want_y, want_gradient.x_bthp)
        assert_close(got, want, tolerance(jnp.float32, products=ops.b_btgn.shape[3]))


class TestWhereNotAllCan:
    """What some implementations are not made for."""

    # The Triton kernels take bfloat16 into matrix products: see TestTriton.
    @pytest.mark.parametrize("implementation", ["chunked", "recurrence"])
    def test_bfloat16_is_rounded_at_the_ends_only(self, implementation: str):
        ops = operands()
        half = Operands(*(o.astype(jnp.bfloat16) for o in ops[:5]), ops.initial_bhpn)
        (y_bthp, final_bhpn), gradient = outcome(half, segments((5, 12), t=29), implementation=implementation)
        single = jax.tree.map(lambda o: o.astype(jnp.float32), half)
        (want_y, want_final), want_gradient = outcome(single, segments((5, 12), t=29), implementation="recurrence")
        assert y_bthp.dtype == gradient.a_h.dtype == jnp.bfloat16
        assert final_bhpn.dtype == jnp.float32
        assert_close(final_bhpn, want_final, tolerance(jnp.float32, products=products(ops)))
        # One rounding of the output, one of its gradient, one of each operand's gradient.
        assert_close((y_bthp, gradient), (want_y, want_gradient), tolerance(jnp.bfloat16, products=1))

    # The interpreter of Pallas mixes varying and unvarying arrays, which check_vma refuses.
    @pytest.mark.parametrize("implementation", implementations(set(IMPLEMENTATIONS) - {"triton_interpreted"}))
    def test_gradients_inside_shard_map(self, implementation: str):
        def loss(ops: Operands, segments_bt: Array, weights) -> Array:
            results = run(ops, segments_bt, implementation=implementation)
            # The state and segments made inside vary over no mesh axis, and nothing reads this final state.
            plain_bthp, _ = ssd(*ops[:5], chunk_size=CHUNK, implementation=implementation)
            return sum(jnp.vdot(w, r) for w, r in zip(weights, results, strict=True)) + jnp.vdot(weights[0], plain_bthp)

        def sharded(ops: Operands, segments_bt: Array, weights):
            value, gradient = jax.value_and_grad(loss)(ops, segments_bt, weights)
            return jax.lax.psum(value, "data"), gradient

        ops, segments_bt = operands(t=21), segments((5, 12), t=21)
        rng = np.random.default_rng(2)
        weights = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in (ops.x_bthp.shape, ops[5].shape))
        rows, everywhere = PartitionSpec("data"), PartitionSpec()
        specs = Operands(rows, rows, everywhere, rows, rows, rows)
        mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
        mapped = jax.shard_map(
            sharded, mesh=mesh, in_specs=(specs, rows, rows), out_specs=(everywhere, specs), check_vma=True
        )
        want = jax.jit(jax.value_and_grad(loss))(ops, segments_bt, weights)
        assert_close(
            jax.jit(mapped)(ops, segments_bt, weights), want, tolerance(jnp.float32, products=2 * products(ops))
        )


class TestAgainstTheRecurrence:
    """Fast versions at many sizes, with packed rows, an initial state and a random gradient of both results."""

    @pytest.mark.parametrize("implementation", implementations(set(IMPLEMENTATIONS) - {"recurrence"}))
    @pytest.mark.parametrize(
        "sizes, chunk_size",
        [
            ({"t": 70, "h": 2, "g": 1, "p": 20, "n": 17}, 64),
            ({"t": 29, "h": 6, "g": 1}, 8),
            ({"t": 24, "h": 6, "g": 2, "p": 7, "n": 2}, 8),
            ({"t": 33, "h": 3, "g": 3, "p": 1, "n": 1}, 16),
            ({"t": 1}, 8),
            ({"t": 5}, 8),
            ({"t": 7, "b": 3}, 1),
            ({"t": 70, "b": 1, "h": 1, "g": 1, "p": 300}, 64),
        ],
        ids=str,
    )
    def test_equal_outputs_and_gradients(self, sizes: dict, chunk_size: int, implementation: str):
        ops = operands(**sizes)
        b, t = ops.x_bthp.shape[:2]
        segments_bt = segments((t // 3, t // 3), t=t, b=b)
        got, want = (
            outcome(ops, segments_bt, implementation=i, chunk_size=chunk_size) for i in (implementation, "recurrence")
        )
        assert_close(got, want, tolerance(jnp.float32, products=products(ops)))


@pytest.mark.parametrize("implementation", implementations({"triton", "triton_interpreted"}))
class TestTriton:
    """What only the Triton kernels do."""

    @pytest.mark.parametrize("chunk_size", [16, 64, 128])
    def test_bfloat16_products_and_float32_sums(self, implementation: str, chunk_size: int):
        """Chunks of one tile, and of several in each direction."""
        ops, segments_bt = operands(t=150, h=4, g=2, p=20, n=17), segments((50, 50), t=150)
        half = Operands(*(o.astype(jnp.bfloat16) for o in ops[:5]), ops.initial_bhpn)
        single = jax.tree.map(lambda o: o.astype(jnp.float32), half)
        got, want = (
            outcome(o, segments_bt, implementation=i, chunk_size=chunk_size)
            for o, i in ((half, implementation), (single, "recurrence"))
        )
        assert got[0][1].dtype == jnp.float32
        # Every product has two rounded operands, and every result is rounded once more.
        assert_close(got, want, tolerance(jnp.bfloat16, products=3))

    @pytest.mark.parametrize("dt", [(1e-12, 1e-9), (50.0, 1e4), (1e-9, 1e4)], ids=["tiny", "huge", "both"])
    def test_extreme_steps_in_bfloat16(self, implementation: str, dt: tuple[float, float]):
        """Whose decays have dt in their exponents; a step of none is among them."""
        ops, segments_bt = operands(dt=dt), segments((5, 12), t=29)
        ops = ops._replace(dt_bth=ops.dt_bth.at[:, ::7].set(0.0))
        half = Operands(*(o.astype(jnp.bfloat16) for o in ops[:5]), ops.initial_bhpn)
        single = jax.tree.map(lambda o: o.astype(jnp.float32), half)
        got, want = (
            outcome(o, segments_bt, implementation=i) for o, i in ((half, implementation), (single, "recurrence"))
        )
        assert_close(got, want, tolerance(jnp.bfloat16, products=3))

    def test_gradient_repeats_to_the_bit(self, implementation: str):
        ops, segments_bt = operands(t=40), segments((5, 12), t=40)
        first, second = (outcome(ops, segments_bt, implementation=implementation) for _ in range(2))
        assert_close(first, second, 0)


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
        run(operands(), implementation="triton")


class TestRefusals:
    """Each error, by message."""

    @pytest.mark.parametrize(
        "changes, message",
        [
            (
                {"implementation": "fast"},
                r"implementation='fast': expected one of \['chunked', 'recurrence', 'triton', 'triton_interpreted'\]",
            ),
            ({"chunk_size": 0}, "chunk_size=0: expected at least 1"),
            ({"b_btgn": jnp.zeros((2, 29, 4, 5))}, "6 heads over 4 groups: expected a multiple"),
            ({"c_btgn": jnp.zeros((2, 29, 2, 5))}, r"C has shape \(2, 29, 2, 5\): expected \(2, 29, 3, 5\)"),
            ({"dt_bth": jnp.zeros((2, 28, 6))}, r"dt has shape \(2, 28, 6\): expected \(2, 29, 6\)"),
            ({"a_h": jnp.zeros(5)}, r"a has shape \(5,\): expected \(6,\)"),
            ({"x_bthp": jnp.zeros((2, 0, 6, 3))}, "t >= 1"),
            ({"segments_bt": jnp.zeros((2, 28), int)}, r"segments has shape \(2, 28\): expected \(2, 29\)"),
            ({"initial_state_bhpn": jnp.zeros((2, 6, 5, 3))}, r"initial_state has shape \(2, 6, 5, 3\)"),
            ({"skip_h": jnp.zeros(5)}, r"skip has shape \(5,\): expected \(6,\)"),
        ],
    )
    def test_by_message(self, changes: dict, message: str):
        arguments = {**operands()._asdict(), "chunk_size": CHUNK, "implementation": "chunked", **changes}
        arguments.pop("initial_bhpn")
        arrays = [arguments.pop(name) for name in Operands._fields[:5]]
        with pytest.raises(ValueError, match=message):
            ssd(*arrays, **arguments)
