"""Products of few rows with several matrices, some in E4M3. Axes: n rows, d width in, f width out."""

from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tests.kernels.lowering import kernels, lowered, lowered_on_two
from tests.kernels.rounding import assert_close

from orogen.kernels.pallas_triton import converts_e4m3
from orogen.kernels.thin_matmul import Matrix, thin_matmul, triton

NAMES = ("reference", "triton_interpreted")


def drawn(rows: int, width: int, outs, *, groups=None, seed=1):
    """Rows, matrices, and what the products are in float64. groups: of scales, None for matrices in float32."""
    rng = np.random.default_rng(seed)
    rows_nd, matrices, wanted = rng.normal(size=(rows, width)).astype(np.float32), [], []
    for out in outs:
        values = rng.normal(size=(width, out)).astype(np.float32)
        if groups is None:
            matrices.append(Matrix(jnp.asarray(values)))
            exact = values.astype(np.float64)
        else:
            eights = jnp.asarray(values).astype(jnp.float8_e4m3fn)
            scale = rng.uniform(0.1, 4, size=(groups, out)).astype(np.float32)
            matrices.append(Matrix(eights, jnp.asarray(scale)))
            exact = np.asarray(eights, np.float64) * np.repeat(scale, width // groups, axis=0)
        wanted.append(rows_nd.astype(np.float64) @ exact)
    return jnp.asarray(rows_nd), matrices, wanted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "width", "groups"), [(3, 96, None), (70, 40, None), (3, 96, 1), (5, 96, 3)])
def test_products_of_matrices_of_different_widths(name, rows, width, groups, monkeypatch):
    """Several tiles of d and of columns, which overhang; more rows than a program has; scales of columns and blocks."""
    monkeypatch.setattr(triton, "COLUMNS", 32)
    monkeypatch.setattr(triton, "TILE", 32 * 16 * 4)
    rows_nd, matrices, wanted = drawn(rows, width, (70, 32, 5), groups=groups)
    found = thin_matmul(rows_nd, matrices, implementation=name)
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.dtype == rows_nd.dtype
        assert_close(actual, expected, terms=4 * width)


def test_tiles_of_the_projections_of_r1():
    """z, x, B, C and dt of 4 tokens, and an output projection; one tile of d has one scale."""
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    outs = (4096, 4096, 1024, 1024, 64)
    launch = triton.choose_launch(array(4, 2048), [Matrix(array(2048, out)) for out in outs])
    assert (launch.rows, launch.blocks, launch.splits) == (16, 81, 4)
    assert [part.first for part in launch.parts] == [0, 32, 64, 72, 80]
    assert {part.depth for part in launch.parts} == {64}
    eights = Matrix(array(4096, 2048, dtype=jnp.float8_e4m3fn), array(4096 // 32, 2048, dtype=jnp.float32))
    launch = triton.choose_launch(array(4, 4096), [eights])
    assert (launch.blocks, launch.splits, launch.parts[0].depth) == (16, 16, 32)
    assert triton.takes(eights) and not triton.takes(Matrix(eights.values, array(512, 2048, dtype=jnp.float32)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_is_one_kernel_on_a_gpu(dtype):
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    scale = lambda out: array(1, out, dtype=jnp.float32) if dtype != jnp.bfloat16 else None  # noqa: E731
    matrices = [Matrix(array(2048, out, dtype=dtype), scale(out)) for out in (4096, 1000, 64)]
    run = partial(thin_matmul, implementation="triton")
    assert kernels(lowered(run, array(4, 2048), matrices)) == 1


def test_types_inside_shard_map():
    run = lambda rows_nd, weight: thin_matmul(rows_nd, [Matrix(weight)], implementation="triton")[0]  # noqa: E731
    assert kernels(lowered_on_two(run, jnp.zeros((58, 16)), jnp.zeros((16, 7)))) == 1


def test_what_does_not_fit_is_refused():
    rows_nd, eights = jnp.zeros((2, 6)), jnp.zeros((6, 3), jnp.float8_e4m3fn)
    run = partial(thin_matmul, rows_nd, implementation="reference")
    with pytest.raises(ValueError, match=r"rows \(2, 6\), matrix \(5, 3\): expected"):
        run([Matrix(jnp.zeros((5, 3)))])
    with pytest.raises(ValueError, match="a matrix in float8_e4m3fn with scales None"):
        run([Matrix(eights)])
    with pytest.raises(ValueError, match=r"scales \(4, 3\) of a matrix \(6, 3\): expected"):
        run([Matrix(eights, jnp.ones((4, 3)))])
    with pytest.raises(ValueError, match="'triton' needs a GPU"):
        thin_matmul(rows_nd, [Matrix(jnp.zeros((6, 3)))], implementation="triton")


def test_scales_of_few_rows_are_refused_before_a_kernel_is_made():
    """A tile of d would be narrower than a GPU multiplies, which only lowering for one would notice."""
    rows_nd, matrices, wanted = drawn(3, 96, (5,), groups=12)
    with pytest.raises(ValueError, match=r"one per 8 rows: expected one per column, or per a multiple of 16"):
        thin_matmul(rows_nd, matrices, implementation="triton_interpreted")
    assert_close(thin_matmul(rows_nd, matrices, implementation="reference")[0], wanted[0], terms=4 * 96)


@pytest.mark.parametrize(
    ("capability", "converts"),
    [(None, True), ("8.0", False), ("8.6", False), ("8.9", True), ("9.0", True), ("10.0", True), ("gfx942", False)],
)
def test_gpus_that_cannot_convert_e4m3_are_refused(capability, converts, monkeypatch):
    """By one line, where Triton would abort the process. No capability: a CPU."""
    device = SimpleNamespace() if capability is None else SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert converts_e4m3() == converts
    if converts:
        return
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rows_nd, matrices, _ = drawn(3, 32, (5,), groups=1)
    with pytest.raises(ValueError, match=f"reads E4M3 on GPUs of compute capability 8.9 or more.* has {capability}"):
        thin_matmul(rows_nd, matrices, implementation="triton")
    thin_matmul(rows_nd, matrices, implementation="triton_interpreted")
