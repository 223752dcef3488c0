"""Paged attention: every implementation against loops in float64, and what it must not read.

Axes: b rows, t new tokens, h query heads, g key heads, k head size, j head size of values, n pages, s places of a page,
p pages of a table.
"""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tests.helpers import implementations
from tests.kernels.lowering import kernels, lowered, lowered_on_two
from tests.kernels.rounding import assert_within, tolerance

from orogen.kernels.paged_attention import IMPLEMENTATIONS, paged_attention, triton

every_implementation = pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))
SCALE = 0.3


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Steps of 16 tokens, the fewest, so that short rows have several; splits of more than one."""
    monkeypatch.setattr(triton, "TILE", 16)
    monkeypatch.setattr(triton, "PROGRAMS", 18)


def operands(dtype=jnp.float32, *, lengths=(1, 18, 59), t=1, h=6, g=2, k=5, j=7, s=5, seed=0):
    """q, both pools, the table and the lengths; pages are dealt at random, and all else in the pools is NaN."""
    rng = np.random.default_rng(seed)
    most = -(-max(lengths) // s) + 1
    pages = [-(-length // s) for length in lengths]
    order = iter(rng.permutation(sum(pages) + 3))
    table_bp = np.full((len(lengths), most), 2**30, np.int32)  # beyond a row's length: no page
    pools = [np.full((sum(pages) + 3, s, g, size), np.nan) for size in (k, j)]
    for row, length in enumerate(lengths):
        for place in range(length):
            if place % s == 0:
                table_bp[row, place // s] = next(order)
            for pool in pools:
                pool[table_bp[row, place // s], place % s] = rng.normal(size=pool.shape[2:])
    q_bthk = rng.normal(size=(len(lengths), t, h, k))
    floats = (jnp.asarray(array, dtype) for array in (q_bthk, *pools))
    return *floats, jnp.asarray(table_bp), jnp.asarray(lengths, jnp.int32)


def expected(q_bthk, k_nsgk, v_nsgk, table_bp, length_b, *, window=None, sinks_h=None):
    """By loops over tokens, in float64."""
    q, k, v = (np.asarray(a.astype(jnp.float32), np.float64) for a in (q_bthk, k_nsgk, v_nsgk))
    y, page = np.zeros((*q.shape[:3], v.shape[3])), k.shape[1]
    for row, t, h in np.ndindex(q.shape[:3]):
        own, group = int(length_b[row]) - q.shape[1] + t, h // (q.shape[2] // k.shape[2])
        first = 0 if window is None else max(0, own - window + 1)
        at = [(int(table_bp[row, i // page]), i % page, group) for i in range(first, own + 1)]
        if not at:
            continue
        scores = np.array([SCALE * q[row, t, h] @ k[place] for place in at])
        terms = np.exp(scores - scores.max())
        total = terms.sum() + (0 if sinks_h is None else np.exp(float(sinks_h[h]) - scores.max()))
        y[row, t, h] = sum(term * v[place] for term, place in zip(terms, at, strict=True)) / total
    return y


def attend(inputs, *, implementation, **settings):
    return paged_attention(*inputs, scale=SCALE, implementation=implementation, **settings)


def sinks(heads=6):
    return jnp.asarray(np.random.default_rng(7).normal(size=heads), jnp.float32)


@every_implementation
class TestEveryImplementation:
    """What each must do by itself. What no query may read is NaN in all of them."""

    # Lengths at a page's border and at a step's; one page; pages longer than a step.
    @pytest.mark.parametrize(
        "lengths, s, t", [((1, 18, 59), 5, 1), ((16, 32, 15), 4, 3), ((3, 2), 7, 1), ((70, 41), 24, 6)]
    )
    def test_equals_loops(self, implementation: str, lengths: tuple, s: int, t: int):
        inputs = operands(lengths=lengths, s=s, t=t)
        y_bthj = attend(inputs, implementation=implementation)
        assert_within(y_bthj, expected(*inputs), tolerance(jnp.float32, terms=max(lengths)))

    @pytest.mark.parametrize("window", [1, 17, 33])
    def test_a_window_is_kept_and_what_lies_before_it_not_read(self, implementation: str, window: int):
        q, *pools, table, lengths = operands(t=3)
        want = expected(q, *pools, table, lengths, window=window)
        gone = table < 0
        for row, length in enumerate(np.asarray(lengths)):
            first = max(0, length - 3 - window + 1)  # that the first of the three sees
            gone = gone.at[row, : first // 5].set(True)
            for place in range(first):
                pools = [pool.at[table[row, place // 5], place % 5].set(jnp.nan) for pool in pools]
        inputs = (q, *pools, jnp.where(gone, 2**30, table), lengths)
        y_bthj = attend(inputs, window=window, implementation=implementation)
        assert_within(y_bthj, want, tolerance(jnp.float32, terms=59))

    def test_sinks_take_part_of_the_softmax(self, implementation: str):
        inputs, settings = operands(t=2), {"sinks_h": 3 * sinks(), "window": 20}
        y_bthj = attend(inputs, **settings, implementation=implementation)
        assert_within(y_bthj, expected(*inputs, **settings), tolerance(jnp.float32, terms=59))

    def test_rows_without_tokens_and_queries_before_them_give_zeros(self, implementation: str):
        inputs = operands(lengths=(0, 1, 30), t=3)
        y_bthj = attend(inputs, sinks_h=sinks(), implementation=implementation)
        assert not y_bthj[0].any() and not y_bthj[1, :2].any() and y_bthj[1, 2].all()
        assert_within(y_bthj, expected(*inputs, sinks_h=sinks()), tolerance(jnp.float32, terms=30))

    def test_bfloat16_is_rounded_once_or_twice(self, implementation: str):
        inputs = operands(jnp.bfloat16, t=2)
        y_bthj = attend(inputs, implementation=implementation)
        assert y_bthj.dtype == jnp.bfloat16
        assert_within(y_bthj.astype(jnp.float32), expected(*inputs), tolerance(jnp.bfloat16, terms=1))

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_pages_in_fp8_are_decoded_to_the_dtype_of_queries(self, implementation: str, dtype):
        q, *pools, table, lengths = operands(dtype, t=3)
        scales, grid = (0.03, 0.5), jnp.float8_e4m3fn
        kept = [(pool.astype(jnp.float32) / by).astype(grid) for pool, by in zip(pools, scales, strict=True)]
        read = [(pool.astype(jnp.float32) * by).astype(dtype) for pool, by in zip(kept, scales, strict=True)]
        y_bthj = attend((q, *kept, table, lengths), stored=scales, implementation=implementation)
        want = expected(q, *read, table, lengths)
        assert_within(y_bthj.astype(jnp.float32), want, tolerance(dtype, terms=59 if dtype == jnp.float32 else 1))

    def test_large_scores_do_not_overflow(self, implementation: str):
        q, *others = operands(lengths=(40, 3))
        inputs = (300 * q, *others)
        assert_within(attend(inputs, implementation=implementation), expected(*inputs), 1e-3)

    def test_a_row_depends_on_no_other_row(self, implementation: str):
        q, k, v, table, lengths = operands(lengths=(59, 30, 7), t=2)
        y_bthj = attend((q, k, v, table, lengths), implementation=implementation)
        shorter = attend((2 * q.at[1].divide(2), k, v, table, lengths.at[0].set(11)), implementation=implementation)
        np.testing.assert_array_equal(y_bthj[1], shorter[1])


class TestTriton:
    """How the kernels share the work, and what becomes of them on a GPU."""

    SHAPES = {"one_row": (1, 1, 2048), "drafts": (64, 8, 32)}

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    @pytest.mark.parametrize(
        "settings", [{}, {"window": 512, "sinks": True}, {"stored": (0.5, 0.25)}], ids=["plain", "window_sinks", "fp8"]
    )
    def test_lowers_for_a_gpu_in_bfloat16(self, shape: tuple[int, ...], settings: dict, monkeypatch):
        monkeypatch.undo()
        batch, tokens, pages = shape
        array = lambda kind, *size: jax.ShapeDtypeStruct(size, kind)  # noqa: E731
        pool = array(jnp.float8_e4m3fn if "stored" in settings else jnp.bfloat16, 2048, 64, 2, 128)
        arguments = array(jnp.bfloat16, batch, tokens, 32, 128), pool, pool, array(jnp.int32, batch, pages)
        sinks_h = (array(jnp.float32, 32),) if "sinks" in settings else ()

        def run(*inputs):
            return attend(inputs[:5], implementation="triton", window=settings.get("window"),
                          stored=settings.get("stored"), sinks_h=inputs[5] if sinks_h else None)  # fmt: skip

        assert kernels(lowered(run, *arguments, array(jnp.int32, batch), *sinks_h)) == 2

    def test_one_row_is_split_over_the_gpu(self, monkeypatch):
        monkeypatch.undo()
        taken = []
        monkeypatch.setattr(triton, "_attend", lambda o, walk, **_: taken.append(walk))
        monkeypatch.setattr(triton, "_merge", lambda *_, **__: None)
        for batch, pages in ((1, 2048), (64, 2048), (1, 2)):
            q, pool = jnp.zeros((batch, 1, 32, 128), jnp.bfloat16), jnp.zeros((1, 64, 2, 128), jnp.bfloat16)
            inputs = (q, pool, pool, jnp.zeros((batch, pages), jnp.int32), jnp.zeros(batch, jnp.int32))
            attend(inputs, implementation="triton_interpreted")
        assert [walk.splits for walk in taken] == [64, 3, 2] and {walk.step for walk in taken} == {64}

    @pytest.mark.parametrize("length", [0, 1, 16, 17, 100, 1000])
    @pytest.mark.parametrize("window", [None, 1, 40])
    def test_splits_cover_every_step_once(self, length: int, window: int | None):
        walk = triton.Walk(3, 2, 5, 5, page_size=4, step=16, splits=7, scale=1.0, window=window)
        first, begin, end, per_split = (int(number) for number in triton._steps(jnp.int32(length), walk))
        steps = [s for i in range(7) for s in range(begin + i * per_split, min(begin + (i + 1) * per_split, end))]
        seen = range(first, length)
        assert steps == sorted({token // 16 for token in seen})

    def test_types_inside_shard_map(self):
        q, k, v, table, lengths = operands(lengths=(3, 9), t=2)

        def run(by_row, pools):
            q, table, lengths = by_row
            return attend((q, *pools, table, lengths), sinks_h=jnp.zeros(6), implementation="triton")

        assert kernels(lowered_on_two(run, (q, table, lengths), (k, v))) == 2


class TestRefusals:
    """One line with the value and what was expected."""

    @pytest.mark.parametrize(
        "number, other, line",
        [
            (0, jnp.zeros((3, 1, 5, 5)), "5 query heads over 2 key heads: expected a multiple"),
            (1, jnp.zeros((21, 5, 2, 6)), r"k has shape \(21, 5, 2, 6\): expected \(21, 5, 2, 5\)"),
            (2, jnp.zeros((21, 4, 2, 7)), r"v has shape \(21, 4, 2, 7\): expected"),
            (2, jnp.zeros((21, 5, 14)), r"expected \(b, t, h, k\), \(n, s, g, k\) twice, and \(b, p\)"),
            (3, jnp.zeros((2, 4), jnp.int32), r"table has shape \(2, 4\)"),
            (4, jnp.zeros(2, jnp.int32), r"length has shape \(2,\): expected \(3,\)"),
            (0, jnp.zeros((3, 1, 6, 5), jnp.bfloat16), "q, k and v of bfloat16, float32 and float32: expected one"),
        ],
    )
    def test_of_what_does_not_fit(self, number: int, other, line: str):
        inputs = list(operands())
        inputs[number] = other
        with pytest.raises(ValueError, match=line):
            attend(inputs, implementation="reference")

    @pytest.mark.parametrize(
        "settings, line",
        [
            ({"window": 0}, "window=0: expected 1 or more"),
            ({"implementation": "cudnn"}, "implementation='cudnn': expected one of"),
            ({"stored": (1.0, 1.0)}, "float32, float32 and float32: expected k and v of float8_e4m3fn"),
            ({"sinks_h": jnp.zeros(2)}, r"sinks has shape \(2,\): expected \(6,\)"),
        ],
    )
    def test_of_settings(self, settings: dict, line: str):
        with pytest.raises(ValueError, match=line):
            attend(operands(), **{"implementation": "reference", **settings})

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
    def test_of_triton_without_a_gpu(self):
        with pytest.raises(ValueError, match="implementation='triton' needs a GPU and finds 'cpu'"):
            attend(operands(), implementation="triton")

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
    def test_of_fp8_on_a_gpu_that_cannot_convert_it(self, monkeypatch):
        q, k, v, *places = operands()
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="8.0")])
        kept = (pool.astype(jnp.float8_e4m3fn) for pool in (k, v))
        with pytest.raises(ValueError, match="reads E4M3 on GPUs of compute capability 8.9 or more"):
            attend((q, *kept, *places), stored=(1.0, 1.0), implementation="triton")
