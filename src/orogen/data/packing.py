"""Splits token streams into pieces, and packs pieces into rows of equal length. Pure numpy.

Legend: b batch (rows), t time, n pieces. A *stream* is one document's tokens; a *piece* is at most one row of it.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from orogen.config.checks import ConfigError


class Stream(NamedTuple):
    """Tokens in order, int32, and the loss weight of each token as a target, float32. extras: further numbers of each
    token (t,) from 0 on, by name, which `Batch.extras` then has, with -1 on padding."""

    tokens_t: np.ndarray
    weights_t: np.ndarray
    extras: Mapping[str, np.ndarray] = {}


class Batch(NamedTuple):
    """Rows of documents. Position i predicts token i + 1, with weight weights[i + 1], if both are in one segment.

    tokens_bt int32; segments_bt int32, 1, 2, … along the row and 0 on padding: a segment is a run of equal ids;
    positions_bt int32, from 0 in each segment, except one that continues the previous batch's; weights_bt float32, the
    loss weight of the token as a target, 0 where its position is 0 and on padding. extras: further arrays (b, t) by
    name; see NEXT.
    """

    tokens_bt: Any  # arrays of numpy here, of jax inside a step
    segments_bt: Any
    positions_bt: Any
    weights_bt: Any
    extras: Mapping[str, Any] = {}

    def map(self, function: Callable[..., Any], *others: "Batch") -> "Batch":
        """The function applied to each array, together with those of the same name in the other batches."""
        arrays = (function(*columns) for columns in zip(*(batch[:4] for batch in (self, *others)), strict=True))
        extras = {name: function(x, *(o.extras[name] for o in others)) for name, x in self.extras.items()}
        return Batch(*arrays, extras=extras)


# Extras of batches whose rows continue those of the previous batch: the token that each position predicts, int32, and
# its loss weight. A row's last position predicts the first token of its next row, a document's last token NOTHING.
NEXT, NEXT_WEIGHT, NOTHING = "next", "next_weight", -1


class _Decoder(Protocol):
    bos_id: int

    def decode_bytes(self, ids: Iterable[int]) -> bytes: ...

    def text_bytes(self, ids: Iterable[int]) -> bytes: ...


def document_stream(ids_t: np.ndarray, *, bos_id: int, eos_id: int) -> Stream:
    """[bos, ids, eos], all of weight 1; `in_pieces` sets that of bos to 0."""
    tokens_t = np.concatenate([[bos_id], ids_t, [eos_id]]).astype(np.int32)
    return Stream(tokens_t, np.ones(len(tokens_t), np.float32))


def in_pieces(stream: Stream, *, sequence_length: int) -> list[Stream]:
    """Pieces of at most `sequence_length` tokens, each beginning with the last token of the previous piece.

    That token is only context, with weight 0, so every token of the stream but the first is a target exactly once.
    """
    step = sequence_length - 1
    pieces = []
    for start in range(0, max(len(stream.tokens_t) - 1, 1), step):
        window = slice(start, start + sequence_length)
        weights_t = stream.weights_t[window].copy()
        weights_t[0] = 0
        extras = {name: x_t[window] for name, x_t in stream.extras.items()}
        pieces.append(Stream(stream.tokens_t[window], weights_t, extras))
    return pieces


def best_fit(lengths_n: Sequence[int], *, capacity: int) -> np.ndarray:
    """The row (n,) of each piece by best-fit decreasing: longest first, into the fullest row with room.

    Rows are numbered in the order of their first pieces. Every length must lie between 1 and `capacity`.
    Source: arXiv:2404.10830, section 3 and algorithm 1.
    """
    row_n = np.zeros(len(lengths_n), np.int64)
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_by_room, ascending
    row_count = 0
    for piece in np.argsort(-np.asarray(lengths_n, np.int64), kind="stable"):
        length = int(lengths_n[piece])
        slot = bisect.bisect_left(rooms, length)
        if slot == len(rooms):
            row, room = row_count, capacity
            row_count += 1
        else:
            room = rooms[slot]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[slot]
        row_n[piece] = row
        if room - length not in rows_by_room:
            rows_by_room[room - length] = []
            bisect.insort(rooms, room - length)
        rows_by_room[room - length].append(row)
    return _renumbered(row_n)


def pack(pieces: Sequence[Stream], *, sequence_length: int, pad_id: int) -> Batch:
    """The pieces in as few rows as best-fit finds, in their given order within a row. Raises ConfigError if one is too
    long.

    A piece's first token gets weight 0: nothing in the row predicts it.
    """
    return pack_rows(
        pieces, starts([len(piece.tokens_t) for piece in pieces], sequence_length), sequence_length, pad_id
    )


class Start(NamedTuple):
    """Where a piece lies: its row, its first token there, and its number in the row, from 1."""

    row: int
    start: int
    segment: int


def starts(lengths_n: Sequence[int], sequence_length: int) -> list[Start]:
    """Where each piece starts, in as few rows as best-fit finds; pieces of a row keep their order. Raises ConfigError
    if one is too long."""
    if len(lengths_n) and not 1 <= min(lengths_n) <= max(lengths_n) <= sequence_length:
        raise ConfigError(
            f"pieces of {min(lengths_n)} to {max(lengths_n)} tokens: expected 1 to sequence_length = {sequence_length}"
        )
    row_n = best_fit(lengths_n, capacity=sequence_length)
    used_b, segment_b = np.zeros((2, int(row_n.max(initial=-1)) + 1), np.int64)
    found = []
    for row, length in zip(row_n.tolist(), lengths_n, strict=True):
        segment_b[row] += 1
        found.append(Start(row, int(used_b[row]), int(segment_b[row])))
        used_b[row] += length
    return found


def pack_rows(pieces: Sequence[Stream], at: Sequence[Start], sequence_length: int, pad_id: int) -> Batch:
    """The pieces in rows, each from its start on; a piece's first token gets weight 0."""
    rows = max((start.row for start in at), default=-1) + 1
    batch = empty_batch(rows, sequence_length=sequence_length, pad_id=pad_id)
    extras = pieces[0].extras if pieces else {}
    batch = batch._replace(extras={n: np.full(batch.tokens_bt.shape, -1, x.dtype) for n, x in extras.items()})
    for piece, start in zip(pieces, at, strict=True):
        length = len(piece.tokens_t)
        span = (start.row, slice(start.start, start.start + length))
        batch.tokens_bt[span] = piece.tokens_t
        batch.segments_bt[span] = start.segment
        batch.positions_bt[span] = np.arange(length)
        batch.weights_bt[span] = piece.weights_t
        for name, x_bt in batch.extras.items():
            x_bt[span] = piece.extras[name]
    batch.weights_bt[batch.positions_bt == 0] = 0
    return batch


def empty_batch(rows: int, *, sequence_length: int, pad_id: int) -> Batch:
    """Rows of padding only."""
    shape = (rows, sequence_length)
    return Batch(
        tokens_bt=np.full(shape, pad_id, np.int32),
        segments_bt=np.zeros(shape, np.int32),
        positions_bt=np.zeros(shape, np.int32),
        weights_bt=np.zeros(shape, np.float32),
    )


def piece_texts(batches: Iterable[Batch], tokenizer: _Decoder) -> Iterator[bytes]:
    """The text bytes of each segment's targets, in row order; its first token is context, and left out. With NEXT, the
    bytes that the segment predicts, the last of which may begin the next row."""
    for batch in batches:
        # Without NEXT a position predicts the token after it, if that is in its own segment.
        tokens_bt, segments_bt = np.asarray(batch.tokens_bt), np.asarray(batch.segments_bt)
        alone = np.where(np.diff(segments_bt, axis=1, append=0) == 0, np.roll(tokens_bt, -1, axis=1), NOTHING)
        for tokens_t, segments_t, next_t in zip(tokens_bt, segments_bt, batch.extras.get(NEXT, alone), strict=True):
            edges = np.flatnonzero(np.diff(segments_t, prepend=-1, append=-1))
            for start, end in zip(edges, edges[1:], strict=False):
                if segments_t[start]:
                    begins = tokens_t[start] == tokenizer.bos_id
                    targets = next_t[start:end][next_t[start:end] != NOTHING]
                    yield tokenizer.text_bytes(targets) if begins else tokenizer.decode_bytes(targets)


def trained_text(batches: Iterable[Batch], tokenizer: _Decoder) -> bytes:
    """The exact bytes that a model predicts in these batches, each once and without specials.

    Pieces follow one another in the order of the rows; `piece_texts` keeps them apart. Over whole epochs the length
    is that of the documents.
    """
    return b"".join(piece_texts(batches, tokenizer))


def target_byte_count(batch: Batch, byte_length_v: np.ndarray) -> int:
    """Text bytes of the batch's targets, by `Tokenizer.byte_length_v`: for bits per byte on part of a pass."""
    return int(byte_length_v[batch.tokens_bt][batch.weights_bt > 0].sum())


def document_lengths(segments_bt: np.ndarray) -> np.ndarray:
    """Tokens of each document of packed rows: of each run of equal ids other than 0."""
    flat_n = np.pad(np.asarray(segments_bt), ((0, 0), (0, 1))).ravel()  # a row's last document ends with the row
    start_n = np.flatnonzero(np.diff(flat_n, prepend=0))
    length_n = np.diff(start_n, append=len(flat_n))
    return length_n[flat_n[start_n] != 0]


def prefix_byte_count(batch: Batch, tokenizer: _Decoder) -> int:
    """Bytes of the batch's targets that are not text: the space that some tokenizers put before a document."""
    before, targets = batch.tokens_bt[:, :-1], batch.tokens_bt[:, 1:]
    begins = (before == tokenizer.bos_id) & (batch.positions_bt[:, 1:] == 1) & (batch.weights_bt[:, 1:] > 0)
    return sum(
        len(tokenizer.decode_bytes([token])) - len(tokenizer.text_bytes([token])) for token in targets[begins].tolist()
    )


def _renumbered(row_n: np.ndarray) -> np.ndarray:
    """The same partition, rows numbered by first appearance."""
    _, first_of_row, inverse_n = np.unique(row_n, return_index=True, return_inverse=True)
    rank_of_row = np.empty(len(first_of_row), np.int64)
    rank_of_row[np.argsort(first_of_row)] = np.arange(len(first_of_row))
    return rank_of_row[inverse_n]
