"""RMS norm over groups: every implementation by hand, against the formula in float64, and in sums of many tokens.

Axes: n tokens, g groups, c channels.
"""

import functools

import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from tests.helpers import implementations
from tests.kernels.rounding import assert_close, assert_within, tolerance

from orogen.kernels.rms_norm import IMPLEMENTATIONS, rms_norm

every_implementation = pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])


def draw(*shape: int, seed: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def operands(tokens: int, channels: int, *, gated: bool) -> tuple[Array, ...]:
    gate = (draw(tokens, channels, seed=3),) if gated else ()
    return draw(tokens, channels, seed=0), draw(channels, seed=1), *gate


def formula(x_nc, weight_c, gate_nc=None, *, group_size: int, epsilon: float) -> np.ndarray:
    """In numpy's float64."""
    u_nc = np.asarray(x_nc, np.float64)
    if gate_nc is not None:
        gate_nc = np.asarray(gate_nc, np.float64)
        u_nc = u_nc * gate_nc / (1 + np.exp(-gate_nc))
    u_ngc = u_nc.reshape(len(u_nc), -1, group_size)
    return (u_ngc / np.sqrt((u_ngc**2).mean(-1, keepdims=True) + epsilon)).reshape(u_nc.shape) * np.asarray(weight_c)


def in_float64(x_nc, weight_c, gate_nc=None, *, group_size: int, epsilon: float):
    """The formula, for JAX to differentiate."""
    u_nc = x_nc if gate_nc is None else x_nc * gate_nc / (1 + jnp.exp(-gate_nc))
    u_ngc = u_nc.reshape(len(u_nc), -1, group_size)
    return (u_ngc / jnp.sqrt((u_ngc**2).mean(-1, keepdims=True) + epsilon)).reshape(u_nc.shape) * weight_c


def assert_close_rows(got, want) -> None:
    """Each row within 1e-5 of its largest element, unless float32 cannot hold it."""
    got, want = (np.atleast_2d(np.asarray(a, np.float64)) for a in (got, want))
    largest, error = np.abs(want).max(-1), np.abs(got - want).max(-1)
    assert (error <= np.maximum(1e-5 * largest, 1e-36)).all(), (error, largest)


@every_implementation
class TestEveryImplementation:
    """What each must do by itself."""

    def test_by_hand(self, implementation: str):
        # Groups (3, 3) and (1, 7): root mean squares 3 and 5.
        y = rms_norm(
            jnp.array([[3.0, 3.0, 1.0, 7.0]]), jnp.array([1.0, 2.0, 3.0, 4.0]), group_size=2, epsilon=0.0,
            implementation=implementation,
        )  # fmt: skip
        np.testing.assert_allclose(y, [[1, 2, 3 / 5, 28 / 5]], rtol=1e-6)

    # Blocks of 16 tokens: less than one, one and a token, several; groups that are no power of two.
    @gated_or_not
    @pytest.mark.parametrize(
        "tokens, channels, group_size", [(1, 6, 6), (17, 24, 8), (40, 21, 7), (5, 3000, 3000), (33, 12, 1)]
    )
    def test_equals_the_formula(self, implementation: str, gated: bool, tokens: int, channels: int, group_size: int):
        arrays, settings = operands(tokens, channels, gated=gated), {"group_size": group_size, "epsilon": 1e-3}
        got = rms_norm(*arrays, **settings, implementation=implementation)
        assert_close(got, formula(*arrays, **settings), terms=group_size)

    @gated_or_not
    @pytest.mark.parametrize(
        "tokens, channels, group_size, epsilon",
        [(17, 24, 8, 1e-3), (40, 21, 7, 1e-3), (70, 10, 10, 1e-3), (5, 9, 9, 0.0)],
    )
    def test_gradients_equal_differences(
        self, implementation: str, gated: bool, tokens: int, channels: int, group_size: int, epsilon: float
    ):
        arrays, settings = operands(tokens, channels, gated=gated), {"group_size": group_size, "epsilon": epsilon}
        dy_nc = draw(tokens, channels, seed=4)
        run = functools.partial(rms_norm, **settings, implementation=implementation)
        gradients = jax.vjp(run, *arrays)[1](dy_nc)
        for number, (array, gradient) in enumerate(zip(arrays, gradients, strict=True)):
            # Along a random direction, in float64: the gradient's product with it.
            direction, step = np.asarray(draw(*array.shape, seed=5 + number), np.float64), 1e-5
            sides = []
            for sign in (1, -1):
                moved = [np.asarray(a, np.float64) for a in arrays]
                moved[number] = moved[number] + sign * step * direction
                sides.append(np.sum(formula(*moved, **settings) * np.asarray(dy_nc)))
            want = (sides[0] - sides[1]) / (2 * step)
            scale = np.linalg.norm(np.asarray(gradient) * direction)
            assert abs(np.sum(np.asarray(gradient, np.float64) * direction) - want) <= 1e-5 * scale * np.sqrt(tokens)

    @gated_or_not
    @pytest.mark.parametrize("epsilon", [1e-5, 1e-12, 1e-24, 1e-30, 0.0])
    def test_tiny_rows_lose_nothing(self, implementation: str, gated: bool, epsilon: float):
        """Of sizes whose squares float32 has not: results and gradients as in float64."""
        sizes = np.array([1.0, 1e-12, 1e-20, 1e-30, 1e-33, *([0.0] if epsilon else [])])
        x, weight, *gate = operands(len(sizes), 6, gated=gated)
        x = jnp.asarray(sizes[:, None] * np.asarray(x), jnp.float32)
        settings, dy = {"group_size": 3, "epsilon": epsilon}, np.asarray(draw(len(sizes), 6, seed=4), np.float64)
        run = functools.partial(rms_norm, **settings, implementation=implementation)
        y, pullback = jax.vjp(run, x, weight, *gate)
        gradients = pullback(jnp.asarray(dy, jnp.float32))
        assert_close_rows(y, formula(x, weight, *gate, **settings))
        with jax.enable_x64(True):
            wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, weight, *gate)]
            wanted = jax.vjp(functools.partial(in_float64, **settings), *wide)[1](jnp.asarray(dy))
        for got, want in zip(gradients, wanted, strict=True):
            assert_close_rows(got, want)

    @gated_or_not
    def test_bfloat16_is_rounded_at_the_ends_only(self, implementation: str, gated: bool):
        x, weight, *gate = operands(20, 12, gated=gated)
        half = [x.astype(jnp.bfloat16), weight, *(g.astype(jnp.bfloat16) for g in gate)]
        dy = draw(20, 12, seed=4).astype(jnp.bfloat16)
        run = functools.partial(rms_norm, group_size=4, epsilon=1e-3, implementation=implementation)
        y, pullback = jax.vjp(run, *half)
        want, want_pullback = jax.vjp(run, *(h.astype(jnp.float32) for h in half))
        gradients = pullback(dy)
        assert y.dtype == gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
        for got, expected in zip((y, *gradients), (want, *want_pullback(dy.astype(jnp.float32))), strict=True):
            assert_within(got, expected, tolerance(jnp.bfloat16, terms=1))

    def test_axes_before_the_channels_are_tokens(self, implementation: str):
        run = functools.partial(rms_norm, group_size=3, epsilon=1e-3, implementation=implementation)
        x, weight = operands(10, 6, gated=False)
        np.testing.assert_array_equal(run(x.reshape(5, 2, 6), weight), run(x, weight).reshape(5, 2, 6))


# The interpreter of Pallas mixes varying and unvarying arrays, which check_vma refuses.
@pytest.mark.parametrize("implementation", implementations(set(IMPLEMENTATIONS) - {"triton_interpreted"}))
def test_gradients_inside_shard_map(implementation: str):
    def loss(x, weight, gate, dy):
        return jnp.vdot(rms_norm(x, weight, gate, group_size=4, epsilon=1e-3, implementation=implementation), dy)

    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(
        jax.grad(loss, argnums=(0, 1, 2)), mesh=Mesh(np.asarray(jax.devices()[:2]), ("data",)),
        in_specs=(rows, everywhere, rows, rows), out_specs=(rows, everywhere, rows), check_vma=True,
    )  # fmt: skip
    arguments = (*operands(10, 8, gated=True), draw(10, 8, seed=4))
    for got, want in zip(jax.jit(mapped)(*arguments), jax.grad(loss, (0, 1, 2))(*arguments), strict=True):
        assert_close(got, want, terms=10)


@pytest.mark.parametrize("implementation", implementations(set(IMPLEMENTATIONS) - {"plain"}))
def test_ranks_that_share_a_group_are_refused(implementation: str):
    with pytest.raises(ValueError, match="'triton' normalises whole groups: expected 'plain' where ranks share one"):
        rms_norm(
            jnp.ones((2, 4)), jnp.ones(4), group_size=8, epsilon=0.0, reduce_sum=lambda x: x,
            implementation=implementation,
        )  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight_c": jnp.zeros(5)}, r"weight has shape \(5,\): expected \(6,\) to match x \(2, 6\)"),
        ({"gate": jnp.zeros((3, 6))}, r"gate has shape \(3, 6\): expected \(2, 6\)"),
        ({"group_size": 4}, "group_size=4: expected a divisor of 6 channels"),
        ({"group_size": 12}, "group_size=12: expected a divisor of 6 channels"),
        ({"implementation": "fast"}, r"implementation='fast': expected one of \['plain', 'triton', 'triton_interp"),
    ],
)
def test_refusals(changes: dict, message: str):
    arguments = {"x": jnp.zeros((2, 6)), "weight_c": jnp.ones(6), "group_size": 3, "epsilon": 0.0}
    with pytest.raises(ValueError, match=message):
        rms_norm(**{**arguments, "implementation": "plain", **changes})


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_triton_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="implementation='triton' needs a GPU and finds 'cpu'"):
        rms_norm(jnp.zeros((2, 6)), jnp.ones(6), group_size=6, epsilon=0.0, implementation="triton")
