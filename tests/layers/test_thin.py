"""Products by the kernels of decoding: weights in 8 bits as they lie in memory, and several of one x at once.

Letters: b batch, t time, d width in, f width out, g groups of rows, e experts, r rows.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tests.kernels.rounding import assert_close

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.kernels import grouped_matmul, thin_matmul
from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.layers import thin
from orogen.layers.linear import grouped, linear, linears_and_plain
from orogen.layers.parameter import parameter
from orogen.parallel.plan import make_plan
from orogen.precision.scaled import Scaled

WIDTH = 96


@pytest.fixture
def ran(monkeypatch):
    """The kernels that ran, interpreted, by name."""
    names: list[str] = []

    def counted(name, table, key):
        run = table[f"{key}_interpreted"]
        monkeypatch.setitem(table, key, lambda *operands: names.append(name) or run(*operands))

    counted("thin", thin_matmul.IMPLEMENTATIONS, "triton")
    counted("grouped", grouped_matmul.SCALED, "triton_small")
    return names


@functools.cache
def plans():
    """Of a step of decoding on a GPU, and of anything else."""
    model = ModelConfig(pattern="-", vocab_size=8, hidden_size=8, intermediate_size=8)
    plain = make_plan(PlanConfig(), model)
    few = dataclasses.replace(plain.config, grouped_matmul="triton_small")
    return dataclasses.replace(plain, config=few), plain


def stored(*shape, groups=1, seed=1):
    """A weight in E4M3."""
    rng, lead = np.random.default_rng(seed), shape[:-2]
    values = jnp.asarray(rng.normal(size=shape), jnp.float32).astype(jnp.float8_e4m3fn)
    return Scaled(values, jnp.asarray(rng.uniform(0.5, 2, (*lead, groups, shape[-1])), jnp.float32))


def weight(value, *axes):
    made = parameter(jnp.zeros(value.shape), axes)
    made.set_value(value)
    return made


@pytest.mark.parametrize(("groups", "by_kernel"), [(1, True), (3, True), (12, False)])
def test_a_weight_in_8_bits_is_read_as_it_lies(ran, groups, by_kernel):
    """Where tiles of d are no smaller than what shares a scale."""
    few, plain = plans()
    x_btd = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, WIDTH)), jnp.float32)
    made = weight(stored(WIDTH, 20, groups=groups), "embed", "mlp")
    wanted = linear(x_btd, made, plain)
    assert ran == []
    assert_close(linear(x_btd, made, few), wanted, terms=WIDTH)
    assert ran == ["thin"] * by_kernel


def test_more_rows_than_the_kernel_is_for_are_multiplied_after_decoding(ran, monkeypatch):
    few, plain = plans()
    monkeypatch.setattr(thin, "ROWS_IN_8_BITS", 5)
    made = weight(stored(WIDTH, 20), "embed", "mlp")
    x_btd = jnp.ones((2, 3, WIDTH))
    np.testing.assert_array_equal(linear(x_btd, made, few), linear(x_btd, made, plain))
    assert ran == []


def test_weights_are_decoded_in_memory_on_a_gpu_that_cannot_convert_them(ran, monkeypatch):
    few, plain = plans()
    monkeypatch.setattr(thin, "converts_e4m3", lambda: False)
    products = grouped_matmul.IMPLEMENTATIONS
    monkeypatch.setitem(products, "triton_small", products["triton_small_interpreted"])
    x_btd = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, WIDTH)), jnp.float32)
    made = weight(stored(WIDTH, 20), "embed", "mlp")
    np.testing.assert_array_equal(linear(x_btd, made, few), linear(x_btd, made, plain))
    experts, sizes = weight(stored(5, WIDTH, 20), "expert", "embed", "mlp"), jnp.array([2, 0, 1, 3, 0])
    slow = dataclasses.replace(plain, config=dataclasses.replace(plain.config, grouped_matmul="reference"))
    x_rd = x_btd.reshape(6, WIDTH)
    assert_close(grouped(x_rd, experts, sizes, few), grouped(x_rd, experts, sizes, slow), terms=WIDTH)
    assert ran == []


@pytest.mark.parametrize("rows", [0, 6])
def test_projections_of_one_x_are_one_kernel(ran, rows, monkeypatch):
    """Of plain weights too, of up to so many rows; and they are those of each alone."""
    few, plain = plans()
    monkeypatch.setattr(thin, "ROWS", rows)
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x_btd, made = draw(2, 3, WIDTH), [weight(draw(WIDTH, out), "embed", "mlp") for out in (20, 7, 3)]
    run = lambda plan: linears_and_plain(x_btd, made[:2], made[2], plan, "mamba_in", call=1)  # noqa: E731
    found = run(few)
    assert ran == ["thin"] * (rows == 6)
    for actual, expected, one in zip(found, run(plain), made, strict=True):
        np.testing.assert_array_equal(expected, linear(x_btd, one, plain))
        assert_close(actual, expected, terms=WIDTH)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_experts_in_8_bits_are_read_as_they_lie(ran, named, groups):
    few, plain = plans()
    made = weight(stored(5, WIDTH, 20, groups=groups), "expert", "embed", "mlp")
    x_rd = jnp.asarray(np.random.default_rng(0).normal(size=(7, WIDTH)), jnp.float32)
    group_r = np.array([0, 0, 2, 3, 3, 3, 5])  # the last of none
    sizes = RowGroups(jnp.asarray(group_r)) if named else jnp.asarray(np.bincount(group_r, minlength=6)[:5], jnp.int32)
    slow = dataclasses.replace(plain, config=dataclasses.replace(plain.config, grouped_matmul="reference"))
    wanted = grouped(x_rd, made, sizes, slow)
    assert ran == []
    assert_close(grouped(x_rd, made, sizes, few), wanted, terms=WIDTH)
    assert ran == ["grouped"]


def test_scales_that_do_not_fit_are_refused():
    run = functools.partial(grouped_matmul.grouped_matmul_scaled, implementation="triton_small_interpreted")
    values, sizes = jnp.zeros((5, 6, 4), jnp.float8_e4m3fn), jnp.zeros(5, jnp.int32)
    with pytest.raises(ValueError, match="g dividing d"):
        run(jnp.zeros((2, 6)), thin_matmul.Matrix(values, jnp.ones((5, 4, 4))), sizes)
    with pytest.raises(ValueError, match="scales None"):
        run(jnp.zeros((2, 6)), thin_matmul.Matrix(jnp.zeros((5, 6, 4))), sizes)
    with pytest.raises(ValueError, match=r"scales \(5, 1, 3\): expected"):
        run(jnp.zeros((2, 6)), thin_matmul.Matrix(values, jnp.ones((5, 1, 3))), sizes)
    with pytest.raises(ValueError, match="weights with scales in float8_e5m2: expected float8_e4m3fn"):
        run(jnp.zeros((2, 6)), thin_matmul.Matrix(values.astype(jnp.float8_e5m2), jnp.ones((5, 1, 4))), sizes)
    with pytest.raises(ValueError, match="one per 2 rows: expected one per column"):
        run(jnp.zeros((2, 6)), thin_matmul.Matrix(values, jnp.ones((5, 3, 4))), sizes)
    with pytest.raises(ValueError, match=r"group_sizes has shape \(4,\): expected \(5,\)"):
        run(jnp.zeros((2, 6)), thin_matmul.Matrix(values, jnp.ones((5, 1, 4))), sizes[:4])


def test_the_experts_kernel_reads_8_bits_on_a_gpu():
    from tests.kernels.lowering import kernels, lowered

    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    weights = thin_matmul.Matrix(array(64, 2048, 1024, dtype=jnp.float8_e4m3fn), array(64, 1, 1024, dtype=jnp.float32))
    run = functools.partial(grouped_matmul.grouped_matmul_scaled, implementation="triton_small")
    for sizes in (array(64, dtype=jnp.int32), RowGroups(array(6, dtype=jnp.int32))):
        assert kernels(lowered(run, array(6, 2048), weights, sizes)) == 1
