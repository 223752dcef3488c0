"""The grouped matmul for few rows: tiles, groups of which most are empty, and what becomes of it on a GPU.

Axes: n rows, d width in, f width out, e groups. What it shares with other implementations is in test_grouped_matmul.
"""

from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.experimental import pallas as pl
from tests.kernels.lowering import kernels, lowered, lowered_on_two
from tests.kernels.rounding import assert_close

from orogen.kernels.grouped_matmul import few_rows, grouped_matmul
from orogen.kernels.grouped_matmul.operands import RowGroups


@pytest.mark.parametrize(
    "rows, sizes",
    [
        (6, {3: 1, 17: 2, 40: 3}),
        (1, {63: 1}),
        (100, {0: 33, 1: 16, 62: 17, 63: 1, None: 33}),
        (70, {5: 70}),
        (7, {None: 7}),
    ],
    ids=str,
)
def test_few_rows_of_many_groups(rows, sizes, monkeypatch):
    """Several steps along d, an empty last split, and several blocks of columns, whose tiles overhang."""
    monkeypatch.setattr(few_rows, "TILE", 32 * 16 * 4)
    monkeypatch.setattr(few_rows, "COLUMNS", 32)
    rng, (width, out, groups) = np.random.default_rng(1), (37, 70, 64)
    rows_nd, weights_edf = rng.normal(size=(rows, width)), rng.normal(size=(groups, width, out))
    sizes_e = np.array([sizes.get(group, 0) for group in range(groups)])
    wanted, group_n = np.zeros((rows, out)), np.repeat(np.arange(groups), sizes_e)
    for row, group in enumerate(group_n):
        wanted[row] = rows_nd[row] @ weights_edf[group]
    rows_nd[sizes_e.sum() :] = np.nan
    weights_edf[sizes_e == 0] = np.nan  # which are not to be read
    inputs = (jnp.asarray(a, jnp.float32) for a in (rows_nd, weights_edf))
    launch = few_rows.choose_launch(rows_nd, weights_edf.astype(np.float32))
    assert (launch.depth, launch.columns, launch.splits) == (16, 32, 4)
    actual = grouped_matmul(*inputs, jnp.asarray(sizes_e, jnp.int32), implementation="triton_small_interpreted")
    assert_close(actual, wanted, terms=width)


@pytest.mark.parametrize("implementation", ["triton_small_interpreted", "reference"])
def test_rows_that_name_their_groups(implementation, monkeypatch):
    """Three results a row, some of no group; columns and splits as above."""
    monkeypatch.setattr(few_rows, "TILE", 32 * 16 * 4)
    monkeypatch.setattr(few_rows, "COLUMNS", 32)
    rng, (width, out, groups) = np.random.default_rng(2), (37, 70, 9)
    rows_nd, weights_edf = rng.normal(size=(4, width)), rng.normal(size=(groups, width, out))
    group_r = np.array([3, 9, 0, 3, 8, 9, 9, 9, 9, 4, 4, 2])
    rows_nd[2] = np.nan  # whose results are all of no group
    if implementation != "reference":
        weights_edf[[1, 5, 6, 7]] = np.nan  # which are not to be read
    wanted = np.zeros((12, out))
    for result, group in enumerate(group_r):
        if group < groups:
            wanted[result] = rows_nd[result // 3] @ weights_edf[group]
    inputs = (jnp.asarray(a, jnp.float32) for a in (rows_nd, weights_edf))
    run = partial(grouped_matmul, group_sizes=RowGroups(jnp.asarray(group_r)), implementation=implementation)
    actual, gradients = jax.vjp(run, *inputs)
    assert_close(actual, wanted, terms=width)
    dy_rf = rng.normal(size=(12, out))
    dx_nd, dw_edf = np.zeros((4, width)), np.zeros((groups, width, out))
    for result, group in enumerate(group_r):
        if group < groups:
            dx_nd[result // 3] += weights_edf[group] @ dy_rf[result]
            dw_edf[group] += np.outer(rows_nd[result // 3], dy_rf[result])
    if implementation == "reference":  # which multiplies every weight, with zeros
        assert_close(gradients(jnp.asarray(dy_rf, jnp.float32))[0], dx_nd, terms=3 * out)
    assert_close(gradients(jnp.asarray(dy_rf, jnp.float32))[1], dw_edf, terms=3)


@pytest.mark.parametrize(
    ("rows", "block", "splits"), [(6, 16, 4), (48, 16, 4), (96, 16, 4), (384, 16, 1), (1536, 32, 1), (98304, 64, 1)]
)
def test_tiles_of_64_experts(rows, block, splits):
    """At 1, 8, 16, 64, 256 and 16,384 tokens of 6 experts."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    launch = few_rows.choose_launch(array(rows, 2048), array(64, 2048, 1024))
    assert (launch.rows, launch.columns, launch.splits) == (block, 128, splits)
    assert launch.blocks == min(rows, rows // block + 65)


@pytest.mark.parametrize("rows", [6, 1536])
def test_is_one_kernel_on_a_gpu(rows):
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    run = partial(grouped_matmul, implementation="triton_small")
    text = lowered(run, array(rows, 2048), array(64, 2048, 1024), jax.ShapeDtypeStruct((64,), jnp.int32))
    assert kernels(text) == 1
    named = RowGroups(jax.ShapeDtypeStruct((6 * rows,), jnp.int32))
    assert kernels(lowered(run, array(rows, 2048), array(64, 2048, 1024), named)) == 1


def test_types_inside_shard_map():
    rows_nd, weights_edf = jnp.zeros((58, 5)), jnp.zeros((4, 5, 7))

    def run(by_row, weights_edf):
        rows_nd, sizes_1e = by_row
        return grouped_matmul(rows_nd, weights_edf, sizes_1e[0], implementation="triton_small")

    sizes_2e = jnp.zeros((2, 4), jnp.int32)
    assert kernels(lowered_on_two(run, (rows_nd, sizes_2e), weights_edf)) == 1


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_in_one_block(seed):
    """By what each program finds out; rows of no group are those of group 9."""
    rng = np.random.default_rng(seed)
    sizes_e = rng.multinomial(rng.integers(1, 200), rng.dirichlet(np.full(9, 0.4)))
    rows = int(sizes_e.sum() + rng.integers(0, 40))
    launch = few_rows.Launch(
        rows=16, columns=32, depth=16, splits=1, blocks=rows // 16 + 10, results_per_row=0, sizes=(5, 7, 9, rows)
    )

    def kernel(sizes_ref, found_ref):
        for k, number in enumerate(few_rows._block(sizes_ref, launch)):
            found_ref[np.int32(k)] = number

    found_i3 = pl.pallas_call(
        kernel,
        grid=(launch.blocks,),
        in_specs=[pl.BlockSpec((16,), lambda i: (0,))],
        out_specs=pl.BlockSpec((None, 3), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((launch.blocks, 3), jnp.int32),
        interpret=True,
    )(jnp.asarray(sizes_e, jnp.int32))
    group_n, seen = np.repeat(np.arange(10), [*sizes_e, rows - sizes_e.sum()]), []
    for group, start, stop in np.asarray(found_i3):
        assert stop <= start + 16 and (group_n[start:stop] == group).all()
        seen += range(start, stop)
    assert seen == list(range(rows))
