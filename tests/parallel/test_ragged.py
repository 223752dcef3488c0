"""The ragged all-to-all: against plain loops, its gradient, on one rank, and which operation a platform's program has.

Letters: s senders, r receivers, n rows sent by a rank, m rows of a rank's buffer, d width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.parallel.plan import make_plan
from orogen.parallel.ragged import Runs, in_chunks, ragged_exchange
from orogen.parallel.varying import vary

AXES = ("outer", "inner")
SENT, ROOM, WIDTH = 23, 31, 3
RUNS = ["random", "empty", "one receiver", "one sender"]


def mesh(ranks: int):
    return jax.make_mesh((2, ranks // 2), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:ranks])


def sizes(name: str, ranks: int, rng: np.random.Generator) -> np.ndarray:
    """Rows from each sender to each receiver (s, r)."""
    sizes_sr = rng.integers(0, 4, (ranks, ranks))
    sizes_sr[1, 2] = 0
    if name == "empty":
        sizes_sr[:] = 0
    if name == "one receiver":
        sizes_sr[:, np.arange(ranks) != 1] = 0
    if name == "one sender":
        sizes_sr[np.arange(ranks) != 2] = 0
    return sizes_sr


def laid_out(sizes_sr: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Where each run of a rank (its row) starts: in a random order and with gaps, none over another."""
    starts = np.zeros_like(sizes_sr)
    for row, lengths in zip(starts, sizes_sr, strict=True):
        order, spare, place = rng.permutation(len(lengths)), length - lengths.sum(), 0
        for run in order:
            gap = rng.integers(0, min(spare, 3) + 1)
            spare -= gap
            row[run] = place + gap
            place += gap + lengths[run]
    return starts


def looped(x_snd: np.ndarray, starts_sr: np.ndarray, sizes_sr: np.ndarray, lands_sr: np.ndarray, rows: int):
    """Row by row: what each receiver holds (r, rows, d)."""
    ranks = len(x_snd)
    y_rmd = np.zeros((ranks, rows, x_snd.shape[2]), x_snd.dtype)
    for s in range(ranks):
        for r in range(ranks):
            for i in range(sizes_sr[s, r]):
                y_rmd[r, lands_sr[s, r] + i] = x_snd[s, starts_sr[s, r] + i]
    return y_rmd


def by_rank(starts_sr: np.ndarray, sizes_sr: np.ndarray, lands_sr: np.ndarray) -> Runs:
    """Each rank's Runs (rank, other rank)."""
    sent = (starts_sr, sizes_sr, lands_sr)
    received = (starts_sr.T, sizes_sr.T, lands_sr.T)
    return Runs(*(jnp.asarray(a, jnp.int32) for a in sent + received))


def exchanged(ranks: int, rows: int, exchange=None):
    """The exchange as a function of all ranks' rows (s, n, d) and Runs (rank, other rank). exchange: the implementation
    of one platform, without a gradient."""

    def device(x_1nd, runs):
        own = jax.tree.map(lambda a: a[0], runs)
        if exchange is None:
            return ragged_exchange(x_1nd[0], own, rows=rows, axes=AXES)[None]
        x_nd, own = vary((x_1nd[0], own), AXES)
        # No zeros: an exchange that writes into them makes XLA:GPU copy them early, and hold the copies.
        return exchange(x_nd, vary(jnp.full((rows, x_nd.shape[1]), jnp.nan), AXES), own, axes=AXES)[None]

    spec = PartitionSpec(AXES)
    return jax.shard_map(device, mesh=mesh(ranks), in_specs=(spec, spec), out_specs=spec, check_vma=True)


@functools.cache
def there_and_back(ranks: int):
    """The compiled exchange with its gradient, for runs of any sizes."""
    function = exchanged(ranks, ROOM)

    @jax.jit
    def run(x_snd, gy_rmd, runs):
        y_rmd, backward = jax.vjp(lambda x_snd: function(x_snd, runs), x_snd)
        return y_rmd, *backward(gy_rmd)

    return run


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("name", [*RUNS, "long"])
def test_chunks_carry_the_same_rows(name, ranks):
    """The runs named `long` need several rounds; the others one."""
    rng = np.random.default_rng(ranks)
    sizes_sr = sizes("random", ranks, rng) if name == "long" else sizes(name, ranks, rng)
    if name == "long":
        sizes_sr = np.where(np.eye(ranks, dtype=bool), SENT - 3, 0)
        sizes_sr[0, 1] = 2
    starts_sr, lands_sr = laid_out(sizes_sr, SENT, rng), laid_out(sizes_sr.T, ROOM, rng).T
    x_snd = rng.normal(size=(ranks, SENT, WIDTH)).astype(np.float32)
    y_rmd = jax.jit(exchanged(ranks, ROOM, in_chunks))(x_snd, by_rank(starts_sr, sizes_sr, lands_sr))
    np.testing.assert_array_equal(y_rmd, looped(x_snd, starts_sr, sizes_sr, lands_sr, ROOM))


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("name", RUNS)
def test_rows_arrive_as_in_a_loop_and_gradients_go_back(name, ranks):
    rng = np.random.default_rng([ranks, RUNS.index(name)])
    sizes_sr = sizes(name, ranks, rng)
    starts_sr, lands_sr = laid_out(sizes_sr, SENT, rng), laid_out(sizes_sr.T, ROOM, rng).T
    assert (starts_sr + sizes_sr).max() <= SENT and (lands_sr + sizes_sr).max() <= ROOM
    x_snd = rng.normal(size=(ranks, SENT, WIDTH)).astype(np.float32)
    gy_rmd = rng.normal(size=(ranks, ROOM, WIDTH)).astype(np.float32)
    runs = by_rank(starts_sr, sizes_sr, lands_sr)
    y_rmd, gx_snd = there_and_back(ranks)(x_snd, gy_rmd, runs)
    np.testing.assert_array_equal(y_rmd, looped(x_snd, starts_sr, sizes_sr, lands_sr, ROOM))
    np.testing.assert_array_equal(gx_snd, looped(gy_rmd, lands_sr.T, sizes_sr.T, starts_sr.T, SENT))


def test_one_rank_sends_to_itself():
    plan = make_plan(PlanConfig(), ModelConfig(pattern="-", vocab_size=4, hidden_size=2, intermediate_size=2))
    x_nd = jnp.arange(12.0).reshape(6, 2)
    runs = Runs(*(jnp.asarray([a], jnp.int32) for a in (2, 3, 1, 2, 3, 1)))
    there_md = plan.ragged_exchange(x_nd, runs, "expert", rows=5)
    np.testing.assert_array_equal(there_md, [[0, 0], [4, 5], [6, 7], [8, 9], [0, 0]])
    back_nd = plan.ragged_exchange(there_md, runs.reversed(), "expert", rows=6)
    np.testing.assert_array_equal(back_nd, [[0, 0], [0, 0], [4, 5], [6, 7], [8, 9], [0, 0]])


@pytest.mark.parametrize(
    ("platform", "operation"), [("cpu", "all_gather"), ("cuda", "all_to_all"), ("tpu", "ragged_all_to_all")]
)
def test_a_program_has_the_operation_of_the_platform_it_is_lowered_for(platform, operation):
    """Once forward, once backward, though every program here is lowered on a CPU."""
    ranks = 4
    runs = by_rank(*[np.zeros((ranks, ranks), int)] * 3)
    function = exchanged(ranks, ROOM)
    gradient = jax.jit(jax.grad(lambda x, runs: jnp.sum(function(x, runs) ** 2)))
    traced = gradient.trace(jnp.ones((ranks, SENT, WIDTH)), runs)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all(") == (2 if operation == "ragged_all_to_all" else 0)
    for name in ("all_gather", "all_to_all"):
        assert (f"stablehlo.{name}" in text) == (name == operation)
