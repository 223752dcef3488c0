"""The ragged all-to-all: ranks send each other runs of rows whose lengths depend on the data.

Letters: r ranks, n rows sent, m rows received, d width.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.parallel.varying import vary_like

# Of `in_chunks`, relative to an even share of the rows: how many rows go to each rank at once, and in each later round.
FIRST, LATER = 9 / 8, 1 / 8


class Runs(NamedTuple):
    """Which rows are exchanged; each field is (r,) int32. This rank sends rank r `sizes` rows, which start at row
    `starts` here and land at row `lands` there. It receives `received` rows from rank r, which start at row
    `from_starts` there and arrive at row `arrives` here."""

    starts: Array
    sizes: Array
    lands: Array
    from_starts: Array
    received: Array
    arrives: Array

    def reversed(self) -> "Runs":
        """The runs that send the same rows back."""
        return Runs(self.arrives, self.received, self.from_starts, self.lands, self.sizes, self.starts)


def ragged_exchange(x_nd: Array, runs: Runs, *, rows: int, axes: tuple[str, ...]) -> Array:
    """(m, d): the rows that arrive here, zero where none does. `rows` is m.

    The gradient is the reverse exchange, so no row may be in two runs, at the sender or at the receiver.
    """
    return _exchange(*vary_like((x_nd, runs), (x_nd, runs)), rows, axes)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exchange(x_nd: Array, runs: Runs, rows: int, axes: tuple[str, ...]) -> Array:
    empty_md = vary_like(jnp.zeros((rows, x_nd.shape[1]), x_nd.dtype), x_nd)
    # Chosen when the program is lowered, so a program compiled for another platform uses that platform's operation.
    return lax.platform_dependent(
        x_nd, empty_md, runs, cpu=partial(emulated, axes=axes), cuda=partial(in_chunks, axes=axes),
        default=partial(_native, axes=axes),
    )  # fmt: skip


def _forward(x_nd: Array, runs: Runs, rows: int, axes: tuple[str, ...]) -> tuple[Array, tuple[Runs, int]]:
    return _exchange(x_nd, runs, rows, axes), (runs, len(x_nd))


def _backward(rows: int, axes: tuple[str, ...], saved: tuple[Runs, int], g_md: Array) -> tuple[Array, None]:
    runs, sent = saved
    return _exchange(g_md, runs.reversed(), sent, axes), None


_exchange.defvjp(_forward, _backward)


def _native(x_nd: Array, empty_md: Array, runs: Runs, *, axes: tuple[str, ...]) -> Array:
    return lax.ragged_all_to_all(x_nd, empty_md, runs.starts, runs.sizes, runs.lands, runs.received, axis_name=axes)


def in_chunks(x_nd: Array, empty_md: Array, runs: Runs, *, axes: tuple[str, ...]) -> Array:
    """The exchange by all-to-alls of equal chunks, in as many rounds as the longest run of all ranks needs.

    For NVIDIA GPUs: XLA's own operation took 77 ms for the 400 MB that an all-to-all exchanges in 0.8 ms (two H100,
    jax 0.11.2). The first round has a little more than an even share of the rows, so it usually suffices.
    """
    ranks, rows = len(runs.sizes), len(empty_md)
    even = min(len(x_nd), rows) / ranks  # a buffer with room for the worst case is never full
    first, later = math.ceil(even * FIRST), math.ceil(even * LATER)

    def arriving(start: Array | int, length: int) -> Array:
        """(r * length, d): the rows `start` to `start + length` of every run that arrives here."""
        from_rc = runs.starts[:, None] + start + jnp.arange(length, dtype=jnp.int32)
        sent_rcd = jnp.take(x_nd, from_rc, axis=0, mode="clip")
        # In two dimensions, as `Plan.exchange` does.
        return lax.all_to_all(sent_rcd.reshape(ranks, -1), axes, 0, 0, tiled=True).reshape(-1, x_nd.shape[1])

    def further(i: Array, y_md: Array) -> Array:
        start, row_c = first + i * later, first + i * later + jnp.arange(later, dtype=jnp.int32)
        here = arriving(start, later)
        unused_rc = rows + jnp.arange(ranks * later, dtype=jnp.int32).reshape(ranks, -1)  # distinct, and past the end
        to_rc = jnp.where(row_c < runs.received[:, None], runs.arrives[:, None] + row_c, unused_rc)
        return y_md.at[to_rc.reshape(-1)].set(here, mode="drop", unique_indices=True)

    # Gathered, not scattered into zeros: XLA makes the zeros of all exchanges once and copies them for each exchange
    # long before it. Eight copies, 4.2 GB, lay in memory at the peak of a step of seven layers (jax 0.11.2).
    sender_m, row_m = _senders(runs, rows)
    taken_m = jnp.where((row_m >= 0) & (row_m < first), sender_m * first + row_m, ranks * first)
    y_md = jnp.take(arriving(0, first), taken_m, axis=0, mode="fill", fill_value=0)
    longest = lax.pmax(jnp.max(runs.sizes), axes)
    return lax.fori_loop(0, -(-jnp.maximum(longest - first, 0) // later), further, y_md)


def _senders(runs: Runs, rows: int) -> tuple[Array, Array]:
    """(m,) of each row that arrives here its sender, and which row of the sender's run it is; -1 if none arrives."""
    row_m = jnp.arange(rows, dtype=jnp.int32)
    inside_rm = (row_m >= runs.arrives[:, None]) & (row_m < (runs.arrives + runs.received)[:, None])
    sender_m = jnp.argmax(inside_rm, 0).astype(jnp.int32)
    return sender_m, jnp.where(inside_rm.any(0), row_m - runs.arrives[sender_m], -1)


def emulated(x_nd: Array, empty_md: Array, runs: Runs, *, axes: tuple[str, ...]) -> Array:
    """The exchange for a backend without the operation (XLA:CPU): every rank gathers all rows and takes its own."""
    x_rnd = lax.all_gather(x_nd, axes)
    sender_m, row_m = _senders(runs, len(empty_md))
    sent_m = runs.from_starts[sender_m] + row_m
    return jnp.where((row_m >= 0)[:, None], x_rnd[sender_m, jnp.clip(sent_m, 0, len(x_nd) - 1)], empty_md)
