"""At most so many tokens of reasoning: `</think>` is forced, exactly, in any mix of rows.

Letters: b batch, v vocabulary, s states of the reader, n tokens of `</think>`.

A reader of bytes follows each row: how much of `<think>` its text ends in, or, while it thinks, how much of `</think>`.
It finds markers that are one token, several, or parts of tokens alike.
"""

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.config.checks import ConfigError
from orogen.data.tokenizer import Tokenizer
from orogen.infer.request import GRACE, Budget, Request

OPENING, CLOSING = "<think>", "</think>"


class Markers(NamedTuple):
    """What a budget needs to know of the tokenizer.

    next_sv uint8: the reader's state after each token. thinking int32: the first state that thinks; 0 is the start.
    closing_n int32: tokens that are forced. ends_line_v bool: whether a token's bytes have a newline.
    """

    next_sv: Any
    thinking: Any
    closing_n: Any
    ends_line_v: Any


class Thought(NamedTuple):
    """State of rows, int32: of the reader; tokens generated since `<think>`; index of the forced token, -1: none."""

    reader_b: Any
    used_b: Any
    forced_b: Any


def markers_of(tokenizer: Tokenizer | None, vocab_size: int) -> Markers:
    """The markers of a tokenizer, for a model of so many rows. Raises ConfigError for a model without a tokenizer.

    A marker that is a special token is that token; otherwise it is its text, however tokenized.
    """
    if tokenizer is None:
        raise ConfigError(
            f"the checkpoint has no tokenizer.json; expected one, for a budget: it says what {CLOSING} is"
        )
    bytes_v = tokenizer.bytes_of_token
    specials, texts = {}, []
    for marker in (OPENING, CLOSING):
        ids = tokenizer.marker_ids(marker)
        text = b"".join(bytes_v[i] for i in ids)
        if text not in (b"", marker.encode()):
            raise ConfigError(f"the tokenizer turns {marker} into {text!r}; expected no change, for a budget")
        if not text:
            specials[marker] = ids[0]
        texts.append(text)
    next_sv = np.tile(np.arange(sum(max(1, len(t)) for t in texts), dtype=np.uint8)[:, None], vocab_size)
    _read_tokens(next_sv, bytes_v, _reader(*texts))
    thinking = max(1, len(texts[0]))
    if OPENING in specials:
        next_sv[:thinking, specials[OPENING]] = thinking
    if CLOSING in specials:
        next_sv[thinking:, specials[CLOSING]] = 0
    ends_line_v = np.zeros(vocab_size, bool)
    ends_line_v[: len(bytes_v)] = [b"\n" in b for b in bytes_v]
    return Markers(next_sv, np.int32(thinking), np.array(tokenizer.marker_ids(CLOSING), np.int32), ends_line_v)


def thought_of(
    requests: Sequence[Request | None], generated: Sequence[Sequence[int]], markers: Markers | None
) -> Thought:
    """The state of rows after their prompts and what they have generated, as numpy arrays."""
    if markers is None:
        raise ConfigError("a request has a budget and the model no markers; expected those of its tokenizer")
    states = [
        (0, 0, -1) if r is None else _replayed(r, ids, markers) for r, ids in zip(requests, generated, strict=True)
    ]
    return Thought(*np.array(states, np.int32).reshape(-1, 3).T)


def settle(
    sampled_b: Array, budget_b: Array, grace_b: Array, thought: Thought, markers: Markers, *, once_b: Array
) -> tuple[Array, Thought]:
    """The token that each row emits, given what it would, and the state after it.

    After `budget_b` tokens that follow `<think>`, `</think>` is forced, in the next tokens; with `grace_b`, after the
    first token beyond them that ends a line, and after that many beyond them at the latest. Tokens of a prompt do not
    count. A row that closes by itself is left alone, and a new `<think>` has the whole budget, but not where `once_b`
    says that it would be part of a grammar's text. budget_b -1: none.
    """
    closing_n, count = jnp.asarray(markers.closing_n), len(markers.closing_n)
    forced_b = thought.forced_b
    token_b = jnp.where(forced_b >= 0, closing_n[jnp.maximum(forced_b, 0)], sampled_b)
    ended_b = forced_b == count - 1
    reader_b = jnp.asarray(markers.next_sv)[thought.reader_b, token_b].astype(jnp.int32)
    reader_b = jnp.where(once_b & (thought.reader_b < markers.thinking), 0, reader_b)
    thinks_b = reader_b >= markers.thinking
    used_b = jnp.where(thinks_b & (thought.reader_b >= markers.thinking), thought.used_b + 1, 0)
    line_b = (used_b > budget_b) & jnp.asarray(markers.ends_line_v)[token_b]
    over_b = (used_b >= budget_b) & (line_b | (used_b - budget_b >= grace_b))
    begins_b = thinks_b & (budget_b >= 0) & over_b
    next_b = jnp.where(begins_b, 0, -1)
    next_b = jnp.where(forced_b >= 0, jnp.where(ended_b, -1, forced_b + 1), next_b)
    return token_b, Thought(reader_b, used_b, next_b)


def read(markers: Markers, ids: Sequence[int], reader: int = 0) -> tuple[int, int]:
    """The reader's state after the tokens, and how many of them follow the one that began the thought it is in.

    All of them if it thought before. Most tokens leave a resting reader where it is, and are passed over at once.
    """
    thinking = int(markers.thinking)
    ids_n = np.asarray(ids, np.int64)
    stirs_n = (markers.next_sv[0, ids_n] != 0) | (markers.next_sv[thinking, ids_n] != thinking)
    stirring = np.flatnonzero(stirs_n).tolist()
    place = began = 0
    while place < len(ids_n):
        if reader in (0, thinking):
            later = bisect.bisect_left(stirring, place)
            if later == len(stirring):
                break
            place = stirring[later]
        before, reader = reader, int(markers.next_sv[reader, ids_n[place]])
        place += 1
        began = place if before < thinking <= reader else began
    return reader, len(ids_n) - began


def _replayed(request: Request, generated: Sequence[int], markers: Markers) -> tuple[int, int, int]:
    """What `settle` makes of one row, from the tokens of its prompt and those it emitted."""
    reader, _ = read(markers, request.prompt)
    if request.grammar is None:
        reader, used = read(markers, generated, reader)
    else:
        reader, used = _first_thought(markers, generated, reader)
    if reader < markers.thinking:
        return reader, 0, -1
    last = _last(request.budget, markers.ends_line_v[np.asarray(generated[len(generated) - used :], np.int64)])
    return reader, used, -1 if last is None or used < last else used - last


def _first_thought(markers: Markers, ids: Sequence[int], reader: int) -> tuple[int, int]:
    """As `read`, where no thought begins after the prompt's."""
    used = 0
    for token in ids:
        if reader < markers.thinking:
            return 0, 0
        reader, used = int(markers.next_sv[reader, token]), used + 1
    return (reader, used) if reader >= markers.thinking else (0, 0)


def _last(budget: Budget | None, lines_n: np.ndarray) -> int | None:
    """How many tokens a thought may have, given which of them end a line."""
    if budget is None or budget.form == "hard" or not budget.tokens:
        return None if budget is None else budget.tokens
    later = np.flatnonzero(lines_n[budget.tokens :])
    return budget.tokens + (min(int(later[0]) + 1, GRACE) if later.size else GRACE)


def _reader(opening: bytes, closing: bytes) -> np.ndarray:
    """Transitions (s, 256) uint8 by byte: Knuth, Morris and Pratt's automaton of each text, one leading to the other.

    An empty text, of a special token, has one state, which no byte leaves.
    """
    counts = (max(1, len(opening)), max(1, len(closing)))
    table = np.repeat(np.arange(sum(counts), dtype=np.uint8)[:, None], 256, axis=1)
    for text, own, other in ((opening, 0, counts[0]), (closing, counts[0], 0)):
        for known in range(len(text)):
            for byte in range(256):
                seen = text[:known] + bytes([byte])
                length = next(n for n in range(len(seen), -1, -1) if text[:n] == seen[len(seen) - n :])
                table[own + known, byte] = other if length == len(text) else own + length
    return table


def _read_tokens(next_sv: np.ndarray, bytes_v: Sequence[bytes], table: np.ndarray) -> None:
    """Moves the states of `next_sv` over the bytes of each token."""
    lengths_v = np.array([len(b) for b in bytes_v], np.int64)
    starts_v = np.cumsum(lengths_v) - lengths_v
    data = np.frombuffer(b"".join(bytes_v), np.uint8)
    ids = np.flatnonzero(lengths_v)
    for place in range(int(lengths_v.max(initial=0))):
        ids = ids[lengths_v[ids] > place]
        next_sv[:, ids] = table[next_sv[:, ids], data[starts_v[ids] + place]]
