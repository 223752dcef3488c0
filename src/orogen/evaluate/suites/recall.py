"""Suites of bare tokens: associative recall, induction and copying. Any model with a vocabulary can be asked.

Letters: t time, k pairs.
"""

import numpy as np

from orogen.config.checks import ConfigError
from orogen.evaluate.likelihood import Row

PAIR_TOKENS = 16  # of an example of associative recall, one pair for so many: 4 pairs in 64 tokens, 16 in 256
GAP_POWER = 0.01  # of the power law by which queries are near their pairs
MOST_WORDS = 8192  # ids that associative recall draws from: half of them are keys


def mqar(rng: np.random.Generator, ids_v: np.ndarray, *, start: int, length: int) -> Row:
    """Multi-query associative recall: pairs of key and value, then every key again, each followed by its value, which
    is asked for.

    The example begins with `start` and has `length` tokens, one pair per PAIR_TOKENS. Queries are at even places after
    the pairs, drawn without replacement with probability ∝ place^(GAP_POWER - 1), so that most are near; the tokens
    between them are drawn from the values. Keys and values come from the two halves of the first MOST_WORDS of `ids_v`.
    Source: arXiv:2312.04927 (Zoology), which has 64 tokens with 4 pairs, 128 with 8
    and 256 with 16.
    """
    pairs = max(1, length // PAIR_TOKENS)
    words_v = ids_v[:MOST_WORDS]
    half = len(words_v) // 2
    _require(half > pairs and length >= 1 + 4 * pairs, "mqar", length, 2 * pairs + 2, len(words_v))
    key_k = rng.choice(words_v[:half], pairs, replace=False)
    value_k = rng.choice(words_v[half:], pairs)
    tokens_t = rng.choice(words_v[half:], length).astype(np.int32)
    asked_t = np.zeros(length, bool)
    tokens_t[0] = start
    tokens_t[1 : 1 + 2 * pairs] = np.stack([key_k, value_k], 1).ravel()
    slots = (length - 1 - 2 * pairs) // 2
    chance = np.arange(1, slots + 1) ** (GAP_POWER - 1)
    query_k = 1 + 2 * pairs + 2 * rng.choice(slots, pairs, replace=False, p=chance / chance.sum())
    tokens_t[query_k], tokens_t[query_k + 1] = key_k, value_k
    asked_t[query_k + 1] = True
    return Row(tokens_t, asked_t)


def induction(rng: np.random.Generator, ids_v: np.ndarray, *, start: int, length: int) -> Row:
    """Induction heads: random tokens, among them once a special one; what followed it is asked for when it comes again,
    at the end.

    Source: arXiv:2209.11895 (the circuit), arXiv:2312.00752 section 4.1.2 (this task).
    """
    _require(len(ids_v) > 1 and length >= 5, "induction", length, 2, len(ids_v))
    special = ids_v[0]
    tokens_t = rng.choice(ids_v[1:], length).astype(np.int32)
    place = int(rng.integers(1, length - 3))
    tokens_t[0], tokens_t[place], tokens_t[-2] = start, special, special
    tokens_t[-1] = tokens_t[place + 1]
    return Row(tokens_t, np.arange(length) == length - 1)


def copying(rng: np.random.Generator, ids_v: np.ndarray, *, start: int, length: int) -> Row:
    """Copying: random tokens, a separator, and the same tokens again, which are asked for.

    Source: arXiv:2402.01032 (Repeat After Me).
    """
    size = (length - 2) // 2
    _require(len(ids_v) > 1 and size >= 1, "copying", length, 2, len(ids_v))
    text_t = rng.choice(ids_v[1:], size)
    tokens_t = np.concatenate([[start], text_t, [ids_v[0]], text_t]).astype(np.int32)
    return Row(tokens_t, np.arange(len(tokens_t)) >= size + 2)


def _require(holds: bool, name: str, length: int, needed: int, words: int) -> None:
    if not holds:
        raise ConfigError(
            f"EvaluateConfig.lengths has {length}, and the tokenizer {words} tokens to draw from; expected at least 5 "
            f"and {needed} for {name!r}"
        )
