"""Cross-entropy of a linear head over a vocabulary that may be sharded over ranks, by implementation name.

Axes: n tokens, d model, v vocabulary of this rank.
"""

from collections.abc import Callable

import jax
from jax import Array
from jax import numpy as jnp

from orogen.kernels.checks import chosen, require_shapes
from orogen.kernels.cross_entropy.chunked import cross_entropy_chunked, log_likelihoods_chunked
from orogen.kernels.cross_entropy.judged import Judged, judged_chunked
from orogen.kernels.cross_entropy.operands import Operands, Reduce
from orogen.kernels.cross_entropy.reference import cross_entropy_reference, log_likelihoods_reference
from orogen.parallel.varying import vary_like

IMPLEMENTATIONS = {
    "full": (cross_entropy_reference, log_likelihoods_reference),
    "chunked": (cross_entropy_chunked, log_likelihoods_chunked),
}


def _alone(x: Array) -> Array:
    """The whole vocabulary is here: nothing to combine."""
    return x


def cross_entropy(
    x_nd: Array,
    head_dv: Array,
    targets_n: Array,
    weights_n: Array,
    *,
    chunk: int,
    vocab_start: Array | int = 0,
    vocab_size: int | None = None,
    reduce_max: Callable[[Array], Array] = _alone,
    reduce_sum: Callable[[Array], Array] = _alone,
    implementation: str,
) -> Array:
    """Sum over tokens of weight times negative log-likelihood, in nats: a float32 scalar.

        sum_n w_n (log sum_v exp(x_n . head_v) - x_n . head_target(n))

    Logits accumulate and the softmax runs in float32 whatever the inputs are. `head_dv` may hold one rank's columns of
    the vocabulary, from column `vocab_start` on; then `reduce_max` and `reduce_sum` combine float32 (n,) over the
    ranks, and every rank returns the same loss. A token of weight 0 has a gradient of exactly zero and may have any
    target; the other targets must be in the vocabulary. Weights may be negative. No gradient flows into `weights_n`.
    Columns from `vocab_size` on, counted over all ranks, are padding: the softmax leaves them out and their gradient
    is zero (None: no padding).
    `chunk` is the number of tokens whose logits exist at a time; it affects memory and speed only, and "full" ignores
    it.

    Raises ValueError if the shapes disagree or a name or size is unknown.
    """
    run, _ = chosen(IMPLEMENTATIONS, implementation)
    _check(x_nd, head_dv, {"targets": targets_n, "weights": weights_n}, chunk)
    weights_n = jax.lax.stop_gradient(weights_n.astype(jnp.float32))
    # One varying type inside shard_map. x is replicated over the vocabulary's ranks, and each computes a partial sum of
    # its gradient: the transpose of this line adds these up. Likewise for the head's gradient over the token shards.
    x_nd, head_dv = vary_like((x_nd, head_dv), (x_nd, head_dv, targets_n, weights_n, vocab_start))
    operands = Operands(x_nd, head_dv, targets_n - vocab_start, _present(head_dv, vocab_start, vocab_size))
    return run(operands, weights_n, chunk=chunk, reduce=Reduce(reduce_max, reduce_sum))


def log_likelihoods(
    x_nd: Array,
    head_dv: Array,
    targets_n: Array,
    *,
    chunk: int,
    vocab_start: Array | int = 0,
    vocab_size: int | None = None,
    reduce_max: Callable[[Array], Array] = _alone,
    reduce_sum: Callable[[Array], Array] = _alone,
    implementation: str,
) -> Array:
    """The log-likelihood (n,) float32 of each token's target, for losses that are not a weighted sum of them:

        x_n . head_target(n) - log sum_v exp(x_n . head_v)

    Arguments, numerics and errors are those of `cross_entropy`. The backward pass recomputes the logits: four products,
    where `cross_entropy` needs three. The loss must mask, with `jnp.where`, tokens whose gradient must vanish or whose
    target is not in the vocabulary.
    """
    _, run = chosen(IMPLEMENTATIONS, implementation)
    _check(x_nd, head_dv, {"targets": targets_n}, chunk)
    x_nd, head_dv = vary_like((x_nd, head_dv), (x_nd, head_dv, targets_n, vocab_start))
    operands = Operands(x_nd, head_dv, targets_n - vocab_start, _present(head_dv, vocab_start, vocab_size))
    return run(operands, chunk=chunk, reduce=Reduce(reduce_max, reduce_sum))


def judge(
    x_nd: Array,
    head_dv: Array,
    targets_n: Array,
    *,
    chunk: int,
    vocab_start: Array | int = 0,
    vocab_size: int | None = None,
    reduce_max: Callable[[Array], Array] = _alone,
    reduce_sum: Callable[[Array], Array] = _alone,
) -> Judged:
    """The log-likelihood of each token's target, as `log_likelihoods` has it, and whether the target is the most likely
    token; of several that are, the lowest. Has no gradient, and computes the logits once. Arguments and errors are
    those of `cross_entropy`; `reduce_max` takes int32 too."""
    _check(x_nd, head_dv, {"targets": targets_n}, chunk)
    x_nd, head_dv = vary_like((x_nd, head_dv), (x_nd, head_dv, targets_n, vocab_start))
    operands = Operands(x_nd, head_dv, targets_n - vocab_start, _present(head_dv, vocab_start, vocab_size))
    return judged_chunked(operands, chunk=chunk, reduce=Reduce(reduce_max, reduce_sum))


def _check(x_nd: Array, head_dv: Array, by_token: dict[str, Array], chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1")
    if x_nd.ndim != 2 or head_dv.ndim != 2 or x_nd.shape[1] != head_dv.shape[0]:
        raise ValueError(f"x {x_nd.shape}, head {head_dv.shape}: expected (n, d) and (d, v)")
    expected = {name: (operand, x_nd.shape[:1]) for name, operand in by_token.items()}
    require_shapes(expected, beside=f"x {x_nd.shape}")


def _present(head_dv: Array, vocab_start: Array | int, vocab_size: int | None) -> Array | None:
    """Mask of this rank's columns that belong to the vocabulary; None if all do."""
    return None if vocab_size is None else jnp.arange(head_dv.shape[1]) + vocab_start < vocab_size
