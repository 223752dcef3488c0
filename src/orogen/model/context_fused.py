"""Blocks of context attention by a fused kernel that takes the lengths of rows, but no documents.

Among a rank's own tokens, each run of equal segments is one causal call. At most one document crosses from one part of
the sequence to a later one: its tokens end the earlier part and begin the later one. The order of keys does not matter
where all of them are visible. So the keys are reversed, which puts the document at the front of both parts, where two
lengths describe it.

Letters: b batch, t queries, s keys, h query heads, g key heads, k head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.kernels.attention.cudnn_block import Lengths, Softmax, attend_cudnn, pull_cudnn
from orogen.model.context_sums import LOWEST, Given, Keys, Method, Queries, Sums
from orogen.parallel.varying import vary_like

# By implementation: attention to one block of keys, and its gradient.
KERNELS = {"cudnn": (attend_cudnn, pull_cudnn)}


def fused(implementation: str, scale: float) -> Method:
    """The method of a kernel. Its gradient ignores cotangents of the log-sum-exps, so nothing may be computed from
    them."""
    attend, pull = (partial(kernel, scale=scale) for kernel in KERNELS[implementation])

    def run_attention(qkv: Any, softmax: None, *lengths: Any, causal: bool) -> tuple[Array, ...]:
        return attend(qkv, *lengths, causal=causal)

    attention = _Call(run_attention, (_Result("queries", 0), _Result("queries", LOWEST)))
    gradient = _Call(pull, (_Result("queries", 0), _Result("keys", 0), _Result("keys", 0)))

    def attend_own(queries: Queries, keys: Keys) -> Sums:
        return _sums(*_own(attention, queries, keys, None))

    def pull_own(query_side: tuple[Queries, Given], keys: Keys):
        queries, given = query_side
        return _gradients(*_own(gradient, queries, keys, _softmax(given)))

    def attend_pairs(one: tuple[Queries, Keys], other: tuple[Queries, Keys]):
        queries, keys = _stacked(one, other)
        return _unstacked(_sums(*_later(attention, queries, keys, None)))

    def pull_pairs(one, other):
        (queries, given), keys = _stacked(one, other)
        return _unstacked(_gradients(*_later(gradient, queries, keys, _softmax(given))))

    return Method(attend_own, attend_pairs, pull_own, pull_pairs)


class _Result(NamedTuple):
    """One result of a call: whether its axis of time is that of the `queries` or of the `keys`, and its value where
    nothing is visible."""

    time: str
    unseen: float


class _Call(NamedTuple):
    """A kernel: run takes (q, k, v), the whole softmax (None for attention itself) and lengths, and returns
    `results`."""

    run: Callable[..., tuple[Array, ...]]
    results: tuple[_Result, ...]


def _own(call: _Call, queries: Queries, keys: Keys, softmax: Softmax | None) -> tuple[Array, ...]:
    """The call's results among a rank's own tokens, causal within each run of equal segments.

    Several runs are one call each, moved to the front of their rows: a call takes the time of its lengths.
    """
    segments_bt = queries.segments_bt
    changes_bt = segments_bt[:, 1:] != segments_bt[:, :-1]
    run_bt = jnp.cumsum(jnp.pad(changes_bt, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    qkv = queries.q_bthk, keys.k_bsgk, keys.v_bsgk
    operands = vary_like((qkv, softmax), (qkv, softmax, run_bt))
    plain = partial(call.run, causal=True)

    def by_runs(*operands):
        index_t = jnp.arange(run_bt.shape[1], dtype=jnp.int32)
        moved = lambda tree, index_bt: jax.tree.map(lambda a: _taken(a, index_bt % len(index_t)), tree)  # noqa: E731

        def add(run, results):
            inside_bt = run_bt == run  # nowhere, if the row has fewer runs than another
            length_b = jnp.maximum(jnp.sum(inside_bt, axis=1, dtype=jnp.int32), 1)
            start_b1 = jnp.argmax(inside_bt, axis=1).astype(jnp.int32)[:, None]
            at_front = call.run(*moved(operands, index_t + start_b1), Lengths(length_b, length_b), causal=True)
            in_place = moved(tuple(at_front), index_t - start_b1)
            return jax.tree.map(lambda new, old: jnp.where(_beside(inside_bt, new), new, old), in_place, results)

        shapes = jax.eval_shape(plain, *operands, None)
        zeros = tuple(jnp.zeros(a.shape, a.dtype) for a in shapes)
        return lax.fori_loop(0, jnp.max(run_bt) + 1, add, vary_like(zeros, operands))

    return lax.cond(jnp.max(run_bt) == 0, lambda *operands: tuple(plain(*operands, None)), by_runs, *operands)


def _later(call: _Call, queries: Queries, keys: Keys, softmax: Softmax | None) -> tuple[Array, ...]:
    """The call's results for parts of queries that come later in the sequence than the parts of keys."""
    qkv = queries.q_bthk, keys.k_bsgk, keys.v_bsgk
    document_b1 = keys.segments_bs[:, -1:]
    q_length_b = _leading(queries.segments_bt == document_b1)
    k_length_b = jnp.where(q_length_b > 0, _leading(jnp.flip(keys.segments_bs == document_b1, 1)), 0)
    operands = vary_like((qkv, softmax), (qkv, softmax, q_length_b, k_length_b))
    lengths = {"queries": q_length_b, "keys": k_length_b}

    def by_lengths(qkv, softmax):
        q_bthk, *kv = qkv
        at_least_one = Lengths(*(jnp.maximum(length_b, 1) for length_b in lengths.values()))
        reversed_ = (q_bthk, *(jnp.flip(a, 1) for a in kv))
        results = call.run(reversed_, softmax, at_least_one, causal=False)
        return tuple(masked(a, result) for a, result in zip(results, call.results, strict=True))

    def masked(a: Array, result: _Result) -> Array:
        inside_bt = jnp.arange(a.shape[1]) < lengths[result.time][:, None]
        a = jnp.where(_beside(inside_bt, a), a, jnp.asarray(result.unseen, a.dtype))
        return jnp.flip(a, 1) if result.time == "keys" else a

    all_seen = jnp.all((q_length_b == qkv[0].shape[1]) & (k_length_b == qkv[1].shape[1]))
    plain = lambda *operands: tuple(call.run(*operands, None, causal=False))  # noqa: E731
    return lax.cond(all_seen, plain, by_lengths, *operands)


def _leading(condition_bt: Array) -> Array:
    """(b,) int32: how many tokens from the first on fulfil the condition."""
    return jnp.sum(jnp.cumprod(condition_bt.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def _taken(a: Array, index_bt: Array) -> Array:
    """The tokens of `a` (b, t, ...) at these indices."""
    return jnp.take_along_axis(a, _beside(index_bt, a), axis=1)


def _beside(a_bt: Array, other: Array) -> Array:
    """`a_bt` with as many axes as `other` (b, t, ...)."""
    return a_bt.reshape(*a_bt.shape, *(1,) * (other.ndim - 2))


def _softmax(given: Given) -> Softmax:
    return Softmax(given.y_bthk, given.dy_bthk.astype(given.y_bthk.dtype), given.lse_bth)


def _sums(y_bthk: Array, lse_bth: Array) -> Sums:
    return Sums(y_bthk.astype(jnp.float32), lse_bth)


def _gradients(*gradients: Array) -> tuple[Array, tuple[Array, Array]]:
    dq_bthk, dk_bsgk, dv_bsgk = (a.astype(jnp.float32) for a in gradients)
    return dq_bthk, (dk_bsgk, dv_bsgk)


def _stacked(one: Any, other: Any) -> Any:
    """Both as one batch of twice as many rows; positions, which have no batch, are those of neither."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, other)


def _unstacked(tree: Any) -> tuple[Any, Any]:
    one, other = (jax.tree.map(lambda a, i=i: jnp.split(a, 2)[i], tree) for i in range(2))
    return one, other
