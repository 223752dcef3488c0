"""The ragged all-to-all: ranks send each other runs of rows whose lengths depend on the data.

Letters: r ranks, n rows sent, m rows received, d width.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.parallel.varying import vary_like


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
        x_nd, empty_md, runs, cpu=partial(emulated, axes=axes), default=partial(_native, axes=axes)
    )


def _forward(x_nd: Array, runs: Runs, rows: int, axes: tuple[str, ...]) -> tuple[Array, tuple[Runs, int]]:
    return _exchange(x_nd, runs, rows, axes), (runs, len(x_nd))


def _backward(rows: int, axes: tuple[str, ...], saved: tuple[Runs, int], g_md: Array) -> tuple[Array, None]:
    runs, sent = saved
    return _exchange(g_md, runs.reversed(), sent, axes), None


_exchange.defvjp(_forward, _backward)


def _native(x_nd: Array, empty_md: Array, runs: Runs, *, axes: tuple[str, ...]) -> Array:
    return lax.ragged_all_to_all(x_nd, empty_md, runs.starts, runs.sizes, runs.lands, runs.received, axis_name=axes)


def emulated(x_nd: Array, empty_md: Array, runs: Runs, *, axes: tuple[str, ...]) -> Array:
    """The exchange for a backend without the operation (XLA:CPU): every rank gathers all rows and takes its own."""
    x_rnd = lax.all_gather(x_nd, axes)
    row_m = jnp.arange(len(empty_md), dtype=jnp.int32)
    inside_rm = (row_m >= runs.arrives[:, None]) & (row_m < (runs.arrives + runs.received)[:, None])
    sender_m = jnp.argmax(inside_rm, 0)
    sent_m = runs.from_starts[sender_m] + row_m - runs.arrives[sender_m]
    return jnp.where(inside_rm.any(0)[:, None], x_rnd[sender_m, jnp.clip(sent_m, 0, len(x_nd) - 1)], empty_md)
