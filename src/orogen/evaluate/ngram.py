"""Byte baselines that a language model has to beat: an interpolated Witten-Bell n-gram, zlib and xz.

An n-gram of k bytes is one integer, its history (the first k-1 bytes) in the high bits and the predicted byte in the
lowest eight, so that sorting n-grams groups them by history. Letters: n bytes of text, g distinct n-grams, h distinct
histories.
"""

import lzma
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BYTES = 256
MAX_ORDER = 7  # an n-gram of eight bytes would reach the sign bit of an int64


class Level(NamedTuple):
    """Counts of the n-grams of one length; both key arrays are sorted."""

    keys_g: NDArray[np.int64]
    counts_g: NDArray[np.int64]
    histories_h: NDArray[np.int64]
    history_counts_h: NDArray[np.int64]
    distinct_h: NDArray[np.int64]


class NgramModel(NamedTuple):
    """Level k-1 holds the n-grams of k bytes, k = 1 … order."""

    levels: tuple[Level, ...]

    @property
    def order(self) -> int:
        """Bytes of the longest n-gram: the history is one byte shorter."""
        return len(self.levels)


def fit(text: bytes, order: int = 5) -> NgramModel:
    """Counts every n-gram of 1 … order bytes of `text`, read as one unbroken stream.

    Raises ValueError if order is outside 1 … 7 or the text is shorter than the order.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order is {order}, expected 1 to {MAX_ORDER}")
    if len(text) < order:
        raise ValueError(f"text has {len(text)} bytes, expected at least order = {order}")
    bytes_n = np.frombuffer(text, np.uint8)
    levels, keys_n = [], np.zeros(len(text), np.int64)
    for length in range(1, order + 1):
        keys_n = _extend(keys_n, bytes_n, length=length)
        levels.append(_count(keys_n[length - 1 :]))
    return NgramModel(tuple(levels))


def byte_probabilities(model: NgramModel, documents: Sequence[bytes]) -> NDArray[np.float64]:
    """Probability of each byte of the concatenated documents given what precedes it in its own document.

    Interpolated Witten-Bell, from P_0 = 1/256 up to k = order:
    P_k(w|h) = (c(hw) + T(h) P_{k-1}(w|h')) / (c(h) + T(h)), with c counts, T(h) the number of distinct bytes seen
    after h, and h' the history h without its oldest byte. Where h was never seen, P_k = P_{k-1}. A document starts
    with an empty history: its i-th byte (from 0) uses levels k ≤ i + 1 only.
    Source: Witten & Bell, IEEE Trans. Inf. Theory 37(4), 1991 (method C); interpolated form: Chen & Goodman,
    Harvard TR-10-98, 1998, section 2.5.
    """
    bytes_n = np.frombuffer(b"".join(documents), np.uint8)
    offset_n = np.concatenate([np.arange(len(d)) for d in documents] or [np.arange(0)])
    p_n, keys_n = np.full(len(bytes_n), 1 / BYTES), np.zeros(len(bytes_n), np.int64)
    for length, level in enumerate(model.levels, start=1):
        keys_n = _extend(keys_n, bytes_n, length=length)
        inside = np.flatnonzero(offset_n >= length - 1)
        p_n[inside] = _interpolate(level, keys_n[inside], p_n[inside])
    return p_n


def bits_per_byte(model: NgramModel, documents: Sequence[bytes]) -> float:
    """Mean of -log2 `byte_probabilities` over all bytes. Raises ValueError if there are none."""
    p_n = byte_probabilities(model, documents)
    if not len(p_n):
        raise ValueError("documents hold no bytes, expected at least one")
    return float(-np.log2(p_n).mean())


def compressed_bits_per_byte(documents: Sequence[bytes]) -> dict[str, float]:
    """Size of the held-out text alone under zlib -9 and xz -9e: compressed bits over original bytes.

    The documents are concatenated and compressed once, container headers included; neither program sees the training
    text, which a model and an n-gram do. Raises ValueError if there are no bytes.
    """
    text = b"".join(documents)
    if not text:
        raise ValueError("documents hold no bytes, expected at least one")
    return {
        "zlib of the held-out text alone": 8 * len(zlib.compress(text, 9)) / len(text),
        "xz of the held-out text alone": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }


def _extend(keys_n: NDArray[np.int64], bytes_n: NDArray[np.uint8], *, length: int) -> NDArray[np.int64]:
    """Keys of `length` bytes ending at each position, from keys of one byte less; the first length-1 are partial."""
    longer_n, back = keys_n.copy(), length - 1
    longer_n[back:] |= bytes_n[: max(len(bytes_n) - back, 0)].astype(np.int64) << (8 * back)
    return longer_n


def _count(keys_n: NDArray[np.int64]) -> Level:
    """The level of these n-grams; c(h) is the sum over continuations, so each distribution sums to one."""
    keys_g, counts_g = np.unique(keys_n, return_counts=True)
    histories_h, first_h, distinct_h = np.unique(keys_g >> 8, return_index=True, return_counts=True)
    return Level(keys_g, counts_g, histories_h, np.add.reduceat(counts_g, first_h), distinct_h)


def _interpolate(level: Level, keys_n: NDArray[np.int64], lower_n: NDArray[np.float64]) -> NDArray[np.float64]:
    """P_k of each n-gram from P_{k-1}, `lower_n`."""
    at_h, seen_n = _find(level.histories_h, keys_n >> 8)
    at_g, known_n = _find(level.keys_g, keys_n)
    count_n = np.where(known_n, level.counts_g[at_g], 0)
    distinct_n = level.distinct_h[at_h]
    p_n = (count_n + distinct_n * lower_n) / (level.history_counts_h[at_h] + distinct_n)
    return np.where(seen_n, p_n, lower_n)


def _find(sorted_g: NDArray[np.int64], keys_n: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The index of each key, and whether it is present (the index of an absent key is valid but meaningless)."""
    at_n = np.minimum(np.searchsorted(sorted_g, keys_n), len(sorted_g) - 1)
    return at_n, sorted_g[at_n] == keys_n
