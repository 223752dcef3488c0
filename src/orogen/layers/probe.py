"""Probes: a layer that is given one reports statistics of its activations, from which pruning computes importance; or
its output is left out; or the residual stream after it is kept.

A layer takes a `Probe` by `given`, in place of a cache, and its statistics leave by `kept`: a dict of float32 arrays,
whole and equal on every device, so that a pass needs no further reduction. The caller adds them up over batches.

Letters: b batch, t time, d model, c channels.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.layers.documents import Documents
from orogen.parallel.plan import Plan

# The logical axes that split rows, and the tokens of a row, of what `Plan.enter` returns, and of what `Plan.deal`
# returns.
ENTERED, DEALT = ("batch", "context"), ("token_rows", "token_time")


@partial(jax.tree_util.register_dataclass, data_fields=("gain",), meta_fields=("measures", "streams"))
@dataclasses.dataclass(frozen=True)
class Probe:
    """What a layer is asked for.

    gain: () factor of the layer's output, 0 to leave the layer out; None: 1. measures: whether the layer keeps
    statistics. streams: whether it keeps a `Seen`.
    """

    gain: Array | None = None
    measures: bool = False
    streams: bool = False


class Seen(NamedTuple):
    """What a layer keeps without a probe, and the residual stream (b, t, d) after it."""

    kept: Any
    after_btd: Array


def probe_of(given: Any) -> tuple[Probe | None, Any]:
    """`given` as a pair: the probe if it is one, else None; and what is given otherwise."""
    return (given, None) if isinstance(given, Probe) else (None, given)


def measuring(given: Any) -> bool:
    """Whether the layer keeps statistics in place of anything else."""
    return isinstance(given, Probe) and given.measures


def row_squares(a_btc: Array, docs: Documents, plan: Plan, axis: str | None, *, dim: int = 0) -> Array:
    """(c): Σ over the rows of the batch of (mean over the row's tokens of |a|)², over all devices; padding does not
    count. The square root of its sum over batches is Minitron's importance of a channel (arXiv:2407.14679, section 2.2:
    mean over the sequence, L2 over the batch).

    a_btc: activations of whole context ranks, as after `Plan.enter`, whose dimension `dim` of the channels is split
    over the logical axis.
    """
    squares = _squares(a_btc, docs.segments_bt != 0, plan, ENTERED)
    return whole(squares, plan, axis, dim=dim)


def stream_squares(h_btd: Array, docs: Documents, plan: Plan) -> Array:
    """(d): `row_squares` of activations laid out as the residual stream."""
    return dealt_squares(plan.deal(h_btd), docs, plan)


def dealt_squares(u_btc: Array, docs: Documents, plan: Plan) -> Array:
    """(c): `row_squares` of activations of the tokens that this rank alone routes, as after `Plan.deal`."""
    return whole(_squares(u_btc, own_tokens(docs, plan), plan, DEALT), plan)


def change(before_btd: Array, after_btd: Array, docs: Documents, plan: Plan) -> Array:
    """(): Σ over the batch's tokens of 1 - cos(before, after), two residual streams; padding does not count."""
    before, after = (plan.deal(x).astype(jnp.float32) for x in (before_btd, after_btd))
    inner = lambda a, b: jnp.sum(a * b, axis=-1)  # noqa: E731
    # Two zero vectors count as equal, with a cosine of 1: the layer changes nothing.
    square_bt = inner(before, before) * inner(after, after)
    cosine_bt = jnp.where(square_bt > 0, inner(before, after) * lax.rsqrt(jnp.where(square_bt > 0, square_bt, 1)), 1)
    changed = jnp.sum(jnp.where(own_tokens(docs, plan), 1 - cosine_bt, 0))
    return whole(plan.sum(plan.sum(changed, "token_time"), "token_rows"), plan)


def own_tokens(docs: Documents, plan: Plan) -> Array:
    """(b, t) which of the tokens that this rank alone routes are not padding."""
    return plan.deal(plan.own(docs.segments_bt)) != 0


def whole(x: Array, plan: Plan, axis: str | None = None, *, dim: int = 0) -> Array:
    """`x`, whose dimension `dim` is split over the logical axis, gathered along it and marked as equal on all
    devices."""
    return plan.agreed(x if axis is None else plan.gather(x, axis, dim=dim))


def _squares(a_btc: Array, valid_bt: Array, plan: Plan, axes: tuple[str, str]) -> Array:
    rows, time = axes
    valid = valid_bt.reshape(*valid_bt.shape, *(1,) * (a_btc.ndim - 2))
    sum_bc = jnp.sum(jnp.where(valid, jnp.abs(a_btc.astype(jnp.float32)), 0), axis=1)
    sum_bc, count_b = plan.sum((sum_bc, jnp.sum(valid, axis=1, dtype=jnp.float32)), time)
    return plan.sum(jnp.sum(jnp.square(sum_bc / jnp.maximum(count_b, 1)), axis=0), rows)
