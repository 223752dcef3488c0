"""Products with rounded operands against products in float64 of operands that the definitions round."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.model.small import config, one_device
from tests.precision import reference

from orogen.config.precision import PrecisionConfig
from orogen.config.rounded import Products, products
from orogen.kernels.grouped_matmul import grouped_matmul
from orogen.precision import expert_rows as rows_module
from orogen.precision.counts import COUNTS, NAMES
from orogen.precision.emulated import How, Offsets, rounded_products
from orogen.precision.expert_rows import GroupedHow, RowOffsets, expert_rows, rounded_grouped
from orogen.precision.words import step_key

B, T, D = 2, 21, 40
WIDTHS = (24, 11)
RNG = np.random.default_rng(1)
X, DY = (RNG.normal(size=(B, T, d)).astype(np.float32) for d in (D, sum(WIDTHS)))
X[1] *= 100  # sequences of different sizes have different scales
W = RNG.normal(size=(D, sum(WIDTHS))).astype(np.float32)
PLAN = one_device(config(pattern="-", mtp_depths=0))
SMALL = {"fp8_blockwise": 8, "mxfp8": 8, "nvfp4": 16}
RECIPES = ("fp8_tensorwise", *SMALL)


def precision(recipe, **changes):
    block = {"block": SMALL[recipe]} if recipe in SMALL else {}
    return PrecisionConfig(recipe=recipe, **block, **changes)


def split(w):
    return tuple(np.split(w, np.cumsum(WIDTHS)[:-1], axis=-1))


def offsets(step=0, rows=B):
    number = jnp.arange(rows * T).reshape(rows, T)
    first = tuple(jnp.uint32(n) for n in (0, WIDTHS[0]))
    return Offsets(step_key(3, jnp.int32(step)), jnp.int32(5), number, jnp.uint32(0), first)


@functools.lru_cache
def run(used: Products, counted=False):
    """The jitted function (x, weights, dy, offsets) -> y, dx, dw[, counters]."""

    @jax.jit
    def call(x, weights, dy, at):
        how, probe = How(used, PLAN, 7, counted), jnp.zeros((len(NAMES), len(COUNTS))) if counted else None
        y, back = jax.vjp(lambda x, w, probe: rounded_products(x, w, how, at, probe), x, weights, probe)
        return y, *back(dy)

    return call


def moved(x, operand, axis):
    """A matrix as it is rounded: transformed along `axis`, filled up first."""
    if not operand.hadamard:
        return x
    size = operand.hadamard
    x = np.pad(x, [(0, -x.shape[i] % size if i == axis else 0) for i in range(2)])
    matrix = np.kron(np.eye(x.shape[axis] // size), reference.hadamard(size, reference.SIGNS[:size]))
    return (matrix @ x if axis == 0 else x @ matrix.T).astype(np.float32)


def hand(parts, operand, axis):
    """An operand in float64: parts (n, d_i) of one sequence or of a weight, which share a tensor's scale, rounded along
    `axis`, side by side."""
    parts = [moved(part, operand, axis) for part in parts]
    largest, block = max(np.abs(part).max() for part in parts), operand.block or 1
    blocks = tuple(block if operand.square or i == axis else 1 for i in range(2))

    def rounded(x):
        if operand.scale == "power":
            return reference.power_scaled(x, operand.element, blocks)
        if operand.scale == "tensor":
            values, scale = reference.tensor_scaled(x, operand.element, largest)
        else:
            values, scale = reference.two_level(x, blocks, largest=largest)
        return values * float(scale)

    return np.concatenate([rounded(part) for part in parts], axis=1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_and_gradients_are_those_of_rounded_operands(recipe):
    """nvfp4 rounds gradients to the nearest here; random rounding is tested below."""
    used = products(recipe, precision(recipe, **({"stochastic": ()} if recipe == "nvfp4" else {})))
    y, dx, dw, _ = run(used)(X, split(W), split(DY), offsets())
    (fx, fw), (gy, gw), (wx, wy) = used.forward, used.input_gradient, used.weight_gradient
    w_forward, w_back = hand(split(W), fw, 0), hand(split(W), gw, 1)
    close = lambda found, exact: np.testing.assert_allclose(found, exact, atol=2e-6 * np.abs(exact).max())  # noqa: E731
    for b in range(B):
        close(np.concatenate(y, -1)[b], hand((X[b],), fx, 1) @ w_forward)
        close(dx[b], hand(split(DY[b]), gy, 1) @ w_back.T)
    close(np.concatenate(dw, -1), sum(hand((X[b],), wx, 0).T @ hand(split(DY[b]), wy, 0) for b in range(B)))


def test_a_late_change_may_round_the_gradients_products_alone():
    used = products("mxfp8", precision("mxfp8"))
    y, *_ = run(Products(input_gradient=used.input_gradient))(X, split(W), split(DY), offsets())
    np.testing.assert_allclose(np.concatenate(y, -1), X @ W, rtol=1e-5, atol=1e-3)


def test_random_gradients_differ_between_steps_and_halves_and_keep_the_mean():
    """One sequence twice: its numbers, hence its random words, differ. The mean over steps is the plain gradient."""
    used = products("nvfp4", precision("nvfp4"))
    only = Products(input_gradient=used.input_gradient)
    # dx is dy itself, side by side.
    weights, dy = split(np.eye(D, sum(WIDTHS), dtype=np.float32)), split(np.stack([DY[0]] * 2))
    found = np.stack([run(only)(np.stack([X[0]] * 2), weights, dy, offsets(step))[1] for step in range(64)])
    again = run(only)(np.stack([X[0]] * 2), weights, dy, offsets(7))[1]
    np.testing.assert_array_equal(found[7], again)
    assert all((found[i] != found[i + 1]).mean() > 0.1 for i in range(8))
    assert (found[:, 0] != found[:, 1]).mean() > 0.1
    # The numbers near their block's largest may be beyond it, since its scale is rounded too; the others keep the mean.
    block = lambda a: np.abs(a).reshape(T, -1, 16).max(2).repeat(16, 1)  # noqa: E731
    padded = [np.pad(part, ((0, 0), (0, -part.shape[1] % 16))) for part in (DY[0][:, :24], DY[0][:, 24:])]
    inside = [np.abs(part) < 0.9 * block(part) for part in padded]
    for part, kept, columns in zip(padded, inside, (slice(0, 24), slice(24, 35)), strict=True):
        error = (found[..., columns] - part[:, : columns.stop - columns.start]) * kept[
            :, : columns.stop - columns.start
        ]
        # Independent errors of 128 draws: their mean is a square root of 128, 11 times, smaller than one of them.
        one, mean = np.linalg.norm(error) / np.sqrt(128), np.linalg.norm(error.mean((0, 1)))
        assert 0.05 < mean / one < 0.13 and one > 0.02 * np.linalg.norm(part)


def test_counters_leave_as_a_gradient():
    """A gradient of which all but one number is too small for its block is flushed, and counted."""
    used = products("nvfp4", precision("nvfp4", stochastic=(), hadamard=0))
    dy = np.full_like(DY, 1e-4)
    dy[:, ::16, ::16] = 1
    *_, counts = run(used, True)(X, split(W), split(dy), offsets())
    row = dict(zip(COUNTS, counts[NAMES.index("input_gradient.dy")].tolist(), strict=True))
    assert row["numbers"] == dy.size and row["zeros"] == 0 and row["nonfinite"] == 0
    # Rows 0 and 16 have a 1 in every block of 16 of each part's columns; other rows hold small numbers alone.
    assert row["flushed"] > 0.05 * dy.size
    x = dict(zip(COUNTS, counts[NAMES.index("forward.x")].tolist(), strict=True))
    assert x["blocks"] == B * T * 3 and x["numbers"] == X.size


def counters(counts, operand):
    return dict(zip(COUNTS, np.asarray(counts)[NAMES.index(operand)].tolist(), strict=True))


def test_what_fills_blocks_up_counts_only_where_a_transform_spreads_numbers():
    """40 columns and 21 tokens fill up to 48 and 32, widths 24 and 11 to 32 and 16. A transform of 4 spreads 11 columns
    over 12, and 21 tokens over 24; no number is 0 before the rounding."""
    roles = ("forward", "input_gradient", "weight_gradient")
    used = products("nvfp4", precision("nvfp4", stochastic=(), hadamard=4, hadamard_roles=roles))
    *_, counts = run(used, True)(X, split(W), split(DY), offsets())
    expected = {
        "forward.x": B * T * 40, "forward.w": 40 * 35, "input_gradient.dy": B * T * 36, "input_gradient.w": 40 * 36,
        "weight_gradient.x": B * 24 * 40, "weight_gradient.dy": B * 24 * 35,
    }  # fmt: skip
    assert {name: counters(counts, name)["numbers"] for name in NAMES} == expected
    assert not any(counters(counts, name)["zeros"] for name in NAMES)


E = 3


@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "nvfp4", "mxfp8"])
def test_experts_rows_do_not_depend_on_their_order_or_their_filling(recipe):
    """Once sorted by token, once in another order with rows of no token among them: equal to the bit. Expert 1 is
    empty."""
    rng = np.random.default_rng(2)
    used = products(recipe, precision(recipe))
    x, dy = rng.normal(size=(30, D)).astype(np.float32), rng.normal(size=(30, 24)).astype(np.float32)
    expert = np.sort(rng.choice([0, 2], size=30))
    number = np.concatenate([rng.permutation(42)[:n] for n in np.bincount(expert, minlength=E)]).astype(np.int32)
    w = rng.normal(size=(E, D, 24)).astype(np.float32)
    order = np.lexsort((number, expert))
    shuffled = np.lexsort((rng.random(30), expert))

    def results(rows, sizes, blanks):
        x_r, dy_r, number_r = x[rows], dy[rows], number[rows]
        if blanks:  # at the end of each expert's rows
            at = np.repeat(np.cumsum(sizes), blanks)
            x_r, dy_r = (np.insert(a, at, 0, axis=0) for a in (x_r, dy_r))
            number_r, sizes = np.insert(number_r, at, -1), sizes + blanks
        unit = used.token_block
        at, filled = expert_rows(jnp.asarray(number_r), jnp.asarray(sizes), experts=E, tokens=42, chunk=21, unit=unit)
        how = GroupedHow(How(used, PLAN, 9, False), filled, "blocks")
        place = RowOffsets(step_key(3, jnp.int32(1)), jnp.int32(2), *(jnp.uint32(n) for n in (4, 0, 0)))

        @jax.jit
        def product(x_r, w, dy_r):
            settings = {"rows": at, "how": how, "offsets": place, "probe": None}
            y, back = jax.vjp(lambda x_r, w: rounded_grouped(x_r, w, jnp.asarray(sizes), **settings), x_r, w)
            return y, *back(dy_r)

        y, dx, dw = product(x_r, w, dy_r)
        kept = number_r >= 0
        return [np.asarray(a)[kept][np.lexsort((number[rows], expert[rows]))] for a in (y, dx)], np.asarray(dw)

    sizes = np.bincount(expert, minlength=E).astype(np.int32)
    (y, dx), dw = results(order, sizes, 0)
    (y_2, dx_2), dw_2 = results(shuffled, sizes, 2)
    np.testing.assert_array_equal(y, y_2)
    np.testing.assert_array_equal(dx, dx_2)
    np.testing.assert_allclose(dw, dw_2, atol=1e-5 * np.abs(dw).max())
    assert not dw[1].any()
    plain = grouped_matmul(jnp.asarray(x[order]), jnp.asarray(w), jnp.asarray(sizes), implementation="reference")
    assert 0.01 < np.linalg.norm(y - plain) / np.linalg.norm(plain) < 0.3


def test_experts_rows_are_rounded_by_tensor():
    """Two tokens of one expert in different tensors, against the definition."""
    used = products("nvfp4", precision("nvfp4"))
    x = RNG.normal(size=(4, 32)).astype(np.float32) * np.array([[1], [1], [50], [50]], np.float32)
    w = np.stack([np.eye(32, dtype=np.float32) * 6])
    at, filled = expert_rows(jnp.asarray([0, 1, 10, 11]), jnp.asarray([4]), experts=1, tokens=20, chunk=10, unit=16)
    how = GroupedHow(How(used, PLAN, 9, False), filled, "blocks")
    place = RowOffsets(step_key(3, jnp.int32(1)), jnp.int32(2), *(jnp.uint32(0),) * 3)
    settings = {"rows": at, "how": how, "offsets": place, "probe": None}
    y = jax.jit(lambda x, w: rounded_grouped(x, w, jnp.asarray([4]), **settings))(x, w) / 6
    for rows in (slice(0, 2), slice(2, 4)):
        values, scale = reference.two_level(x[rows], (1, 16))
        np.testing.assert_allclose(y[rows], values * float(scale), rtol=1e-6)


def one_expert(used, x, dy, w, *, implementation="blocks"):
    """(y, dx, dw, counters) of rows for tokens 0, 1, 10 and 11, by tensors of 10 tokens, and then rows of no token."""
    number = jnp.asarray([0, 1, 10, 11] + [-1] * (len(x) - 4))
    sizes = jnp.asarray([4])
    at, filled = expert_rows(number, sizes, experts=1, tokens=20, chunk=10, unit=used.token_block)
    how = GroupedHow(How(used, PLAN, 9, True), filled, implementation)
    place = RowOffsets(step_key(3, jnp.int32(1)), jnp.int32(2), *(jnp.uint32(0),) * 3)

    @jax.jit
    def product(x, w, dy, probe):
        settings = {"rows": at, "how": how, "offsets": place}
        y, back = jax.vjp(lambda x, w, p: rounded_grouped(x, w, sizes, probe=p, **settings), x, w, probe)
        return y, *back(dy)

    return product(x, w, dy, jnp.zeros((len(NAMES), len(COUNTS))))


def test_rows_of_no_token_and_those_that_fill_blocks_up_do_not_count():
    """Two tokens of each tensor; a transform of 4 spreads them over 4 rows of a block of 16."""
    used = products("nvfp4", precision("nvfp4", stochastic=(), hadamard=4))
    x, dy = RNG.normal(size=(6, 32)).astype(np.float32), RNG.normal(size=(6, 16)).astype(np.float32)
    *_, counts = one_expert(used, x, dy, RNG.normal(size=(1, 32, 16)).astype(np.float32))
    numbers = {name: counters(counts, name)["numbers"] for name in NAMES}
    assert numbers == {
        "forward.x": 4 * 32, "forward.w": 32 * 16, "input_gradient.dy": 4 * 16, "input_gradient.w": 32 * 16,
        "weight_gradient.x": 8 * 32, "weight_gradient.dy": 8 * 16,
    }  # fmt: skip
    assert not any(counters(counts, name)["zeros"] for name in NAMES)
    assert counters(counts, "forward.x")["blocks"] == 4 * 2


def test_a_kernel_without_float32_does_not_round_scales_into_gradients(monkeypatch):
    """The gradient of weights by the kernel for GPUs, replaced here: with bfloat16 rows, that of rounded operands."""
    seen = []

    def replaced(rows, weights, sizes, *, implementation):
        seen.append((implementation, rows.dtype.name, jax.config.jax_default_matmul_precision))
        return grouped_matmul(rows, weights, sizes, implementation="reference")

    monkeypatch.setattr(rows_module, "grouped_matmul", replaced)
    used = products("fp8_tensorwise", precision("fp8_tensorwise"))
    x, dy = (RNG.normal(size=(4, n)).astype(jnp.bfloat16) for n in (32, 16))
    w = RNG.normal(size=(1, 32, 16)).astype(np.float32)
    with jax.default_matmul_precision("default"):  # the suite's own is the highest
        _, _, dw, _ = one_expert(used, x, dy, w, implementation="mosaic")
    expected = 0
    for rows in (slice(0, 2), slice(2, 4)):
        (a, a_scale), (b, b_scale) = (
            reference.tensor_scaled(np.asarray(part[rows], np.float32), kind)
            for part, kind in ((x, "e4m3"), (dy, "e5m2"))
        )
        expected += (a * float(a_scale)).T @ (b * float(b_scale))
    np.testing.assert_allclose(dw[0], expected, atol=1e-6 * np.abs(expected).max())
    assert set(seen) == {("mosaic", "bfloat16", "default"), ("blocks", "float32", "highest")}
