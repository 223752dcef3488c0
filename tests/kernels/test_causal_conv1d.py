"""The depthwise causal convolution against fixtures, and packed rows against their documents apart.

Axes: b batch, t time, c channels, k taps. The fixtures' axes are (b, c, t).
"""

import functools
import pathlib

import jax
import numpy as np
import pytest
from jax import Array
from jax import numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from tests.helpers import implementations, several_devices
from tests.kernels.rounding import assert_close

from orogen.kernels.causal_conv1d import ACTIVATIONS, IMPLEMENTATIONS, causal_conv1d

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "selscan" / "causal_conv1d.npz"
BATCH, TIME, CHANNELS, TAPS = 2, 19, 5, 4
# Documents longer and shorter than the taps, with padding behind them.
LENGTHS = (4, 1, 1, 2, 3, 6)

every_implementation = pytest.mark.parametrize("implementation", implementations(IMPLEMENTATIONS))


def draw(*shape: int, seed: int = 0) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def packed(*rows: tuple[int, ...]) -> Array:
    """Segment ids of rows with documents of these lengths, padding after them."""
    ids = [np.repeat(np.arange(1, len(lengths) + 1), lengths) for lengths in rows]
    return jnp.asarray([np.pad(row, (0, TIME - len(row))) for row in ids])


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def differentiated(operands: tuple, dy_btc: Array, segments_bt: Array | None = None, **choices: str) -> tuple:
    """The output, and the gradients of (x, w, bias)."""
    run = functools.partial(causal_conv1d, segments_bt=segments_bt, **choices)
    y_btc, pullback = jax.vjp(run, *operands)
    return y_btc, *pullback(dy_btc)


@every_implementation
class TestFixtures:
    """Outputs and gradients of another program."""

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("biased", [0, 1])
    @pytest.mark.parametrize("taps", [2, 3, 4])
    def test_outputs_and_gradients(self, taps: int, biased: int, activation: str, implementation: str):
        saved = np.load(FIXTURE)
        case = {name: saved[f"K{taps}_b{biased}_{activation}_{name}"] for name in ("x", "w", "b", "gy", "y")}
        operands = case["x"].swapaxes(1, 2), case["w"], case["b"] if biased else None
        y_btc, dx_btc, dw_ck, dbias_c = differentiated(
            operands, case["gy"].swapaxes(1, 2), activation=activation, implementation=implementation
        )
        want = {name: saved[f"K{taps}_b{biased}_{activation}_{name}"] for name in ("gx", "gw", *["gb"] * biased)}
        assert_close(np.swapaxes(y_btc, 1, 2), case["y"], terms=taps + 1)
        assert_close(np.swapaxes(dx_btc, 1, 2), want["gx"], terms=taps)
        assert_close(dw_ck, want["gw"], terms=y_btc.shape[0] * y_btc.shape[1])
        if biased:
            assert_close(dbias_c, want["gb"], terms=y_btc.shape[0] * y_btc.shape[1])


@every_implementation
class TestSegments:
    """A tap never reaches into another document."""

    def test_worked_by_hand(self, implementation: str):
        # Weights 1, 10, 100 from the oldest token to the current one; the row is 1 2 | 3 4 5.
        x_btc = jnp.arange(1.0, 6.0).reshape(1, 5, 1)
        w_ck, segments_bt = jnp.asarray([[1.0, 10.0, 100.0]]), jnp.asarray([[1, 1, 2, 2, 2]])
        y_btc = causal_conv1d(x_btc, w_ck, segments_bt=segments_bt, implementation=implementation)
        assert y_btc.ravel().tolist() == [100, 210, 300, 430, 543]

    @pytest.mark.parametrize("taps", [1, 2, TAPS])
    def test_packed_row_equals_its_documents_apart(self, taps: int, implementation: str):
        run = functools.partial(
            causal_conv1d, w_ck=draw(CHANNELS, taps), bias_c=draw(CHANNELS, seed=1), implementation=implementation
        )
        lengths = (*LENGTHS, TIME - sum(LENGTHS))
        borders = np.cumsum((0, *lengths))

        def apart(x_btc: Array) -> Array:
            """Each document as a row of its own, zeros after it, so that all are one program."""
            documents = zip(borders[:-1], lengths, strict=True)
            rows = [jnp.pad(x_btc[0, at : at + n], ((0, max(lengths) - n), (0, 0))) for at, n in documents]
            y_dtc = run(jnp.stack(rows))
            return jnp.concatenate([y_tc[:n] for y_tc, n in zip(y_dtc, lengths, strict=True)])[None]

        x_btc, dy_btc = draw(1, TIME, CHANNELS), draw(1, TIME, CHANNELS, seed=2)
        whole = functools.partial(run, segments_bt=packed(LENGTHS))
        # Not compiled as one: what is fused is rounded elsewhere.
        (got, got_pullback), (want, want_pullback) = jax.vjp(whole, x_btc), jax.vjp(apart, x_btc)
        np.testing.assert_array_equal(got, want)
        assert_close(got_pullback(dy_btc)[0], want_pullback(dy_btc)[0], terms=taps)

    def test_an_id_that_comes_back_is_a_new_document(self, implementation: str):
        x_btc, w_ck = draw(1, 5, CHANNELS), draw(CHANNELS, TAPS)
        again, new = (
            causal_conv1d(x_btc, w_ck, segments_bt=jnp.asarray([[1, 2, i, i, i]]), implementation=implementation)
            for i in (1, 3)
        )
        np.testing.assert_array_equal(again, new)

    def test_a_halo_joins_two_halves(self, implementation: str):
        x_btc, w_ck = draw(BATCH, TIME, CHANNELS), draw(CHANNELS, TAPS)
        # The middle is inside a document of one row, and at a boundary of the other.
        segments_bt, half = packed((4, 9), (8, 7)), 8
        halo = slice(half - TAPS + 1, half)
        run = functools.partial(causal_conv1d, w_ck=w_ck, implementation=implementation)
        second = run(
            x_btc[:, half:],
            segments_bt=segments_bt[:, half:],
            halo_bkc=x_btc[:, halo],
            halo_segments_bk=segments_bt[:, halo],
        )
        np.testing.assert_array_equal(second, run(x_btc, segments_bt=segments_bt)[:, half:])

    def test_a_halo_without_segments_goes_with_the_first_token(self, implementation: str):
        x_btc, w_ck = draw(BATCH, TIME, CHANNELS), draw(CHANNELS, TAPS)
        segments_bt = packed((10, 4), (9, 7))
        run = functools.partial(causal_conv1d, w_ck=w_ck, implementation=implementation)
        want = run(x_btc, segments_bt=segments_bt)[:, 5:]
        halo_bkc = x_btc[:, 2:5]
        got = run(x_btc[:, 5:], segments_bt=segments_bt[:, 5:], halo_bkc=halo_bkc)
        np.testing.assert_array_equal(got, want)
        whole = run(x_btc)[:, 5:]
        np.testing.assert_array_equal(run(x_btc[:, 5:], halo_bkc=halo_bkc), whole)


class TestNumbers:
    """Types, order of time, sizes, and sharded rows."""

    @every_implementation
    def test_no_output_sees_a_later_token(self, implementation: str):
        run = functools.partial(causal_conv1d, w_ck=draw(CHANNELS, TAPS), implementation=implementation)
        gradient = jax.grad(lambda x: run(x)[:, 7].sum())(draw(1, TIME, CHANNELS))
        assert np.flatnonzero(np.abs(gradient[0]).max(1)).tolist() == [4, 5, 6, 7]

    @every_implementation
    def test_bfloat16_is_rounded_at_the_ends_only(self, implementation: str):
        x_btc, w_ck = (draw(*s).astype(jnp.bfloat16) for s in ((BATCH, TIME, CHANNELS), (CHANNELS, TAPS)))
        run = functools.partial(causal_conv1d, activation="silu", implementation=implementation)
        got = run(x_btc, w_ck)
        assert got.dtype == jnp.bfloat16
        want = run(x_btc.astype(jnp.float32), w_ck.astype(jnp.float32))
        np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))

    # Blocks of 64 tokens and 512 channels: less than one, one and a token, two and a half; channels no power of two.
    @pytest.mark.parametrize("implementation", implementations(set(IMPLEMENTATIONS) - {"taps"}))
    @pytest.mark.parametrize("time, channels, taps", [(1, 3, 4), (65, 20, 3), (160, 520, 4), (64, 8, 1)])
    def test_equals_the_plain_one_at_other_sizes(self, time: int, channels: int, taps: int, implementation: str):
        lengths = np.random.default_rng(4).integers(1, 30, 2 * time)
        segments_bt = jnp.asarray(np.repeat(np.arange(2 * time), lengths)[: 2 * time].reshape(2, time))
        dy_btc = draw(2, time, channels, seed=3)

        operands = draw(2, time, channels), draw(channels, taps, seed=1), draw(channels, seed=2)
        both = (
            differentiated(operands, dy_btc, segments_bt, activation="silu", implementation=name)
            for name in (implementation, "taps")
        )
        for got, want in zip(*both, strict=True):
            assert_close(got, want, terms=2 * time)

    # The interpreter of Pallas mixes varying and unvarying arrays, which check_vma refuses.
    @several_devices
    @pytest.mark.parametrize("implementation", implementations(set(IMPLEMENTATIONS) - {"triton_interpreted"}))
    def test_gradients_inside_shard_map(self, implementation: str):
        def loss(x_btc: Array, w_ck: Array, bias_c: Array, segments_bt: Array, dy_btc: Array) -> Array:
            y_btc = causal_conv1d(x_btc, w_ck, bias_c, segments_bt=segments_bt, implementation=implementation)
            return jnp.vdot(y_btc, dy_btc)

        rows, everywhere = PartitionSpec("data"), PartitionSpec()
        mapped = jax.shard_map(
            jax.grad(loss, argnums=(0, 1, 2)),
            mesh=Mesh(np.asarray(jax.devices()[:2]), ("data",)),
            in_specs=(rows, everywhere, everywhere, rows, rows),
            out_specs=(rows, everywhere, everywhere),
            check_vma=True,
        )
        x_btc, dy_btc = draw(BATCH, TIME, CHANNELS), draw(BATCH, TIME, CHANNELS, seed=2)
        arguments = (x_btc, draw(CHANNELS, TAPS), draw(CHANNELS), packed((4, 9), (8, 7)), dy_btc)
        wanted = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
        for got, want in zip(jax.jit(mapped)(*arguments), wanted, strict=True):
            assert_close(got, want, terms=BATCH * TIME)


class TestRefusals:
    """Each error, by message."""

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"w_ck": jnp.zeros((4, TAPS))}, r"x \(2, 19, 5\), w \(4, 4\): expected \(b, t, c\) and \(c, k\)"),
            ({"bias_c": jnp.zeros(4)}, r"bias has shape \(4,\): expected \(5,\)"),
            ({"segments_bt": jnp.zeros((2, 18), int)}, r"segments has shape \(2, 18\): expected \(2, 19\)"),
            ({"halo_bkc": jnp.zeros((2, 4, 5))}, r"halo has shape \(2, 4, 5\): expected \(2, 3, 5\)"),
            ({"halo_segments_bk": jnp.zeros((2, 3), int)}, "halo_segments without segments and a halo"),
            ({"activation": "relu"}, r"activation='relu': expected one of \['none', 'silu'\]"),
            ({"implementation": "fft"}, r"implementation='fft': expected one of \['taps', 'triton', 'triton_inter"),
        ],
    )
    def test_by_message(self, changes: dict, message: str):
        arguments = {"x_btc": jnp.zeros((BATCH, TIME, CHANNELS)), "w_ck": jnp.zeros((CHANNELS, TAPS))}
        arguments |= {"implementation": "taps", **changes}
        with pytest.raises(ValueError, match=message):
            causal_conv1d(**arguments)

    @pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
    def test_triton_without_a_gpu(self):
        with pytest.raises(ValueError, match="implementation='triton' needs a GPU and finds 'cpu'"):
            causal_conv1d(jnp.zeros((1, 2, 3)), jnp.zeros((3, 2)), implementation="triton")
