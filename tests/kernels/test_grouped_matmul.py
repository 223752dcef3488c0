"""Grouped matrix product: every implementation against loops in float64, and inside shard_map.

Axes: n rows, d width in, f width out, e groups, r ranks.
"""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tests.helpers import implementations, several_devices
from tests.kernels.rounding import assert_close

from orogen.kernels.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, mosaic
from orogen.kernels.grouped_matmul.blocks import grouped_matmul_blocks, split_groups
from orogen.kernels.grouped_matmul.operands import RowGroups

ROWS, WIDTH, OUT, GROUPS = 29, 5, 7, 4

# "mosaic" has a class of its own: it takes half precision only, and a GPU.
NO_GPU = pytest.mark.skipif(jax.default_backend() == "gpu", reason="refused on a GPU")
NAMES = (
    *implementations(set(IMPLEMENTATIONS) - {"mosaic", "ragged_dot"}), "blocks of 4",
    pytest.param("ragged_dot", marks=NO_GPU),
)  # fmt: skip

SIZES = {
    "uneven": (3, 14, 1, 11),
    "around a block": (4, 8, 9, 7),
    "empty first": (0, 13, 5, 11),
    "empty amid and last": (12, 0, 17, 0),
    "all in one": (0, 0, 29, 0),
    "rows left over": (6, 0, 9, 2),
    "none": (0, 0, 0, 0),
}


def multiply(name, rows_nd, weights_edf, sizes):
    """The implementation of that name; "blocks of 4" are several a group, where the default is more than ROWS; "mosaic
    interpreted" are its kernels without a GPU, by programs that have more than one tile."""
    if name == "mosaic interpreted":
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        return mosaic.grouped_matmul_mosaic(rows_nd, weights_edf, sizes, interpret=interpret, programs=3)
    if name != "blocks of 4":
        return grouped_matmul(rows_nd, weights_edf, sizes, implementation=name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, "blocks", partial(grouped_matmul_blocks, block=4))
        return grouped_matmul(rows_nd, weights_edf, sizes, implementation="blocks")


def operands(dtype=jnp.float32, rows=ROWS):
    """Rows, weights and a cotangent of the output."""
    shapes = ((rows, WIDTH), (GROUPS, WIDTH, OUT), (rows, OUT))
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def expected(rows_nd, weights_edf, grad_nf, sizes):
    """Output and gradients of rows and weights by loops, float64."""
    rows_nd, weights_edf, grad_nf = (np.asarray(a, np.float64) for a in (rows_nd, weights_edf, grad_nf))
    out_nf, grad_rows_nd = np.zeros(grad_nf.shape), np.zeros(rows_nd.shape)
    grad_weights_edf = np.zeros(weights_edf.shape)
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            out_nf[row] = rows_nd[row] @ weights_edf[group]
            grad_rows_nd[row] = weights_edf[group] @ grad_nf[row]
            grad_weights_edf[group] += np.outer(rows_nd[row], grad_nf[row])
            row += 1
    return out_nf, grad_rows_nd, grad_weights_edf


@partial(jax.jit, static_argnums=0)
def with_gradients(name, rows_nd, weights_edf, grad_nf, sizes):
    """Output and gradients of rows and weights."""
    run = lambda rows_nd, weights_edf: multiply(name, rows_nd, weights_edf, sizes)  # noqa: E731
    out_nf, transpose = jax.vjp(run, rows_nd, weights_edf)
    return out_nf, *transpose(grad_nf)


LENGTHS = (WIDTH, OUT, ROWS)  # terms of the output, and of the gradients of rows and of weights


@pytest.mark.parametrize("name", NAMES)
class TestGroupedMatmul:
    """What every implementation does."""

    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_equals_loops(self, name, sizes):
        inputs = operands()
        actual = with_gradients(name, *inputs, jnp.array(sizes))
        for a, wanted, length in zip(actual, expected(*inputs, sizes), LENGTHS, strict=True):
            assert_close(a, wanted, terms=length)

    def test_bfloat16_is_accumulated_in_float32(self, name):
        rows_nd, weights_edf, grad_nf = operands(jnp.bfloat16, rows=600)
        sizes = (20, 480, 0, 100)
        actual = with_gradients(name, rows_nd, weights_edf, grad_nf, jnp.array(sizes))
        assert {a.dtype for a in actual} == {jnp.dtype(jnp.bfloat16)}
        for a, wanted in zip(actual, expected(rows_nd, weights_edf, grad_nf, sizes), strict=True):
            # One rounding, at the end, and a float32 sum of 480 terms at most before it.
            half_eps, noise = 2.0**-8, 4 * 2.0**-23 * 480**0.5 * np.abs(wanted).max()
            np.testing.assert_allclose(np.asarray(a, np.float64), wanted, rtol=half_eps, atol=noise)

    def test_rows_of_no_group_may_hold_anything(self, name):
        rows_nd, weights_edf, grad_nf = operands()
        sizes = SIZES["rows left over"]
        wanted = expected(rows_nd, weights_edf, grad_nf, sizes)
        rows_nd, grad_nf = (a.at[sum(sizes) :].set(jnp.nan) for a in (rows_nd, grad_nf))
        out_nf, grad_rows_nd, grad_weights_edf = with_gradients(name, rows_nd, weights_edf, grad_nf, jnp.array(sizes))
        assert not out_nf[sum(sizes) :].any() and not grad_rows_nd[sum(sizes) :].any()
        assert_close(grad_weights_edf, wanted[2], terms=ROWS)

    def test_no_rows(self, name):
        out_nf, grad_rows_nd, grad_weights_edf = with_gradients(name, *operands(rows=0), jnp.array(SIZES["none"]))
        assert out_nf.shape == (0, OUT) and grad_rows_nd.shape == (0, WIDTH) and not grad_weights_edf.any()

    @several_devices
    def test_shards_of_rows_sum_the_weights_gradient(self, name):
        if name == "triton_small_interpreted":
            pytest.skip("the interpreter of Pallas mixes varying and unvarying arrays, which check_vma refuses")
        rows_nd, weights_edf, grad_nf = operands(rows=2 * ROWS)
        sizes_re = (SIZES["uneven"], SIZES["rows left over"])
        run = jax.shard_map(
            lambda rows_nd, weights_edf, grad_nf, sizes_re: with_gradients(
                name, rows_nd, weights_edf, grad_nf, sizes_re[0]
            ),
            mesh=Mesh(np.array(jax.devices()[:2]), ("data",)),
            in_specs=(P("data"), P(), P("data"), P("data")),
            out_specs=(P("data"), P("data"), P()),
            check_vma=True,
        )
        actual = jax.jit(run)(rows_nd, weights_edf, grad_nf, jnp.array(sizes_re, jnp.int32))
        halves = [
            with_gradients(name, rows_nd[part], weights_edf, grad_nf[part], jnp.array(sizes))
            for part, sizes in zip((slice(ROWS), slice(ROWS, None)), sizes_re, strict=True)
        ]
        np.testing.assert_array_equal(actual[0], jnp.concatenate([half[0] for half in halves]))
        np.testing.assert_array_equal(actual[1], jnp.concatenate([half[1] for half in halves]))
        assert_close(actual[2], np.asarray(halves[0][2] + halves[1][2], np.float64), terms=2)


HOPPER = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a Hopper GPU, and JAX_PLATFORMS=cuda,cpu in front of the command"
)


JAX_0_11 = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="needs jax 0.11: make test PYTHON=python3.12 VENV=.venv-3.12 ARGS=tests/kernels/test_grouped_matmul.py",
)


def operands_of_mosaic(widths, groups):
    """300 rows, weights and a cotangent of the output, in bfloat16."""
    rows, (width, out) = 300, widths
    shapes = ((rows, width), (groups, width, out), (rows, out))
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def check_mosaic(name, widths, sizes):
    """Against loops in float64, with NaN in the rows of no group; gives what was run and its results."""
    rows_nd, weights_edf, grad_nf = operands_of_mosaic(widths, len(sizes))
    wanted = expected(rows_nd, weights_edf, grad_nf, sizes)
    used = sum(sizes)
    rows_nd, grad_nf = rows_nd.at[used:].set(jnp.nan), grad_nf.at[used:].set(jnp.nan)
    run = partial(with_gradients, name, rows_nd, weights_edf, grad_nf, jnp.array(sizes, jnp.int32))
    actual = run()
    for a, w in zip(actual, wanted, strict=True):
        noise = 4 * 2.0**-23 * max(*widths, len(rows_nd)) ** 0.5 * np.abs(w).max()
        np.testing.assert_allclose(np.asarray(a, np.float64), w, rtol=2.0**-8, atol=noise)
    return run, actual


@HOPPER
class TestMosaic:
    """At sizes around tiles (128 rows) and the alignment of copies (8)."""

    @pytest.mark.parametrize("widths", [(5, 7), (64, 64), (128, 320), (192, 512), (256, 448), (640, 192)])
    @pytest.mark.parametrize(
        "sizes", [(13, 0, 140, 101), (0, 0, 7, 290), (128, 128, 1, 0), (300, 0, 0, 0), (0, 0, 0, 0)]
    )
    def test_equals_loops_and_repeats(self, widths, sizes):
        run, actual = check_mosaic("mosaic", widths, sizes)
        for a, again in zip(actual, run(), strict=True):
            np.testing.assert_array_equal(a, again)


IN_TURNS, HALVED = (192, 320), (256, 448)  # widths, so that the last tile of columns is partly past the end


@JAX_0_11
class TestInterpretedMosaic:
    """The kernels interpreted, and compiled as far as that goes."""

    @pytest.mark.parametrize("widths", [(5, 7), IN_TURNS, HALVED], ids=["small", "in turns", "halved"])
    @pytest.mark.parametrize("sizes", [(13, 0, 140, 101), (0, 128, 1, 0)], ids=str)
    def test_equals_loops(self, widths, sizes):
        """Of programs with odd and even numbers of tiles."""
        check_mosaic("mosaic interpreted", widths, sizes)

    @pytest.mark.parametrize("widths", [IN_TURNS, HALVED], ids=["in turns", "halved"])
    def test_waits_for_what_it_reads_and_overwrites(self, widths, capsys):
        sizes = jnp.array([13, 0, 280], jnp.int32)
        rows_nd, weights_edf, grad_nf = operands_of_mosaic(widths, len(sizes))
        run = lambda rows_nd: multiply("mosaic interpreted", rows_nd, weights_edf, sizes)  # noqa: E731
        out_nf, transpose = jax.vjp(run, rows_nd)
        # Halved, both warpgroups clear rows of no group in one operand of the weights' gradient, with the same zeros.
        gradients = transpose(grad_nf) if widths == IN_TURNS else ()
        jax.block_until_ready((out_nf, *gradients))  # the interpreter prints while it runs
        races = capsys.readouterr().out.split("RACE DETECTED")[1:]
        # Of memory with two layouts the interpreter tells apart no places, and so no warpgroups.
        assert not [race for race in races if "alias group" not in race]

    @pytest.mark.parametrize("widths", [IN_TURNS, HALVED], ids=["in turns", "halved"])
    def test_lowers_for_a_gpu(self, widths, monkeypatch):
        monkeypatch.setattr(mosaic, "_require_hopper", lambda: None)
        sizes = jnp.array([13, 0, 280], jnp.int32)
        traced = with_gradients.trace("mosaic", *operands_of_mosaic(widths, len(sizes)), sizes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize(
    ("out", "columns"),
    [(128, 128), (192, 192), (256, 256), (512, 256), (640, 192), (1024, 256), (1792, 192), (1856, 192), (2048, 192),
     (2688, 192)],
)  # fmt: skip
def test_the_tile_that_pads_little_is_chosen(out, columns):
    # 1024 is 12.5 % more in columns of 192, 1792 is 7.1 % more, 640 the same as in columns of 256.
    tile = mosaic.choose_tile(out)
    assert tile.columns == columns and tile.turns == (columns != 256)


class TestBlocksOfMosaic:
    """How the groups are cut for the Mosaic GPU kernels."""

    def test_by_hand(self):
        # Group 0 has 13 rows; group 2 begins amid rows 8 to 15; 4 rows are left over and form group 3.
        blocks = mosaic.split_groups(jnp.array([13, 0, 20], jnp.int32), rows=37, block=16)
        count = int(blocks.count[0])
        assert count == 4
        assert blocks.group_i[:count].tolist() == [0, 2, 2, 3]
        assert blocks.first_i[:count].tolist() == [0, 8, 24, 32]
        assert blocks.start_i[:count].tolist() == [0, 13, 24, 33]
        assert blocks.stop_i[:count].tolist() == [13, 24, 33, 37]

    @pytest.mark.parametrize("seed", range(5))
    def test_every_row_is_in_one_block(self, seed):
        rng = np.random.default_rng(seed)
        sizes = rng.multinomial(rng.integers(1, 900), rng.dirichlet(np.full(9, 0.4)))
        rows = int(sizes.sum() + rng.integers(0, 50))
        blocks = mosaic.split_groups(jnp.array(sizes, jnp.int32), rows=rows, block=16)
        count = int(blocks.count[0])
        assert count <= len(blocks.group_i)
        group_n = np.repeat(np.arange(10), [*sizes, rows - sizes.sum()])
        seen = []
        for group, first, start, stop in zip(*(np.asarray(a[:count]) for a in blocks[:4]), strict=True):
            assert first % 8 == 0 and first <= start < stop <= first + 16
            assert (group_n[start:stop] == group).all()
            seen += range(start, stop)
        assert seen == list(range(rows))


def test_equal_groups_by_one_number():
    inputs = operands(rows=GROUPS * 6)
    rows_nd, weights_edf, grad_nf = inputs
    out_nf, transpose = jax.vjp(lambda *a: grouped_matmul(*a, 6, implementation="blocks"), rows_nd, weights_edf)
    for a, wanted, length in zip((out_nf, *transpose(grad_nf)), expected(*inputs, (6,) * GROUPS), LENGTHS, strict=True):
        assert_close(a, wanted, terms=length)


def test_blocks_by_hand():
    blocks = split_groups(jnp.array([3, 0, 5], jnp.int32), rows=9, block=4)
    count = int(blocks.count)
    assert count == 3 and len(blocks.group_i) == 3 + 3
    assert blocks.group_i[:count].tolist() == [0, 2, 2]
    assert blocks.start_i[:count].tolist() == [0, 3, 7]
    assert blocks.stop_i[:count].tolist() == [3, 7, 8]


def test_as_many_blocks_as_there_can_be():
    # 1 row a group: each is a block, and no group has more blocks than the table has room for.
    blocks = split_groups(jnp.array([1, 1, 1, 6], jnp.int32), rows=9, block=4)
    assert int(blocks.count) == 5 and blocks.stop_i[:5].tolist() == [1, 2, 3, 7, 9]


def test_refusals(monkeypatch):
    rows_nd, weights_edf, _ = operands()
    sizes = jnp.array(SIZES["uneven"], jnp.int32)
    with pytest.raises(ValueError, match="implementation='fast': expected one of"):
        grouped_matmul(rows_nd, weights_edf, sizes, implementation="fast")
    with pytest.raises(ValueError, match=r"expected \(n, d\) and \(e, d, f\)"):
        grouped_matmul(rows_nd[:, 1:], weights_edf, sizes, implementation="blocks")
    with pytest.raises(ValueError, match="group_sizes=7: expected 4 groups to make up the 29 rows"):
        grouped_matmul(rows_nd, weights_edf, 7, implementation="blocks")
    with pytest.raises(ValueError, match=r"group_sizes has shape \(3,\)"):
        grouped_matmul(rows_nd, weights_edf, sizes[1:], implementation="blocks")
    with pytest.raises(ValueError, match="implementation='blocks', rows that name their group: expected"):
        grouped_matmul(rows_nd, weights_edf, RowGroups(sizes), implementation="blocks")
    with pytest.raises(ValueError, match=r"group_r has shape \(4,\): expected \(r,\), a multiple of the 29 rows"):
        grouped_matmul(rows_nd, weights_edf, RowGroups(sizes), implementation="reference")
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="implementation='mosaic' needs a Hopper GPU and finds 'cpu'"):
            grouped_matmul(rows_nd, weights_edf, sizes, implementation="mosaic")
        with pytest.raises(ValueError, match="implementation='triton_small' needs a GPU and finds 'cpu'"):
            grouped_matmul(rows_nd, weights_edf, sizes, implementation="triton_small")
    monkeypatch.setattr(mosaic, "_require_hopper", lambda: None)
    with pytest.raises(ValueError, match="rows of float32 and weights of float32: expected both bfloat16"):
        grouped_matmul(rows_nd, weights_edf, sizes, implementation="mosaic")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="every row by every weight on a GPU: expected 'blocks'"):
        grouped_matmul(rows_nd, weights_edf, sizes, implementation="ragged_dot")
