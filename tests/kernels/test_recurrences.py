"""The recurrences of Mamba-1 and Mamba-2: what every implementation of both must do, and equal the reference in.

Axes: b batch, t time, d documents; what comes after them is a recurrence's own.
"""

import functools
import math

import chex
import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from tests.helpers import implementations
from tests.kernels.recurrences import (
    CHUNK,
    LENGTHS,
    SELECTIVE_SCAN,
    SSD,
    TIME,
    Operands,
    Recurrence,
    assert_close,
    differentiate,
    every_implementation,
    name_of,
    random_weights,
    segments,
)
from tests.kernels.rounding import tolerance

PACKED = segments((5, 12), t=29)


@functools.partial(jax.jit, static_argnames=("recurrence", "implementation"))
def read(o: Operands, segments_bt: Array, weights_t: Array, *, recurrence, implementation) -> tuple[Array, Operands]:
    """The outputs summed with a weight per token, and its gradient."""

    def loss(o: Operands) -> Array:
        y_bt, _ = recurrence.run(o, segments_bt, implementation=implementation)
        return jnp.einsum("bt...,t->", y_bt, weights_t)

    return jax.value_and_grad(loss)(o)


@functools.partial(jax.jit, static_argnums=(3, 4))
def apart(o: Operands, token_dt: Array, weights, recurrence: Recurrence, implementation: str):
    """The outcome of a row whose documents are rows of their own: their tokens first, then steps of length zero, which
    change nothing. `token_dt` says which tokens are a document's; there may be documents without any."""
    order_dt = jnp.argsort(~token_dt, axis=1, stable=True)
    row_t = jnp.argmax(token_dt, axis=0)
    place_t = jnp.argsort(order_dt, axis=1)[row_t, jnp.arange(TIME)]

    def run(o: Operands) -> tuple[Array, Array]:
        rows = o.of_tokens(lambda a_bt: a_bt[0][order_dt])
        real_dt = jnp.arange(TIME) < token_dt.sum(1, keepdims=True)
        dt_dt = jnp.where(real_dt[..., None], rows.dt_bt, 0.0)
        first_d = token_dt[:, 0].reshape(-1, *(1,) * (o.initial_b.ndim - 1))
        rows = rows._replace(dt_bt=dt_dt, initial_b=jnp.where(first_d, o.initial_b, 0.0))
        y_dt, final_d = recurrence.run(rows, implementation=implementation)
        return y_dt[row_t, place_t][None], final_d[row_t[-1]][None]

    return differentiate(run, o, weights)


def tokens_read(gradient_bt: Array) -> list[int]:
    """The tokens of the only row that have a gradient."""
    leaf_td = np.asarray(gradient_bt[0]).reshape(TIME, -1)
    return np.flatnonzero(np.abs(leaf_td).max(1)).tolist()


def times(a_bt: Array, scale_t: Array) -> Array:
    return a_bt * scale_t.reshape(-1, *(1,) * (a_bt.ndim - 2))


@every_implementation()
class TestEveryImplementation:
    """What each must do by itself."""

    def test_two_steps_worked_by_hand(self, recurrence: Recurrence, implementation: str):
        # S1 = 0.5*2*3 = 3, y1 = 3*5 = 15; the decay is exp(-ln 4) = 1/4: S2 = 3/4 + 1*4*2 = 8.75, y2 = -17.5.
        sizes = dict.fromkeys("hpgn" if recurrence is SSD else "in", 1)
        numbers = Operands([2, 4], [0.5, 1], [-math.log(4)], [3, 2], [5, -2], [0])  # pyright: ignore
        shapes = recurrence.shapes(b=1, t=2, **sizes)
        o = Operands(*(jnp.asarray(n, jnp.float32).reshape(s) for n, s in zip(numbers, shapes, strict=True)))
        y_bt, final_b = recurrence.run(o, implementation=implementation)
        np.testing.assert_allclose(y_bt.ravel(), [15.0, -17.5], rtol=1e-6)
        np.testing.assert_allclose(final_b.ravel(), [8.75], rtol=1e-6)

    def test_no_segments_and_no_state_mean_one_segment_and_zero(self, recurrence: Recurrence, implementation: str):
        o = recurrence.operands()
        plain = recurrence.function(*o[:5], chunk_size=CHUNK, implementation=implementation)
        o = o._replace(initial_b=jnp.zeros_like(o.initial_b))
        chex.assert_trees_all_equal(plain, recurrence.run(o, jnp.full((2, 29), 7), implementation=implementation))

    # At the end of a chunk and within one; the pieces have the same lengths, which are compiled once.
    @pytest.mark.parametrize("boundary", [8, 21])
    def test_two_pieces_chain(self, recurrence: Recurrence, implementation: str, boundary: int):
        """The first piece's final state is the second's initial one, and its gradient goes back the same way."""
        o = recurrence.operands()

        def outcome(o: Operands, weights):
            ones_bt = jnp.ones(o.x_bt.shape[:2], int)
            return recurrence.outcome(o, ones_bt, weights=weights, implementation=implementation)

        y_weights, final_weights = random_weights(o)
        first, second = o.between(0, boundary), o.between(boundary, 29)
        of_first, of_second = y_weights[:, :boundary], y_weights[:, boundary:]
        (y_first, middle_b), _ = outcome(first, (of_first, jnp.zeros_like(final_weights)))
        (y_second, final_b), back = outcome(second._replace(initial_b=middle_b), (of_second, final_weights))
        _, front = outcome(first, (of_first, back.initial_b))
        joined = {
            name: jnp.concatenate([getattr(front, name), getattr(back, name)], axis=1)
            for name in ("x_bt", "dt_bt", "b_bt", "c_bt")
        }
        gradient = front._replace(rates=front.rates + back.rates, **joined)
        got = (jnp.concatenate([y_first, y_second], axis=1), final_b), gradient
        assert_close(got, outcome(o, None), tolerance(jnp.float32, terms=o.products()))

    @pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
    def test_packed_row_equals_its_documents_apart(
        self, recurrence: Recurrence, implementation: str, lengths: tuple[int, ...]
    ):
        segments_bt = segments(lengths, b=1)
        o = recurrence.operands(b=1, t=TIME)
        got = recurrence.outcome(o, segments_bt, implementation=implementation)
        want = apart(o, segments_bt == jnp.arange(10)[:, None], random_weights(o), recurrence, implementation)
        assert_close(got, want, tolerance(jnp.float32, terms=o.products()))

    def test_documents_do_not_see_each_other(self, recurrence: Recurrence, implementation: str):
        segments_bt = segments(LENGTHS["around_the_border"], b=1)
        document_t = segments_bt[0] == 4
        o = recurrence.operands(b=1, t=TIME)
        scale_t = jnp.where(document_t, 1.0, 3.0)
        others_changed = o._replace(
            x_bt=times(o.x_bt, scale_t), dt_bt=times(o.dt_bt, scale_t), initial_b=o.initial_b * 3
        )
        reading = functools.partial(read, recurrence=recurrence, implementation=implementation)
        value, gradient = reading(o, segments_bt, document_t.astype(jnp.float32))
        assert value == reading(others_changed, segments_bt, document_t.astype(jnp.float32))[0]
        for name in ("x_bt", "dt_bt", "b_bt", "c_bt"):
            assert tokens_read(getattr(gradient, name)) == np.flatnonzero(document_t).tolist()
        assert not np.any(gradient.initial_b)

    def test_an_id_that_comes_back_is_a_new_document(self, recurrence: Recurrence, implementation: str):
        again, new = (
            recurrence.outcome(
                recurrence.operands(),
                jnp.asarray([[1] * 12 + [2] * 7 + [last] * 10] * 2),
                implementation=implementation,
            )
            for last in (1, 3)
        )
        chex.assert_trees_all_equal(again, new)

    @pytest.mark.parametrize("token", [0, 7, 8, 20])
    def test_no_output_sees_a_later_token(self, recurrence: Recurrence, implementation: str, token: int):
        o = recurrence.operands(b=1, t=TIME, dt=(1e-3, 0.1))
        _, gradient = read(
            o, jnp.ones((1, TIME), int), jax.nn.one_hot(token, TIME), recurrence=recurrence,
            implementation=implementation,
        )  # fmt: skip
        for name in ("x_bt", "dt_bt", "b_bt"):
            assert tokens_read(getattr(gradient, name)) == list(range(token + 1))
        assert tokens_read(gradient.c_bt) == [token]

    @pytest.mark.parametrize("dt", [(1e-12, 1e-9), (50.0, 1e4), (1e-9, 1e4)], ids=["tiny", "huge", "both"])
    def test_extreme_steps_stay_finite_and_right(
        self, recurrence: Recurrence, implementation: str, dt: tuple[float, float]
    ):
        got, want = (
            recurrence.outcome(recurrence.operands(dt=dt), PACKED, implementation=i)
            for i in (implementation, recurrence.reference)
        )
        assert_close(got, want, recurrence.extreme)

    def test_what_is_left_of_strong_decays_is_exact(self, recurrence: Recurrence, implementation: str):
        """A token's own part of y and of dx has no decay, so that of the others may not cost it any digit."""
        o = recurrence.operands(dt=(4.0, 10.0))
        o = o._replace(rates=jnp.full_like(o.rates, -8.0))  # e^-32 and less of any earlier token
        (y_bt, _), gradient = recurrence.outcome(o, PACKED, implementation=implementation)
        (want_y, _), want_gradient = recurrence.outcome(o, PACKED, implementation=recurrence.reference)
        limit = tolerance(jnp.float32, terms=o.b_bt.shape[-1])
        assert_close((y_bt, gradient.x_bt), (want_y, want_gradient.x_bt), limit)


# The Triton kernels take bfloat16 into matrix products: see test_ssd.
@every_implementation(but=("triton", "triton_interpreted"))
def test_bfloat16_is_rounded_at_the_ends_only(recurrence: Recurrence, implementation: str):
    o = recurrence.operands()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), o)._replace(initial_b=o.initial_b)
    (y_bt, final_b), gradient = recurrence.outcome(half, PACKED, implementation=implementation)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    (want_y, want_final), want_gradient = recurrence.outcome(single, PACKED, implementation=recurrence.reference)
    assert y_bt.dtype == gradient.rates.dtype == jnp.bfloat16
    assert final_b.dtype == jnp.float32
    assert_close(final_b, want_final, tolerance(jnp.float32, terms=o.products()))
    # One rounding of the output, one of its gradient, one of each operand's gradient.
    assert_close((y_bt, gradient), (want_y, want_gradient), tolerance(jnp.bfloat16, terms=1))


# The interpreter of Pallas mixes varying and unvarying arrays, which check_vma refuses.
@every_implementation(but=("triton_interpreted",))
def test_gradients_inside_shard_map(recurrence: Recurrence, implementation: str):
    def loss(o: Operands, segments_bt: Array, weights) -> Array:
        results = recurrence.run(o, segments_bt, implementation=implementation)
        # The state and segments made inside vary over no mesh axis, and nothing reads this final state.
        plain_bt, _ = recurrence.function(*o[:5], chunk_size=CHUNK, implementation=implementation)
        return sum(jnp.vdot(w, r) for w, r in zip(weights, results, strict=True)) + jnp.vdot(weights[0], plain_bt)

    def sharded(o: Operands, segments_bt: Array, weights):
        value, gradient = jax.value_and_grad(loss)(o, segments_bt, weights)
        return jax.lax.psum(value, "data"), gradient

    o, segments_bt = recurrence.operands(t=21), segments((5, 12), t=21)
    rng = np.random.default_rng(2)
    weights = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in (o.x_bt.shape, o.initial_b.shape))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    specs = Operands(rows, rows, everywhere, rows, rows, rows)  # pyright: ignore
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
    mapped = jax.shard_map(
        sharded, mesh=mesh, in_specs=(specs, rows, rows), out_specs=(everywhere, specs), check_vma=True
    )
    want = jax.jit(jax.value_and_grad(loss))(o, segments_bt, weights)
    assert_close(jax.jit(mapped)(o, segments_bt, weights), want, tolerance(jnp.float32, terms=2 * o.products()))


# Sizes without interpreted kernels, which take seconds each. Sequences shorter than a tile are tested by t 1 and
# test_ssd_strong_and_weak, and one group of several heads by heads of 20.
NOT_INTERPRETED = ({"t": 5}, {"t": 7, "b": 3}, {"t": 29, "h": 6, "g": 1})
SIZES = [
    (SSD, {"t": 70, "h": 2, "g": 1, "p": 20, "n": 17}, 64),
    (SSD, {"t": 29, "h": 6, "g": 1}, 8),
    (SSD, {"t": 24, "h": 6, "g": 2, "p": 7, "n": 2}, 8),
    (SSD, {"t": 33, "h": 3, "g": 3, "p": 1, "n": 1}, 16),
    (SSD, {"t": 1}, 8),
    (SSD, {"t": 5}, 8),
    (SSD, {"t": 7, "b": 3}, 1),
    (SSD, {"t": 70, "b": 1, "h": 1, "g": 1, "p": 300}, 64),
    (SELECTIVE_SCAN, {"t": 29}, 8),
    (SELECTIVE_SCAN, {"t": 24, "i": 7, "n": 2}, 8),
    (SELECTIVE_SCAN, {"t": 33, "i": 1, "n": 1}, 16),
    (SELECTIVE_SCAN, {"t": 1}, 8),
    (SELECTIVE_SCAN, {"t": 5}, 8),
    (SELECTIVE_SCAN, {"t": 17, "i": 4, "n": 9}, 3),
    (SELECTIVE_SCAN, {"t": 7, "b": 3}, 1),
]


@pytest.mark.parametrize(
    "recurrence, sizes, chunk_size, implementation",
    [
        pytest.param(*case, *param.values, marks=param.marks, id=f"{name_of(case[0])}-{case[1:]}-{param.values[0]}")
        for case in SIZES
        for param in implementations(set(case[0].implementations) - {case[0].reference})
        if not (param.values[0] == "triton_interpreted" and case[1] in NOT_INTERPRETED)
    ],
)
def test_equals_the_reference(recurrence: Recurrence, sizes: dict, chunk_size: int, implementation: str):
    """At many sizes, with packed rows, an initial state and a random gradient of both results."""
    o = recurrence.operands(**sizes)
    b, t = o.x_bt.shape[:2]
    segments_bt = segments((t // 3, t // 3), t=t, b=b)
    got, want = (
        recurrence.outcome(o, segments_bt, implementation=i, chunk_size=chunk_size)
        for i in (implementation, recurrence.reference)
    )
    assert_close(got, want, tolerance(jnp.float32, terms=o.products()))


@pytest.mark.parametrize(
    "recurrence, changes, message",
    [
        (
            SSD,
            {"implementation": "fast"},
            r"implementation='fast': expected one of \['chunked', 'recurrence', 'triton', 'triton_interpreted'\]",
        ),
        (SSD, {"chunk_size": 0}, "chunk_size=0: expected at least 1"),
        (SSD, {"b_bt": (2, 29, 4, 5)}, "6 heads over 4 groups: expected a multiple"),
        (SSD, {"c_bt": (2, 29, 2, 5)}, r"C has shape \(2, 29, 2, 5\): expected \(2, 29, 3, 5\)"),
        (SSD, {"dt_bt": (2, 28, 6)}, r"dt has shape \(2, 28, 6\): expected \(2, 29, 6\)"),
        (SSD, {"rates": (5,)}, r"a has shape \(5,\): expected \(6,\)"),
        (SSD, {"x_bt": (2, 0, 6, 3)}, "t >= 1"),
        (SSD, {"x_bt": (2, 29, 6)}, r"x \(2, 29, 6\), B \(2, 29, 3, 5\): expected \(b, t, h, p\)"),
        (SSD, {"segments_bt": jnp.zeros((2, 28), int)}, r"segments has shape \(2, 28\): expected \(2, 29\)"),
        (SSD, {"initial_state_bhpn": jnp.zeros((2, 6, 5, 3))}, r"initial_state has shape \(2, 6, 5, 3\)"),
        (SSD, {"skip_h": jnp.zeros(5)}, r"skip has shape \(5,\): expected \(6,\)"),
        (
            SELECTIVE_SCAN,
            {"implementation": "fast"},
            r"implementation='fast': expected one of \['chunked', 'reference'\]",
        ),
        (SELECTIVE_SCAN, {"chunk_size": 0}, "chunk_size=0: expected at least 1"),
        (SELECTIVE_SCAN, {"c_bt": (2, 29, 4)}, r"C has shape \(2, 29, 4\): expected \(2, 29, 5\)"),
        (SELECTIVE_SCAN, {"dt_bt": (2, 28, 6)}, r"dt has shape \(2, 28, 6\): expected \(2, 29, 6\)"),
        (SELECTIVE_SCAN, {"rates": (5, 6)}, r"A has shape \(5, 6\): expected \(6, 5\)"),
        (SELECTIVE_SCAN, {"x_bt": (2, 0, 6)}, "t >= 1"),
        (SELECTIVE_SCAN, {"x_bt": (2, 29)}, r"x \(2, 29\), B \(2, 29, 5\): expected \(b, t, i\)"),
        (SELECTIVE_SCAN, {"segments_bt": jnp.zeros((2, 28), int)}, r"segments has shape \(2, 28\): expected \(2, 29\)"),
        (SELECTIVE_SCAN, {"initial_state_bin": jnp.zeros((2, 5, 6))}, r"initial_state has shape \(2, 5, 6\)"),
    ],
)
def test_refusals_by_message(recurrence: Recurrence, changes: dict, message: str):
    shapes = {name: changes.pop(name) for name in Operands._fields if name in changes}
    o = recurrence.operands()._replace(**{name: jnp.zeros(shape) for name, shape in shapes.items()})
    arguments = {"chunk_size": CHUNK, "implementation": "chunked", **changes}
    with pytest.raises(ValueError, match=message):
        recurrence.function(*o[:5], **arguments)
