"""The Mamba-2 recurrence in float32 where weak steps follow strong ones, against float64.

Axes: b batch, t time, h heads, p head size, g groups, n state.
"""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tests.helpers import implementations

from orogen.kernels.ssd import ssd
from orogen.kernels.ssd.triton_gradients import _across_tiles, tiles_of

SIZES = {"b": 2, "h": 4, "p": 3, "g": 2, "n": 5}
NAMES = ("y", "final", "dx", "ddt", "da", "dB", "dC", "dinitial")
LIMIT = 1e-6  # of the norm of the difference by the norm

RARE = lambda rng, t: np.where(rng.random(t.shape) < 0.1, 16.0, 0.016)  # noqa: E731
MIXTURES = {
    "rare": RARE,
    "alternating": lambda rng, t: np.where(t % 2, 60.0, 1e-3),
    "log_uniform": lambda rng, t: np.exp(rng.uniform(np.log(1e-4), np.log(100), t.shape)),
    "strong_run_first": lambda rng, t: np.where(t < 40, 20.0, 1e-3),
    "runs": lambda rng, t: np.where(t // 25 % 2, 80.0, 1e-4),
    "beyond_exp": lambda rng, t: np.where(rng.random(t.shape) < 0.3, 1e4, 1e-3),
    "weak": lambda rng, t: np.full(t.shape, 1e-4),
}


def draw(mixture: str, time: int):
    """Operands of `ssd`, an initial state, segments and the gradients of both results, float32 numbers in float64."""
    rng = np.random.default_rng(0)
    b, h, p, g, n = SIZES.values()
    dt_bth = MIXTURES[mixture](rng, np.broadcast_to(np.arange(time)[:, None], (b, time, h)))
    x, dy = rng.normal(size=(2, b, time, h, p))
    b_btgn, c_btgn = rng.normal(size=(2, b, time, g, n))
    initial, dfinal = rng.normal(size=(2, b, h, p, n))
    starts = [time // 2, time // 2 + 1, time - time // 4]  # of the second row's documents after its first
    segments_bt = np.cumsum(np.stack([np.zeros(time, int), np.isin(np.arange(time), starts)]), axis=1)
    arrays = x, dt_bth, -np.linspace(0.9, 1.1, h), b_btgn, c_btgn, initial, dy, dfinal
    return [np.asarray(a, np.float32).astype(np.float64) for a in arrays], segments_bt


def exact(arrays, segments_bt):
    """The recurrence and its adjoint, token by token in float64."""
    x, dt, a_h, b_btgn, c_btgn, state, dy, dstate = arrays
    per_group = SIZES["h"] // SIZES["g"]
    b_bthn, c_bthn = (np.repeat(array, per_group, axis=2) for array in (b_btgn, c_btgn))
    decay_bth = np.exp(dt * a_h)
    decay_bth[:, 1:] *= (segments_bt[:, 1:] == segments_bt[:, :-1])[..., None]
    y, dx, ddt, db, dc, states = (
        np.zeros_like(v) for v in (x, x, dt, b_bthn, c_bthn, x[..., None] * 0 * state[:, None])
    )
    for t in range(x.shape[1]):
        states[:, t] = state
        written = np.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b_bthn[:, t])
        state = decay_bth[:, t, :, None, None] * state + written
        y[:, t] = np.einsum("bhpn,bhn->bhp", state, c_bthn[:, t])
    final, da_h = state, np.zeros_like(a_h)
    for t in reversed(range(x.shape[1])):
        written = np.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b_bthn[:, t])
        after = decay_bth[:, t, :, None, None] * states[:, t] + written
        dc[:, t] = np.einsum("bhpn,bhp->bhn", after, dy[:, t])
        dstate = dstate + np.einsum("bhp,bhn->bhpn", dy[:, t], c_bthn[:, t])
        read = np.einsum("bhpn,bhn->bhp", dstate, b_bthn[:, t])
        dlog = decay_bth[:, t] * np.einsum("bhpn,bhpn->bh", dstate, states[:, t])
        dx[:, t], da_h = dt[:, t, :, None] * read, da_h + (dlog * dt[:, t]).sum(0)
        ddt[:, t] = np.einsum("bhp,bhp->bh", read, x[:, t]) + dlog * a_h
        db[:, t] = dt[:, t, :, None] * np.einsum("bhpn,bhp->bhn", dstate, x[:, t])
        dstate = decay_bth[:, t, :, None, None] * dstate
    of_groups = lambda d: d.reshape(*b_btgn.shape[:3], per_group, -1).sum(3)  # noqa: E731
    return y, final, dx, ddt, da_h, of_groups(db), of_groups(dc), dstate


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def run(arrays, segments_bt, *, implementation: str, chunk_size: int):
    *operands, dy, dfinal = arrays

    def results(*o):
        return ssd(
            *o[:5], segments_bt=segments_bt, initial_state_bhpn=o[5], chunk_size=chunk_size,
            implementation=implementation,
        )  # fmt: skip

    outputs, pullback = jax.vjp(results, *operands)
    return *outputs, *pullback((dy, dfinal))


@pytest.mark.parametrize("implementation", implementations({"chunked", "triton", "triton_interpreted"}))
@pytest.mark.parametrize("time", [75, 7])
def test_every_result_keeps_float32s_digits(time: int, implementation: str):
    """A row of more than a chunk, which has several tiles of pairs, and one of less than the smallest tile."""
    errors = {}
    for mixture in MIXTURES:
        arrays, segments_bt = draw(mixture, time)
        single = [jnp.asarray(a, jnp.float32) for a in arrays]
        got = run(single, jnp.asarray(segments_bt), implementation=implementation, chunk_size=64)
        for name, mine, want in zip(NAMES, got, exact(arrays, segments_bt), strict=True):
            errors[mixture, name] = np.linalg.norm(np.asarray(mine, np.float64) - want) / np.linalg.norm(want)
    assert not {key: error for key, error in errors.items() if not error <= LIMIT}


def test_tiles_of_pairs_pass_over_all_tokens_between_them():
    """Where a chunk has more blocks of tokens than any launch makes today, some lie between those of a tile."""
    rng, rows, width = np.random.default_rng(0), 3, 12
    pairs_hqs = rng.normal(size=(2, width, width)) * np.tri(width, k=-1)
    dt_hs = rng.uniform(1, 2, (2, width))
    blocks = [slice(i, i + rows) for i in range(0, width, rows)]
    tiles_hqs = [pairs_hqs[:, blocks[q], blocks[s]] for q, s in tiles_of(len(blocks))]
    received_htq = np.stack([tile.sum(2) for tile in tiles_hqs], 1)
    given_hts = np.stack([(pairs_hqs / dt_hs[:, None])[:, blocks[q], blocks[s]].sum(1) for q, s in tiles_of(4)], 1)

    def over(token: int, first: int, last: int) -> np.ndarray:
        """The sum of the pairs over a token that come from tokens of a range to tokens of it."""
        return pairs_hqs[:, token:last, first:token].sum((1, 2))

    within_hu = np.stack([over(u, u // rows * rows, u // rows * rows + rows) for u in range(width)], 1)
    got = _across_tiles(*(a[None, :, None] for a in (received_htq, given_hts, within_hu, dt_hs)))[0, :, 0]
    np.testing.assert_allclose(got, np.stack([over(u, 0, width) for u in range(width)], 1), rtol=1e-5, atol=1e-5)
