"""Choosing the next token of each row, on the device. Letters: b batch, v vocabulary, n most likely, w words of a mask.

A row's token depends on its own logits, knobs, counts and number of generated tokens alone: not on its slot, its
neighbours, the features of the program, or how many tokens one program chooses. Hence a draft is lossless if it is
accepted exactly where it equals the token that `choose` gives from the model's logits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.infer.budget import Markers, settle, thought_of
from orogen.infer.knobs import MASK_BITS, Features, Knobs
from orogen.infer.request import Request
from orogen.infer.restrict import restricted
from orogen.parallel.varying import vary_like


class History(NamedTuple):
    """What the choice of a row's next token depends on and each token changes. None: no request of the batch needs it.

    number_b int32: tokens generated so far. counts_bv int32: how often each was generated; prompt_bv bool: whether it
    is in the prompt. thought: a budget's, `Thought`.
    """

    number_b: Any
    counts_bv: Any
    prompt_bv: Any
    thought: Any


class Choice(NamedTuple):
    """The next token of each row (b,) int32, and what is reported with it.

    logprob_b: under softmax(logits), before anything of a request. top_ids_bn, top_logprobs_bn: of the most likely
    tokens. None without the feature. bad_b: the logits have a NaN, or no token is possible; the token is then
    arbitrary.
    """

    token_b: Array
    bad_b: Array
    logprob_b: Array | None
    top_ids_bn: Array | None
    top_logprobs_bn: Array | None


def history_of(
    requests: Sequence[Request | None],
    features: Features,
    *,
    vocab_size: int,
    markers: Markers | None = None,
    generated: Sequence[Sequence[int]] | None = None,
) -> History:
    """The history of rows as numpy arrays, before their next token; None: a row without a request.

    generated: what each has generated before, none by default. markers: for the feature `budgets`.
    """
    generated = [()] * len(requests) if generated is None else generated
    counts_bv = prompt_bv = thought = None
    if features.penalties:
        counts_bv = np.zeros((len(requests), vocab_size), np.int32)
        prompt_bv = np.zeros((len(requests), vocab_size), bool)
        for row, (request, ids) in enumerate(zip(requests, generated, strict=True)):
            np.add.at(counts_bv[row], np.array(ids, np.int64), 1)
            prompt_bv[row, list(request.prompt if request else ())] = True
    if features.budgets:
        thought = thought_of(requests, generated, markers)
    return History(np.array([len(ids) for ids in generated], np.int32), counts_bv, prompt_bv, thought)


def choose(
    logits_bv: Array,
    knobs: Knobs,
    history: History,
    features: Features,
    *,
    is_token_v: Array,
    mask_bw: Any = None,
    markers: Any = None,
    live_b: Array | None = None,
) -> tuple[Choice, History]:
    """The next token of each row, and the history after it.

    The order: rows of the vocabulary without a token, what a grammar forbids and what is held back until `min_tokens`
    are left out; logit biases; the penalties for repetition (of prompt and output: positive logits are divided, others
    multiplied; arXiv:1909.05858), frequency and presence (of the output); temperature; top_k, top_p and min_p; a draw.
    A budget of reasoning may then replace the token. Ties go to the lower index.

    Token number i of a request is drawn with the key fold_in(its seed's, i). mask_bw uint32, with the feature `masks`:
    allowed tokens. markers, with `budgets`: Markers. live_b: rows whose history goes on; None: all.
    """
    logits_bv = logits_bv.astype(jnp.float32)
    allowed_bv = is_token_v[None]
    if features.masks:
        allowed_bv = allowed_bv & unpacked(mask_bw, logits_bv.shape[1])
    left_bv = jnp.where(allowed_bv, logits_bv, -jnp.inf)
    if features.holds:
        left_bv = _held_back(left_bv, knobs, history)
    shaped_bv = _shaped(left_bv, knobs, history, features)
    token_b = _first_largest(shaped_bv)
    bad_b = jnp.isnan(logits_bv.max(-1)) | (shaped_bv.max(-1) == -jnp.inf)
    if features.draws:
        token_b = jnp.where(knobs.temperature_b > 0, _drawn(shaped_bv, knobs, history.number_b, features), token_b)
    thought = history.thought
    if features.budgets:
        token_b, thought = settle(token_b, knobs.budget_b, knobs.grace_b, thought, markers, once_b=knobs.once_b)
    after = History(history.number_b + 1, _counted(history.counts_bv, token_b), history.prompt_bv, thought)
    if live_b is not None:
        after = jax.tree.map(lambda a, b: jnp.where(jnp.expand_dims(live_b, range(1, a.ndim)), a, b), after, history)
    return Choice(token_b, bad_b, *reported(logits_bv, token_b, is_token_v, features.logprobs)), after


def unpacked(mask_bw: Array, size: int) -> Array:
    """(b, size) bool: the bits of the mask, lowest first."""
    bits = jnp.arange(MASK_BITS, dtype=jnp.uint32)
    return ((mask_bw[:, :, None] >> bits) & 1).astype(bool).reshape(len(mask_bw), -1)[:, :size]


def _held_back(logits_bv: Array, knobs: Knobs, history: History) -> Array:
    """Logits with -inf for the tokens that may not come yet."""
    early_b1 = (history.number_b < knobs.least_b)[:, None]
    ids_bn = jnp.asarray(knobs.held_ids_bn)
    most_bn = jnp.where(early_b1 & (ids_bn >= 0), -jnp.inf, jnp.inf)  # padding leaves the last as it is
    return logits_bv.at[jnp.arange(len(logits_bv))[:, None], ids_bn].min(most_bn)


def _shaped(logits_bv: Array, knobs: Knobs, history: History, features: Features) -> Array:
    """Logits with biases and penalties."""
    if features.biases:
        row_b1 = jnp.arange(len(logits_bv))[:, None]
        logits_bv = logits_bv.at[row_b1, knobs.bias_ids_bk].add(knobs.bias_values_bk)  # padding adds 0 to the last
    if features.penalties:
        generated_bv = history.counts_bv > 0
        repetition_b1 = knobs.repetition_b[:, None]
        repeated_bv = jnp.where(logits_bv > 0, logits_bv / repetition_b1, logits_bv * repetition_b1)
        logits_bv = jnp.where(generated_bv | history.prompt_bv, repeated_bv, logits_bv)
        logits_bv = logits_bv - knobs.frequency_b[:, None] * history.counts_bv
        logits_bv = logits_bv - knobs.presence_b[:, None] * generated_bv
    return logits_bv


def _drawn(shaped_bv: Array, knobs: Knobs, number_b: Array, features: Features) -> Array:
    temperature_b = jnp.where(knobs.temperature_b > 0, knobs.temperature_b, 1)
    # Shifted before the division: a quotient of the largest could overflow.
    below_bv = _below(shaped_bv)
    scaled_bv = jnp.where(below_bv == -jnp.inf, -jnp.inf, below_bv / temperature_b[:, None])
    if features.restricts:
        limits = knobs.top_k_b, knobs.top_p_b, knobs.min_p_b
        some = jnp.any((knobs.top_k_b < scaled_bv.shape[1]) | (knobs.top_p_b < 1) | (knobs.min_p_b > 0))
        start_bv = vary_like(scaled_bv, (scaled_bv, limits))
        scaled_bv = lax.cond(some, lambda a_bv: restricted(a_bv, *limits), lambda a_bv: a_bv, start_bv)
    noise_bv = jax.vmap(lambda key_2, number: _gumbel(key_2, number, shaped_bv.shape[1]))(knobs.key_b2, number_b)
    return _first_largest(scaled_bv + noise_bv)


def _first_largest(logits_bv: Array) -> Array:
    """argmax (b,) int32; some index also for a NaN. Two plain reductions, which XLA vectorises on a CPU."""
    index_v = jnp.arange(logits_bv.shape[1], dtype=jnp.int32)
    largest_b1 = logits_bv.max(-1, keepdims=True)
    return jnp.where(logits_bv == largest_b1, index_v, logits_bv.shape[1] - 1).min(-1)


def _below(logits_bv: Array) -> Array:
    """Logits less the largest. Infinite ones are 0, and the others then -inf."""
    largest_b1 = logits_bv.max(-1, keepdims=True)
    return jnp.where(logits_bv == largest_b1, 0, logits_bv - largest_b1)


def _gumbel(key_2: Array, number: Array, size: int) -> Array:
    """Gumbel noise (size,) float32: -log of exponential noise, whose smallest value gives the largest.

    All 32 bits are used: the 23 of `jax.random.gumbel` repeat the largest value of 131,072 draws every hundredth time,
    and the lower index would win.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), number)
    uniform_v = (jax.random.bits(key, (size,), jnp.uint32).astype(jnp.float32) + 0.5) * 2.0**-32
    # Rounding could make it 1, whose noise would be -inf.
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform_v, 1 - 2.0**-24)))


def _counted(counts_bv: Array | None, token_b: Array) -> Array | None:
    return None if counts_bv is None else jnp.asarray(counts_bv).at[jnp.arange(len(token_b)), token_b].add(1)


def logprobs_of(logits_bv: Array, token_b: Array, is_token_v: Array) -> Array:
    """The log-probability (b,) float32 of each row's token, computed as `choose` reports it."""
    logprob_b, _, _ = reported(logits_bv.astype(jnp.float32), token_b, is_token_v, 0)
    assert logprob_b is not None
    return logprob_b


def reported(
    logits_bv: Array, token_b: Array, is_token_v: Array, count: int | None
) -> tuple[Array | None, Array | None, Array | None]:
    """Log-probabilities of the tokens (b,), and ids and log-probabilities (b, n) of the most likely ones."""
    if count is None:
        return None, None, None
    below_bv = _below(logits_bv)
    norm_b1 = jnp.log(jnp.exp(below_bv).sum(-1, keepdims=True))
    logprob_b = (jnp.take_along_axis(below_bv, token_b[:, None], axis=-1) - norm_b1)[:, 0]
    if not count:
        return logprob_b, None, None
    count = min(count, logits_bv.shape[1])
    top_bn, ids_bn = jax.lax.top_k(jnp.where(is_token_v, below_bv, -jnp.inf), count)
    return logprob_b, ids_bn.astype(jnp.int32), top_bn - norm_b1
