"""One token's step of both recurrences: every implementation against loops in float64; rows that rest; float16 states.

Axes: b batch, h heads, p head size, g groups, n state, i channels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tests.helpers import implementations
from tests.kernels.lowering import kernels, lowered, lowered_on_two
from tests.kernels.rounding import assert_within, tolerance

from orogen.kernels.state_blocks import BLOCK, Blocks, decode, encode
from orogen.kernels.state_update import IMPLEMENTATIONS, SELECTIVE_IMPLEMENTATIONS, selective_update, ssm_update
from orogen.kernels.state_update.reference import bits_of

encode_jit, decode_jit = jax.jit(encode), jax.jit(decode)
every_implementation = pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
# Less than one program of a head, and three of which the last overhangs, as the state does.
SIZES = {"small": {"b": 3, "h": 6, "p": 5, "g": 2, "n": 7}, "blocks": {"b": 2, "h": 2, "p": 37, "g": 1, "n": 100}}
every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


class Update(NamedTuple):
    """A recurrence under test: its function; and shapes of its operands in order and of its state, and the skip."""

    function: Callable
    draw: Callable


def draw_ssm(rng, *, b, h, p, g, n):
    shapes = ((b, h, p), (b, h), (h,), (b, g, n), (b, g, n))
    return shapes, (b, h, p, n), {"skip_h": jnp.asarray(rng.normal(size=h), jnp.float32)}


def draw_selective(rng, *, b, h, p, g, n):
    del rng, g
    return ((b, h * p), (b, h * p), (h * p, n), (b, n), (b, n)), (b, h * p, n), {}


UPDATES = {"ssm": Update(ssm_update, draw_ssm), "selective": Update(selective_update, draw_selective)}
every_update = pytest.mark.parametrize("name", UPDATES)


def operands(name, dtype=jnp.float32, *, seed=0, **sizes):
    """x, dt, a, B, C, and the state with the skip if there is one."""
    rng = np.random.default_rng(seed)
    shapes, state, others = UPDATES[name].draw(rng, **(sizes or SIZES["small"]))
    x, dt, a, b, c = (rng.normal(size=shape) for shape in shapes)
    single = lambda array: jnp.asarray(array, jnp.float32)  # noqa: E731
    inputs = (
        single(x).astype(dtype),
        single(np.abs(dt)),
        single(-np.abs(a)),
        *(single(m).astype(dtype) for m in (b, c)),
    )
    state_name = "state_bhpn" if name == "ssm" else "state_bin"
    return inputs, {state_name: single(rng.normal(size=state)), **others}


def update(name, inputs, others, *, implementation, **changes):
    return _update(name, inputs, {**others, **changes}, implementation)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _update(name, inputs, others, implementation):
    return UPDATES[name].function(*inputs, **others, implementation=implementation)


def expected(name, inputs, others):
    """Outputs and states by loops in float64."""
    x, dt, a, b, c = (np.asarray(array.astype(jnp.float32), np.float64) for array in inputs)
    others = {key: np.asarray(array, np.float64) for key, array in others.items()}
    if name == "selective":
        state = others["state_bin"].copy()
        for row, i, n in np.ndindex(state.shape):
            state[row, i, n] *= np.exp(dt[row, i] * a[i, n])
            state[row, i, n] += dt[row, i] * x[row, i] * b[row, n]
        return np.array([state[row] @ c[row] for row in range(len(x))]), state
    state, y = others["state_bhpn"].copy(), np.zeros(x.shape)
    for row, h, p in np.ndindex(x.shape):
        group = h // (x.shape[1] // b.shape[1])
        state[row, h, p] *= np.exp(dt[row, h] * a[h])
        state[row, h, p] += dt[row, h] * x[row, h, p] * b[row, group]
        y[row, h, p] = state[row, h, p] @ c[row, group] + others["skip_h"][h] * x[row, h, p]
    return y, state


@every_update
@every_implementation
class TestEveryImplementation:
    """What each must do, for both recurrences."""

    @every_size
    def test_equals_loops(self, name: str, implementation: str, sizes: dict):
        inputs, others = operands(name, **sizes)
        y, state = update(name, inputs, others, implementation=implementation)
        assert y.dtype == state.dtype == jnp.float32
        assert_within((y, state), expected(name, inputs, others), tolerance(jnp.float32, terms=sizes["n"]))

    def test_bfloat16_is_rounded_at_the_ends_only(self, name: str, implementation: str):
        inputs, others = operands(name, jnp.bfloat16)
        y, state = update(name, inputs, others, implementation=implementation)
        wanted = expected(name, inputs, others)
        assert y.dtype == jnp.bfloat16 and state.dtype == jnp.float32
        np.testing.assert_allclose(y.astype(jnp.float32), wanted[0], rtol=2**-8, atol=1e-5)
        assert_within(state, wanted[1], tolerance(jnp.float32, terms=3))

    def test_rows_that_rest_keep_their_state_to_the_bit(self, name: str, implementation: str):
        inputs, others = operands(name)
        # A row at rest may hold anything.
        inputs = tuple(array.at[1].set(jnp.nan) if len(array) == 3 else array for array in inputs)
        (key, state), active = next(iter(others.items())), jnp.array([True, False, True])
        run = functools.partial(update, name, inputs, others, implementation=implementation)
        y, after = run(active_b=active)
        np.testing.assert_array_equal(after[1], state[1])
        assert not y[1].any()
        alone = [run(**{key: state, "active_b": active.at[row].set(False)}) for row in (0, 2)]
        for row, (_, other) in zip((0, 2), alone[::-1], strict=True):
            assert (after[row] != state[row]).all()
            np.testing.assert_array_equal(other[row], after[row])

    def test_a_state_in_float16_keeps_what_it_gains_on_average(self, name: str, implementation: str):
        """40 updates of a tenth of a unit in the last place, of which rounding to nearest would leave nothing."""
        inputs, others = operands(name)
        x, dt, a, b, c = inputs
        key = next(iter(others))
        shape, steps, gain = others[key].shape, 40, 0.1 * 2.0**-10
        inputs = jnp.full_like(x, gain), jnp.ones_like(dt), jnp.zeros_like(a), jnp.ones_like(b), jnp.zeros_like(c)
        state, rounded_to = jnp.ones(shape, jnp.float16), set()
        step = functools.partial(update, name, inputs, implementation=implementation)
        for number in range(steps):
            seeds_b2 = jnp.stack([jnp.arange(len(x)), jnp.full(len(x), number)], axis=1).astype(jnp.uint32)
            state = step({**others, key: state}, seeds_b2=seeds_b2)[1]
            rounded_to.add(np.asarray(state).tobytes())
        assert state.dtype == jnp.float16 and len(rounded_to) == steps
        gained = np.asarray(state, np.float64) - 1
        # A number of units that is binomial, of `steps` trials: four deviations of the mean of all elements.
        deviation = 2.0**-10 * np.sqrt(steps * 0.1 * 0.9)
        assert abs(gained.mean() - steps * gain) <= 4 * deviation / np.sqrt(gained.size)
        # Every step rounds anew: bits that came again would make a fourth of all elements gain all or nothing.
        assert gained.std() == pytest.approx(deviation, rel=0.3)
        # Rows, heads and channels have bits of their own.
        parts = gained.reshape(-1, shape[-1])
        assert len(np.unique(parts, axis=0)) == len(parts)

    def test_a_rows_rounding_depends_on_no_other_row(self, name: str, implementation: str):
        inputs, others = operands(name)
        key = next(iter(others))
        others = {**others, key: others[key].astype(jnp.float16)}
        seeds_b2 = jnp.arange(6, dtype=jnp.uint32).reshape(3, 2)
        both = update(name, inputs, others, seeds_b2=seeds_b2, implementation=implementation)
        last = lambda array: array[-1:] if len(array) == 3 else array  # noqa: E731
        alone = update(
            name, tuple(map(last, inputs)), {**others, key: others[key][-1:]}, seeds_b2=seeds_b2[-1:],
            implementation=implementation,
        )  # fmt: skip
        for one, other in zip(alone, both, strict=True):
            np.testing.assert_array_equal(one[0], other[-1])

    def test_a_state_in_int8_is_rounded_as_its_blocks_define(self, name: str, implementation: str):
        """Against the float32 state after the same step, encoded with the same bits: a row of two blocks, one that
        rests, and one whose second block gains an infinite number."""
        inputs, others = operands(name, **{**SIZES["small"], "n": BLOCK + 2})
        key, b = next(iter(others)), inputs[3].at[2, ..., BLOCK + 1].set(jnp.inf)
        inputs = *inputs[:3], b, inputs[4]
        before = encode_jit(others[key] * jnp.where(jnp.arange(BLOCK + 2) < BLOCK, 1.0, 100.0))
        seeds_b2, active = jnp.arange(6, dtype=jnp.uint32).reshape(3, 2), jnp.array([True, False, True])
        run = functools.partial(update, name, inputs, active_b=active, implementation=implementation)
        y, after = run({**others, key: before}, seeds_b2=seeds_b2)
        wanted_y, state = run({**others, key: decode_jit(before)})
        wanted = encode_jit(state, bits_of(state, seeds_b2))
        np.testing.assert_allclose(y[0], wanted_y[0], rtol=1e-5, atol=1e-5 * float(jnp.abs(wanted_y[0]).max()))
        for found, other in zip(after, before, strict=True):
            np.testing.assert_array_equal(found[1], other[1])
        np.testing.assert_allclose(after.scales[::2], wanted.scales[::2], rtol=1e-6)
        assert np.isnan(np.asarray(after.scales)).sum() == np.isnan(np.asarray(after.scales[2, ..., 1])).sum() > 0
        apart = np.abs(np.asarray(after.values[::2], int) - np.asarray(wanted.values[::2], int))
        # Where float32 sums differ in their last bit, a number may be rounded to the other side.
        assert apart.max() <= 1 and apart.mean() < 0.01
        other = np.asarray(run({**others, key: before}, seeds_b2=seeds_b2 + 1)[1].values[0])
        assert (other != np.asarray(after.values[0])).mean() > 0.1


def stored(state, kind):
    return encode_jit(state) if kind == jnp.int8 else state.astype(kind)


@every_update
@pytest.mark.parametrize("kind", [jnp.float32, jnp.float16, jnp.int8])
class TestLowering:
    """What becomes of it on a GPU, in bfloat16."""

    def test_is_one_kernel_in_place(self, name: str, kind):
        inputs, others = operands(name, jnp.bfloat16)
        key = next(iter(others))
        seeds = {} if kind == jnp.float32 else {"seeds_b2": jnp.zeros((3, 2), jnp.uint32)}
        others = {**others, key: stored(others[key], kind), **seeds}
        text = lowered(lambda i, o: update(name, i, o, implementation="triton"), inputs, others)
        assert kernels(text) == 1 and "output_operand_aliases" in text

    def test_types_inside_shard_map(self, name: str, kind):
        inputs, others = operands(name, b=4, h=2, p=3, g=1, n=5)
        key, x, dt, a, b, c = next(iter(others)), *inputs
        seeds = {} if kind == jnp.float32 else {"seeds_b2": jnp.zeros((4, 2), jnp.uint32)}

        def run(by_row, shared):
            x, dt, b, c, others = by_row
            return update(name, (x, dt, shared[0], b, c), {**others, **shared[1]}, implementation="triton")

        rows = {key: stored(others[key], kind), **seeds}
        shared = {k: v for k, v in others.items() if k != key}
        assert kernels(lowered_on_two(run, (x, dt, b, c, rows), (a, shared))) == 1


class TestRefusals:
    """One line with the value and what was expected."""

    @pytest.mark.parametrize(
        "changes, line",
        [
            ({"implementation": "fast"}, "implementation='fast': expected one of"),
            ({"state_bhpn": jnp.zeros((3, 6, 5, 8))}, r"state has shape \(3, 6, 5, 8\): expected \(3, 6, 5, 7\)"),
            ({"state_bhpn": jnp.zeros((3, 6, 5, 7), jnp.bfloat16)}, "state of bfloat16: expected float32 or float16"),
            ({"state_bhpn": jnp.zeros((3, 6, 5, 7), jnp.float16)}, "state of float16 with no seeds: expected seeds"),
            ({"seeds_b2": jnp.zeros((3, 2), jnp.uint32)}, "state of float32 with seeds: expected seeds for float16"),
            ({"state_bhpn": Blocks.zeros((3, 6, 5, 7))}, "state of int8 with no seeds: expected seeds of uint32"),
            ({"active_b": jnp.ones(2, bool)}, r"active has shape \(2,\): expected \(3,\)"),
        ],
    )
    def test_of_what_does_not_fit(self, changes: dict, line: str):
        inputs, others = operands("ssm")
        with pytest.raises(ValueError, match=line):
            update("ssm", inputs, others, **{"implementation": "reference", **changes})

    def test_of_heads_that_groups_do_not_divide(self):
        inputs, others = operands("ssm", b=1, h=5, p=3, g=2, n=4)
        with pytest.raises(ValueError, match="5 heads over 2 groups: expected a multiple"):
            update("ssm", inputs, others, implementation="reference")

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
    @every_update
    def test_of_triton_without_a_gpu(self, name: str):
        inputs, others = operands(name)
        with pytest.raises(ValueError, match="implementation='triton' needs a GPU and finds 'cpu'"):
            update(name, inputs, others, implementation="triton")

    def test_both_know_the_same_names(self):
        assert IMPLEMENTATIONS.keys() == SELECTIVE_IMPLEMENTATIONS.keys()
