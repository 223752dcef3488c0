"""Replay: every implementation against the recurrence in float64 over the whole sequence, however it is cut.

Axes: b batch, l places of the ring, t tokens, h heads, p head size, g groups, n state.
"""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tests.helpers import implementations
from tests.kernels.lowering import kernels, lowered, lowered_on_two
from tests.kernels.rounding import assert_within, tolerance

from orogen.kernels.replay import (
    FLUSH_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    Ring,
    flush,
    replay,
)
from orogen.kernels.state_update import ssm_update

B, H, P, G, N, PLACES, TIME = 3, 6, 5, 2, 7, 6, 11
every_implementation = pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
LIMIT = tolerance(jnp.float32, terms=TIME * N)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Row:
    """Inputs of TIME tokens in order, and what they start from."""

    def __init__(self, dtype=jnp.float32, *, p=P, n=N, steps=(1e-3, 0.5)):
        steps_bth = np.exp(np.random.default_rng(1).uniform(*np.log(steps), (B, TIME, H)))
        x_bthp, b_btgn = draw(B, TIME, H, p).astype(dtype), draw(B, TIME, G, n, seed=2).astype(dtype)
        self.inputs = Ring(x_bthp, b_btgn, jnp.asarray(steps_bth, jnp.float32))
        self.c_btgn = draw(B, TIME, G, n, seed=3).astype(dtype)
        self.a_h, self.skip_h = -1 - 15 * jnp.abs(draw(H, seed=4)), draw(H, seed=5)
        self.state_bhpn = draw(B, H, p, n, seed=6)

    def take(self, firsts, count):
        """The inputs and C of `count` tokens, from each row's own first on."""
        index = jnp.asarray(firsts)[:, None] + jnp.arange(count)
        at = lambda a: jnp.stack([a[row, index[row]] for row in range(B)])  # noqa: E731
        return jax.tree.map(at, self.inputs), at(self.c_btgn)

    def ring(self):
        """Nothing but NaN, which no one may read."""
        return jax.tree.map(lambda a: jnp.full((B, PLACES, *a.shape[2:]), jnp.nan, a.dtype), self.inputs)

    def expected(self):
        """Outputs (b, t, h, p), and states (b, t, h, p, n) after each token, by loops in float64."""
        x, b, dt, c = (np.asarray(a.astype(jnp.float32), np.float64) for a in (*self.inputs, self.c_btgn))
        a, skip = np.asarray(self.a_h, np.float64), np.asarray(self.skip_h, np.float64)
        state, states, y = np.asarray(self.state_bhpn.astype(jnp.float32), np.float64), [], np.zeros(x.shape)
        for t in range(TIME):
            state = state.copy()
            for row, h in np.ndindex(B, H):
                group = h // (H // G)
                state[row, h] *= np.exp(dt[row, t, h] * a[h])
                state[row, h] += dt[row, t, h] * np.outer(x[row, t, h], b[row, t, group])
                y[row, t, h] = state[row, h] @ c[row, t, group] + skip[h] * x[row, t, h]
            states.append(state)
        return y, np.stack(states, axis=1)


@functools.partial(jax.jit, static_argnames="implementation")
def run(row_arrays, piece, c_btgn, ring, cursor_b, active_b=None, *, implementation):
    a_h, skip_h, state_bhpn = row_arrays
    return replay(
        piece, a_h, c_btgn, state_bhpn=state_bhpn, ring=ring, cursor_b=cursor_b, skip_h=skip_h, active_b=active_b,
        implementation=implementation,
    )  # fmt: skip


run_flush = functools.partial(jax.jit, static_argnames="implementation")(flush)


def arrays(row: Row, state_bhpn=None):
    return row.a_h, row.skip_h, row.state_bhpn if state_bhpn is None else state_bhpn


def decode(row: Row, pieces, *, implementation: str):
    """All outputs by pieces of these lengths; a ring that is full for the next is flushed before it."""
    ring, cursor_b, state, ys, first = row.ring(), jnp.zeros(B, jnp.int32), row.state_bhpn, [], 0
    for count in pieces:
        if int(cursor_b[0]) + count > PLACES:
            state, cursor_b = run_flush(ring, row.a_h, cursor_b, state_bhpn=state, implementation=implementation)
            assert not cursor_b.any()
        piece, c_btgn = row.take([first] * B, count)
        y, ring = run(arrays(row, state), piece, c_btgn, ring, cursor_b, implementation=implementation)
        cursor_b, first = cursor_b + count, first + count
        ys.append(y)
    return jnp.concatenate(ys, axis=1)


@every_implementation
class TestEveryImplementation:
    """What each must do by itself; the ring's unused places are NaN in all of them."""

    @pytest.mark.parametrize("pieces", [(1,) * TIME, (3, 2, 1, 5)], ids=str)
    def test_pieces_equal_the_whole_sequence(self, implementation: str, pieces: tuple[int, ...]):
        row = Row()
        y = decode(row, pieces, implementation=implementation)
        assert_within(y, row.expected()[0], LIMIT)

    def test_every_row_has_its_own_cursor(self, implementation: str):
        row, cursor_b = Row(), jnp.array([0, 4, 2], jnp.int32)
        ring, (before, _) = row.ring(), row.take([0] * B, 4)
        for at, count in enumerate(cursor_b):
            ring = jax.tree.map(lambda r, a, at=at, n=int(count): r.at[at, :n].set(a[at, :n]), ring, before)
        piece, c_btgn = row.take(cursor_b, 2)
        y, after = run(arrays(row), piece, c_btgn, ring, cursor_b, implementation=implementation)
        want = np.stack([row.expected()[0][at, int(n) : int(n) + 2] for at, n in enumerate(cursor_b)])
        assert_within(y, want, LIMIT)
        # The piece is in the ring, and all else is as it was.
        for new, old, part in zip(after, ring, piece, strict=True):
            for at, n in enumerate(np.asarray(cursor_b)):
                np.testing.assert_array_equal(new[at, n : n + 2], part[at])
                np.testing.assert_array_equal(np.delete(new[at], (n, n + 1), 0), np.delete(old[at], (n, n + 1), 0))

    def test_tokens_are_taken_back_by_the_cursor(self, implementation: str):
        row = Row()
        step = functools.partial(run, arrays(row), implementation=implementation)
        piece, c_btgn = row.take([0] * B, 2)
        _, ring = step(piece, c_btgn, row.ring(), jnp.zeros(B, jnp.int32))
        # Four drafts after two tokens, of which rows keep 1, 0 and 3.
        drafts, _ = row.take([2] * B, 4)
        wrong = jax.tree.map(lambda a: a.at[:, 3:].multiply(2), drafts)
        _, ring = step(wrong, row.take([2] * B, 4)[1], ring, jnp.full(B, 2, jnp.int32))
        cursor_b = jnp.array([3, 2, 5], jnp.int32)
        piece, c_btgn = row.take(cursor_b, 1)
        y, ring = step(piece, c_btgn, ring, cursor_b)
        outputs, states = row.expected()
        assert_within(y[:, 0], np.stack([outputs[at, n] for at, n in enumerate(np.asarray(cursor_b))]), LIMIT)
        state, _ = run_flush(ring, row.a_h, cursor_b + 1, state_bhpn=row.state_bhpn, implementation=implementation)
        assert_within(state, np.stack([states[at, n] for at, n in enumerate(np.asarray(cursor_b))]), LIMIT)

    def test_rows_that_rest_keep_their_ring(self, implementation: str):
        row, cursor_b, active_b = Row(), jnp.zeros(B, jnp.int32), jnp.array([True, False, True])
        piece, c_btgn = row.take([0] * B, 3)
        y, ring = run(arrays(row), piece, c_btgn, row.ring(), cursor_b, active_b, implementation=implementation)
        assert not y[1].any() and all(jnp.isnan(part[1]).all() for part in ring)
        want = row.expected()[0][:, :3]
        assert_within(y[::2], want[::2], LIMIT)

    def test_tokens_beyond_the_ring_are_not_stored(self, implementation: str):
        row, (piece, c_btgn), (before, _) = Row(), Row().take([5] * B, 3), Row().take([0] * B, 5)
        ring = jax.tree.map(lambda r, a: r.at[:, :5].set(a), row.ring(), before)
        full = jnp.full(B, 5, jnp.int32)
        y, after = run(arrays(row), piece, c_btgn, ring, full, implementation=implementation)
        assert_within(y, row.expected()[0][:, 5:8], LIMIT)
        for new, old, part in zip(after, ring, piece, strict=True):
            np.testing.assert_array_equal(new[:, :5], old[:, :5])
            np.testing.assert_array_equal(new[:, 5], part[:, 0])

    @pytest.mark.parametrize("steps", [(1e-9, 1e-6), (5.0, 100.0), (1e-9, 100.0)], ids=["weak", "strong", "both"])
    def test_strong_and_weak_decays(self, implementation: str, steps: tuple[float, float]):
        row = Row(steps=steps)
        y = decode(row, (3, 2, 1, 5), implementation=implementation)
        assert_within(y, row.expected()[0], LIMIT)

    def test_bfloat16_is_rounded_at_the_end_only(self, implementation: str):
        row = Row(jnp.bfloat16)
        before, (piece, c_btgn) = row.take([0] * B, 4)[0], row.take([4] * B, 2)
        ring = jax.tree.map(lambda r, a: r.at[:, :4].set(a), row.ring(), before)
        cursor_b = jnp.full(B, 4, jnp.int32)
        y, ring = run(arrays(row), piece, c_btgn, ring, cursor_b, implementation=implementation)
        assert [part.dtype for part in ring] == [jnp.bfloat16, jnp.bfloat16, jnp.float32] and y.dtype == jnp.bfloat16
        want = row.expected()[0][:, 4:6]
        np.testing.assert_allclose(y.astype(jnp.float32), want, rtol=2**-8, atol=LIMIT * np.abs(want).max())

    def test_heads_and_states_that_overhang_their_tiles(self, implementation: str):
        row = Row(p=37, n=200)  # 16 of a head's 37 at once, of which the last third is empty
        y = decode(row, (3, 2), implementation=implementation)
        assert_within(y, row.expected()[0][:, :5], tolerance(jnp.float32, terms=TIME * 200))


@every_implementation
class TestFlush:
    """The checkpoint moves to the cursor."""

    @staticmethod
    def full(row: Row):
        inputs, _ = row.take([0] * B, PLACES)
        return inputs

    @pytest.mark.parametrize("sizes", [{}, {"p": 37, "n": 200}], ids=["small", "overhang"])
    def test_equals_the_recurrence(self, implementation: str, sizes: dict):
        row, cursor_b = Row(**sizes), jnp.array([6, 1, 3], jnp.int32)
        ring = self.full(row)
        ring = jax.tree.map(lambda a: a.at[1, 1:].set(jnp.nan).at[2, 3:].set(jnp.nan), ring)
        state, cursor = run_flush(ring, row.a_h, cursor_b, state_bhpn=row.state_bhpn, implementation=implementation)
        assert state.dtype == jnp.float32 and not cursor.any()
        want = np.stack([row.expected()[1][at, n - 1] for at, n in enumerate(np.asarray(cursor_b))])
        assert_within(state, want, LIMIT)

    def test_what_does_not_move_stays_to_the_bit(self, implementation: str):
        row, flush_b = Row(), jnp.array([True, False, True])
        cursor_b = jnp.array([6, 6, 0], jnp.int32)
        ring = jax.tree.map(lambda a: a.at[1:].set(jnp.nan), self.full(row))
        state, cursor = run_flush(
            ring, row.a_h, cursor_b, state_bhpn=row.state_bhpn, flush_b=flush_b, implementation=implementation
        )
        np.testing.assert_array_equal(state[1:], row.state_bhpn[1:])
        assert cursor.tolist() == [0, 6, 0] and (state[0] != row.state_bhpn[0]).all()

    def test_float16_is_rounded_at_random_once(self, implementation: str):
        row, cursor_b = Row(), jnp.full(B, 4, jnp.int32)
        half = row.state_bhpn.astype(jnp.float16)
        step = functools.partial(run_flush, self.full(row), row.a_h, cursor_b, implementation=implementation)
        words = [jnp.full((B, 2), number, jnp.uint32) for number in range(40)]
        states = [np.asarray(step(state_bhpn=half, seeds_b2=w)[0]) for w in words]
        exact = np.asarray(step(state_bhpn=half.astype(jnp.float32))[0], np.float64)
        assert states[0].dtype == np.float16
        unit = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
        error = np.stack([state.astype(np.float64) - exact for state in states]) / unit
        assert np.abs(error).max() < 1 and abs(error.mean()) <= 4 * 0.5 / np.sqrt(error.size)
        assert np.abs(error.mean(0)).mean() < 0.1  # each element's own

    def test_heads_that_hold_the_same_are_rounded_apart(self, implementation: str):
        row = Row()
        first = lambda a, axis: jnp.broadcast_to(jnp.take(a, jnp.array([0]), axis), a.shape)  # noqa: E731
        ring, state = jax.tree.map(lambda a: first(a, 2), self.full(row)), first(row.state_bhpn, 1)
        state, _ = run_flush(
            ring, first(row.a_h, 0), jnp.full(B, 4, jnp.int32), state_bhpn=state.astype(jnp.float16),
            seeds_b2=jnp.ones((B, 2), jnp.uint32), implementation=implementation,
        )  # fmt: skip
        assert len(np.unique(np.asarray(state[0]).reshape(H, -1), axis=0)) == H


class TestAgainstThePlainUpdate:
    """Replay in float32 is the plain update, up to the order of sums."""

    def test_one_token_from_an_empty_ring(self):
        row = Row()
        piece, c_btgn = row.take([0] * B, 1)
        y, _ = run(arrays(row), piece, c_btgn, row.ring(), jnp.zeros(B, jnp.int32), implementation="parallel")
        x_bhp, b_bgn, dt_bh = (part[:, 0] for part in piece)
        want, _ = ssm_update(
            x_bhp, dt_bh, row.a_h, b_bgn, c_btgn[:, 0], state_bhpn=row.state_bhpn, skip_h=row.skip_h,
            implementation="reference",
        )  # fmt: skip
        assert_within(y[:, 0], np.asarray(want), LIMIT)


class TestLowering:
    """What becomes of both on a GPU, in bfloat16."""

    @pytest.mark.parametrize("tokens", [1, 4])
    def test_replay_is_one_kernel_in_place(self, tokens: int):
        row = Row(jnp.bfloat16)
        piece, c_btgn = row.take([0] * B, tokens)
        run_triton = functools.partial(run, implementation="triton")
        text = lowered(run_triton, arrays(row), piece, c_btgn, row.ring(), jnp.zeros(B, jnp.int32))
        assert kernels(text) == 1 and text.count("output_operand_alias<") == 3

    @pytest.mark.parametrize("kind", [jnp.float32, jnp.float16])
    def test_flush_is_one_kernel_in_place(self, kind):
        row, seeds_b2 = Row(jnp.bfloat16), jnp.zeros((B, 2), jnp.uint32) if kind == jnp.float16 else None

        def run_triton(ring, state_bhpn):
            cursor_b = jnp.full(B, 3, jnp.int32)
            return flush(
                ring, row.a_h, cursor_b, state_bhpn=state_bhpn, seeds_b2=seeds_b2, implementation="triton"
            )  # fmt: skip

        text = lowered(run_triton, row.ring(), row.state_bhpn.astype(kind))
        assert kernels(text) == 1 and text.count("output_operand_alias<") == 1

    def test_types_inside_shard_map(self):
        row = Row()
        piece, c_btgn = row.take([0] * B, 2)

        def run_both(by_row, shared):
            (piece, c_btgn, ring, cursor_b, state_bhpn), (a_h, skip_h) = by_row, shared
            y, ring = replay(
                piece, a_h, c_btgn, state_bhpn=state_bhpn, ring=ring, cursor_b=cursor_b, skip_h=skip_h,
                implementation="triton",
            )  # fmt: skip
            return y, ring, flush(ring, a_h, cursor_b, state_bhpn=state_bhpn, implementation="triton")

        by_row = (piece, c_btgn, row.ring(), jnp.zeros(B, jnp.int32), row.state_bhpn)
        by_row = jax.tree.map(lambda a: a[:2], by_row)
        assert kernels(lowered_on_two(run_both, by_row, (row.a_h, row.skip_h))) == 2


class TestRefusals:
    """One line with the value and what was expected."""

    @pytest.mark.parametrize(
        "part, changes, line",
        [
            ("piece", {"b_blgn": jnp.zeros((B, 2, G, N + 1))}, r"B has shape \(3, 2, 2, 8\): expected \(3, 2, 2, 7\)"),
            ("piece", {"x_blhp": jnp.zeros((2, 2, H, P))}, r"x has shape \(2, 2, 6, 5\): expected \(3, 2, 6, 5\)"),
            ("ring", {"dt_blh": jnp.zeros((B, 5, H))}, r"dt of the ring has shape \(3, 5, 6\): expected \(3, 6, 6\)"),
            ("ring", {"b_blgn": jnp.zeros((B, PLACES, 4, N))}, "6 heads over 4 groups: expected a multiple"),
            ("ring", {"x_blhp": jnp.zeros((B, 0, H, P))}, "with l >= 1"),
        ],
    )
    def test_of_what_does_not_fit(self, part: str, changes: dict, line: str):
        row = Row()
        piece, c_btgn = row.take([0] * B, 2)
        parts = {"piece": piece, "ring": row.ring()}
        parts[part] = parts[part]._replace(**changes)
        with pytest.raises(ValueError, match=line):
            replay(
                parts["piece"], row.a_h, c_btgn, state_bhpn=row.state_bhpn, ring=parts["ring"],
                cursor_b=jnp.zeros(B, jnp.int32), implementation="recurrence",
            )  # fmt: skip

    def test_both_know_the_same_names(self):
        assert IMPLEMENTATIONS.keys() == FLUSH_IMPLEMENTATIONS.keys()

    def test_of_a_float16_state_without_seeds(self):
        row = Row()
        with pytest.raises(ValueError, match="state of float16 with no seeds: expected seeds for float16"):
            flush(
                row.ring(), row.a_h, jnp.zeros(B, jnp.int32), state_bhpn=row.state_bhpn.astype(jnp.float16),
                implementation="recurrence",
            )  # fmt: skip

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
    def test_of_triton_without_a_gpu(self):
        row = Row()
        cursor_b = jnp.zeros(B, jnp.int32)
        with pytest.raises(ValueError, match="implementation='triton' needs a GPU and finds 'cpu'"):
            flush(row.ring(), row.a_h, cursor_b, state_bhpn=row.state_bhpn, implementation="triton")
