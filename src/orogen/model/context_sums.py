"""The types by which context attention calls a method that attends to a block of keys.

Letters: b batch, t queries of this rank or block, s keys, h query heads, g key heads, k head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

LOWEST = float(jnp.finfo(jnp.float32).min)


class Queries(NamedTuple):
    """Queries (b, t, h, k), their segments (b, t), and their positions in the sequence (t,)."""

    q_bthk: Array
    segments_bt: Array
    index_t: Array


class Keys(NamedTuple):
    """Keys and values (b, s, g, k), their segments (b, s), and their positions in the sequence (s,)."""

    k_bsgk: Array
    v_bsgk: Array
    segments_bs: Array
    index_s: Array


class Sums(NamedTuple):
    """Attention so far, float32: the output (b, t, h, k) over the keys seen, and the logarithm of the sum of their
    exponentials (b, t, h); 0 and LOWEST where no key was seen."""

    y_bthk: Array
    lse_bth: Array


class Given(NamedTuple):
    """Per query, over the keys of all ranks: the output and its cotangent (b, t, h, k), and float32 (b, t, h) the
    log-sum-exp and delta, the normalisation's share of the gradient: d score = p (dp - delta)."""

    y_bthk: Array
    dy_bthk: Array
    lse_bth: Array
    delta_bth: Array


class Method(NamedTuple):
    """How a rank attends to its own keys, and to two pairs of blocks of queries and keys. In each pair, all keys are
    earlier in the sequence than the queries. All results are float32.

    attend_own: (queries, keys) -> sums; attend_pairs: (queries, keys) twice -> the sums of each.
    pull_own: ((queries, given), keys) -> gradients of queries and of (keys, values); pull_pairs: the same, twice.
    """

    attend_own: Callable[[Queries, Keys], Sums]
    attend_pairs: Callable[[tuple[Queries, Keys], tuple[Queries, Keys]], tuple[Sums, Sums]]
    pull_own: Callable[[tuple[Queries, Given], Keys], Any]
    pull_pairs: Callable[[tuple[Any, Keys], tuple[Any, Keys]], tuple[Any, Any]]


def merge(one: Sums, other: Sums) -> Sums:
    """Attention over the keys of both."""
    lse_bth = jnp.logaddexp(one.lse_bth, other.lse_bth)
    weighted = lambda sums: jnp.exp(sums.lse_bth - lse_bth)[..., None] * sums.y_bthk  # noqa: E731
    return Sums(weighted(one) + weighted(other), lse_bth)


def unseen_unless(condition: Array, sums: Sums) -> Sums:
    """`sums` where the condition holds, else the sums over no keys."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), sums, Sums(jnp.float32(0), jnp.float32(LOWEST)))
