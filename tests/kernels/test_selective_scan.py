"""The Mamba-1 recurrence: every implementation against float64 fixtures, by hand, and against the reference.

Axes: b batch, t time, i channels, n state.

The fixtures hold state-spaces/mamba's selective scan in float64, with softplus, bias of dt and skip D around it.
"""

import functools
import math
import pathlib
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from tests.kernels.test_ssd import LENGTHS, TIME, assert_close, differentiate, quick_jit, segments, tolerance

from orogen.kernels.selective_scan import IMPLEMENTATIONS, selective_scan

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "selscan"
CHUNK = 8

every_implementation = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))


class Operands(NamedTuple):
    """What `selective_scan` is differentiated by."""

    x_bti: Array
    dt_bti: Array
    A_in: Array
    B_btn: Array
    C_btn: Array
    initial_bin: Array


def operands(*, b=2, t=29, i=6, n=5, dt=(1e-3, 0.5), seed=0) -> Operands:
    rng = np.random.default_rng(seed)
    steps_bti = np.exp(rng.uniform(*np.log(dt), (b, t, i)))
    draws = (
        rng.normal(size=(b, t, i)),
        steps_bti,
        -rng.uniform(1, 16, (i, n)),
        rng.normal(size=(b, t, n)),
        rng.normal(size=(b, t, n)),
        rng.normal(size=(b, i, n)),
    )
    return Operands(*(jnp.asarray(draw, jnp.float32) for draw in draws))


def run(ops: Operands, segments_bt=None, *, implementation: str, chunk_size: int = CHUNK) -> tuple[Array, Array]:
    return selective_scan(
        *ops[:5],
        segments_bt=segments_bt,
        initial_state_bin=ops.initial_bin,
        chunk_size=chunk_size,
        implementation=implementation,
    )


@functools.partial(quick_jit, static_argnames=("implementation", "chunk_size"))
def outcome(ops: Operands, segments_bt: Array, *, implementation: str, chunk_size: int = CHUNK):
    return differentiate(lambda o: run(o, segments_bt, implementation=implementation, chunk_size=chunk_size), ops)


@functools.partial(quick_jit, static_argnames="implementation")
def read(ops: Operands, segments_bt: Array, weights_t: Array, *, implementation: str) -> tuple[Array, Operands]:
    """The outputs summed with a weight a token, and its gradient."""
    return jax.value_and_grad(
        lambda o: jnp.einsum("bti,t->", run(o, segments_bt, implementation=implementation)[0], weights_t)
    )(ops)


def tokens_read(gradient: Operands, name: str) -> list[int]:
    """The tokens of the only row that have a gradient."""
    return np.flatnonzero(np.abs(getattr(gradient, name)[0]).max(1)).tolist()


def between(ops: Operands, start: int, stop: int) -> Operands:
    """The tokens from `start` to before `stop`, and the same A and initial state."""
    cut = {name: getattr(ops, name)[:, start:stop] for name in ("x_bti", "dt_bti", "B_btn", "C_btn")}
    return ops._replace(**cut)


def products(ops: Operands) -> int:
    """In the longest sum: a state gathers over time, an output over the state, a gradient over both."""
    return ops.B_btn.shape[1] * ops.B_btn.shape[2]


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

    @every_implementation
    @pytest.mark.parametrize("case, chunk_size", [("var", 4), ("var", 64), ("t65", 16)])
    def test_equals_float64(self, case: str, chunk_size: int, implementation: str):
        arrays = np.load(FIXTURES / f"{case}.npz")
        inputs = {name[3:]: jnp.asarray(arrays[name]) for name in arrays if name.startswith("in_")}
        model = functools.partial(self.model, chunk_size=chunk_size, implementation=implementation)
        results, gradient = quick_jit(functools.partial(differentiate, model))(inputs, (arrays["gy"], arrays["gfinal"]))
        limit = tolerance(jnp.float32, products=arrays["in_u"].shape[2] * arrays["in_A"].shape[1])
        assert_close(results, (arrays["y_f64"], arrays["final_f64"]), limit)
        assert_close(gradient, {name: arrays[f"g{name}_f64"] for name in inputs}, limit)


@every_implementation
class TestEveryImplementation:
    """What each must do by itself."""

    def test_two_steps_worked_by_hand(self, implementation: str):
        # S1 = 0.5*2*3 = 3, y1 = 3*5 = 15; the decay is exp(-ln 4) = 1/4: S2 = 3/4 + 1*4*2 = 8.75, y2 = -17.5.
        x, dt, B, C = (jnp.asarray(v, jnp.float32).reshape(1, 2, 1) for v in ((2, 4), (0.5, 1), (3, 2), (5, -2)))
        A_in = jnp.asarray([[-math.log(4)]])
        y_bti, final_bin = selective_scan(x, dt, A_in, B, C, chunk_size=CHUNK, implementation=implementation)
        np.testing.assert_allclose(y_bti.ravel(), [15.0, -17.5], rtol=1e-6)
        np.testing.assert_allclose(final_bin.ravel(), [8.75], rtol=1e-6)

    def test_no_segments_and_no_state_mean_one_segment_and_zero(self, implementation: str):
        ops = operands()._replace(initial_bin=jnp.zeros((2, 6, 5)))
        plain = selective_scan(*ops[:5], chunk_size=CHUNK, implementation=implementation)
        assert_close(plain, run(ops, jnp.full((2, 29), 7), implementation=implementation), 0)

    @pytest.mark.parametrize("cut", [1, 8, 21])
    def test_two_halves_chain(self, implementation: str, cut: int):
        def chained(ops: Operands) -> tuple[Array, Array]:
            y_first, middle_bin = run(between(ops, 0, cut), implementation=implementation)
            second = between(ops, cut, 29)._replace(initial_bin=middle_bin)
            y_second, final_bin = run(second, implementation=implementation)
            return jnp.concatenate([y_first, y_second], axis=1), final_bin

        ops = operands()
        whole = outcome(ops, jnp.ones((2, 29), int), implementation=implementation)
        halves = quick_jit(functools.partial(differentiate, chained))(ops)
        assert_close(halves, whole, tolerance(jnp.float32, products=products(ops)))

    @pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
    def test_packed_row_equals_its_documents_apart(self, implementation: str, lengths: tuple[int, ...]):
        edges = np.cumsum((0, *lengths, TIME - sum(lengths)))

        def apart(ops: Operands) -> tuple[Array, Array]:
            y, final_bin = [], ops.initial_bin
            for start, stop in zip(edges, edges[1:], strict=False):
                initial_bin = ops.initial_bin * (start == 0)
                document = between(ops, start, stop)._replace(initial_bin=initial_bin)
                y_bti, final_bin = run(document, implementation=implementation)
                y.append(y_bti)
            return jnp.concatenate(y, axis=1), final_bin

        ops = operands(b=1, t=TIME)
        packed = outcome(ops, segments(lengths, b=1), implementation=implementation)
        want = quick_jit(functools.partial(differentiate, apart))(ops)
        assert_close(packed, want, tolerance(jnp.float32, products=products(ops)))

    def test_documents_do_not_see_each_other(self, implementation: str):
        segments_bt = segments(LENGTHS["around_the_border"], b=1)
        document_t = segments_bt[0] == 4
        ops = operands(b=1, t=TIME)
        scale_t1 = jnp.where(document_t, 1.0, 3.0)[:, None]
        others_changed = ops._replace(
            x_bti=ops.x_bti * scale_t1, dt_bti=ops.dt_bti * scale_t1, initial_bin=ops.initial_bin * 3
        )
        weights_t = document_t.astype(jnp.float32)
        value, gradient = read(ops, segments_bt, weights_t, implementation=implementation)
        assert value == read(others_changed, segments_bt, weights_t, implementation=implementation)[0]
        for name in ("x_bti", "dt_bti", "B_btn", "C_btn"):
            assert tokens_read(gradient, name) == np.flatnonzero(document_t).tolist()
        assert not np.any(gradient.initial_bin)

    def test_an_id_that_comes_back_is_a_new_document(self, implementation: str):
        again, new = (
            outcome(operands(), jnp.asarray([[1] * 12 + [2] * 7 + [last] * 10] * 2), implementation=implementation)
            for last in (1, 3)
        )
        assert_close(again, new, 0)

    @pytest.mark.parametrize("token", [0, 7, 8, 20])
    def test_no_output_sees_a_later_token(self, implementation: str, token: int):
        weights_t = jax.nn.one_hot(token, TIME)
        ops = operands(b=1, t=TIME, dt=(1e-3, 0.1))
        _, gradient = read(ops, jnp.ones((1, TIME), int), weights_t, implementation=implementation)
        for name in ("x_bti", "dt_bti", "B_btn"):
            assert tokens_read(gradient, name) == list(range(token + 1))
        assert tokens_read(gradient, "C_btn") == [token]

    @pytest.mark.parametrize("dt", [(1e-12, 1e-9), (50.0, 1e4), (1e-9, 1e4)], ids=["tiny", "huge", "both"])
    def test_extreme_steps_stay_finite_and_right(self, implementation: str, dt: tuple[float, float]):
        ops, segments_bt = operands(dt=dt), segments((5, 12), t=29)
        got = outcome(ops, segments_bt, implementation=implementation)
        want = outcome(ops, segments_bt, implementation="reference")
        assert_close(got, want, tolerance(jnp.float32, products=products(ops)))

    def test_bfloat16_is_rounded_at_the_ends_only(self, implementation: str):
        ops = operands()
        half = Operands(*(o.astype(jnp.bfloat16) for o in ops[:5]), ops.initial_bin)
        (y_bti, final_bin), gradient = outcome(half, segments((5, 12), t=29), implementation=implementation)
        single = jax.tree.map(lambda o: o.astype(jnp.float32), half)
        (want_y, want_final), want_gradient = outcome(single, segments((5, 12), t=29), implementation="reference")
        assert y_bti.dtype == gradient.A_in.dtype == jnp.bfloat16
        assert final_bin.dtype == jnp.float32
        assert_close(final_bin, want_final, tolerance(jnp.float32, products=products(ops)))
        # One rounding of the output, one of its gradient, one of each operand's gradient.
        assert_close((y_bti, gradient), (want_y, want_gradient), tolerance(jnp.bfloat16, products=1))

    def test_gradients_inside_shard_map(self, implementation: str):
        def loss(ops: Operands, segments_bt: Array, weights) -> Array:
            results = run(ops, segments_bt, implementation=implementation)
            # The state and segments made inside vary over no mesh axis, and nothing reads this final state.
            plain_bti, _ = selective_scan(*ops[:5], chunk_size=CHUNK, implementation=implementation)
            return sum(jnp.vdot(w, r) for w, r in zip(weights, results, strict=True)) + jnp.vdot(weights[0], plain_bti)

        def sharded(ops: Operands, segments_bt: Array, weights):
            value, gradient = jax.value_and_grad(loss)(ops, segments_bt, weights)
            return jax.lax.psum(value, "data"), gradient

        ops, segments_bt = operands(t=21), segments((5, 12), t=21)
        rng = np.random.default_rng(2)
        weights = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in (ops.x_bti.shape, ops[5].shape))
        rows, everywhere = PartitionSpec("data"), PartitionSpec()
        specs = Operands(rows, rows, everywhere, rows, rows, rows)
        mesh = Mesh(np.asarray(jax.devices("cpu")[:2]), ("data",))
        mapped = jax.shard_map(
            sharded, mesh=mesh, in_specs=(specs, rows, rows), out_specs=(everywhere, specs), check_vma=True
        )
        want = jax.jit(jax.value_and_grad(loss))(ops, segments_bt, weights)
        assert_close(
            jax.jit(mapped)(ops, segments_bt, weights), want, tolerance(jnp.float32, products=2 * products(ops))
        )


class TestAgainstTheReference:
    """Fast versions at many sizes, with packed rows, an initial state and a random gradient of both results."""

    @pytest.mark.parametrize("implementation", sorted(set(IMPLEMENTATIONS) - {"reference"}))
    @pytest.mark.parametrize(
        "sizes, chunk_size",
        [
            ({"t": 29}, 8),
            ({"t": 24, "i": 7, "n": 2}, 8),
            ({"t": 33, "i": 1, "n": 1}, 16),
            ({"t": 1}, 8),
            ({"t": 5}, 8),
            ({"t": 17, "i": 4, "n": 9}, 3),
            ({"t": 7, "b": 3}, 1),
        ],
        ids=str,
    )
    def test_equal_outputs_and_gradients(self, sizes: dict, chunk_size: int, implementation: str):
        ops = operands(**sizes)
        b, t = ops.x_bti.shape[:2]
        segments_bt = segments((t // 3, t // 3), t=t, b=b)
        got, want = (
            outcome(ops, segments_bt, implementation=i, chunk_size=chunk_size) for i in (implementation, "reference")
        )
        assert_close(got, want, tolerance(jnp.float32, products=products(ops)))


def test_the_backward_pass_keeps_one_state_a_chunk():
    """What the gradient holds at once: entering states and a chunk's own, not a state a token."""
    b, t, i, n = 1, 400, 64, 16
    ops = operands(b=b, t=t, i=i, n=n)

    def peak(implementation: str) -> int:
        loss = lambda o: jnp.sum(run(o, implementation=implementation, chunk_size=20)[0])  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(ops).compile().memory_analysis().temp_size_in_bytes

    state = 4 * b * i * n
    assert peak("reference") > 2 * t * state
    assert peak("chunked") < 4 * 20 * state + 6 * ops.x_bti.nbytes


class TestRefusals:
    """Each error, by message."""

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"implementation": "fast"}, r"implementation='fast': expected one of \['chunked', 'reference'\]"),
            ({"chunk_size": 0}, "chunk_size=0: expected at least 1"),
            ({"C_btn": jnp.zeros((2, 29, 4))}, r"C has shape \(2, 29, 4\): expected \(2, 29, 5\)"),
            ({"dt_bti": jnp.zeros((2, 28, 6))}, r"dt has shape \(2, 28, 6\): expected \(2, 29, 6\)"),
            ({"A_in": jnp.zeros((5, 6))}, r"A has shape \(5, 6\): expected \(6, 5\)"),
            ({"x_bti": jnp.zeros((2, 0, 6))}, "t >= 1"),
            ({"segments_bt": jnp.zeros((2, 28), int)}, r"segments has shape \(2, 28\): expected \(2, 29\)"),
            ({"initial_state_bin": jnp.zeros((2, 5, 6))}, r"initial_state has shape \(2, 5, 6\)"),
        ],
    )
    def test_by_message(self, changes: dict, message: str):
        arguments = {**operands()._asdict(), "chunk_size": CHUNK, "implementation": "chunked", **changes}
        arguments.pop("initial_bin")
        arrays = [arguments.pop(name) for name in Operands._fields[:5]]
        with pytest.raises(ValueError, match=message):
            selective_scan(*arrays, **arguments)
