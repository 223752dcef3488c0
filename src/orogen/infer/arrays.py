"""What an engine's programs are called with, as arrays that the host builds.

Letters: b slots, r rows that are read, t time, p pages of a row, d data ranks, l tokens of a text.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from orogen.config.engine import EngineConfig
from orogen.infer.buckets import Buckets, Call
from orogen.infer.forward import NONE
from orogen.infer.schedule import Piece
from orogen.infer.sizes import Sizes
from orogen.infer.slot import Slot
from orogen.infer.state import BEYOND, Entries


class Arrays:
    """Builds the arrays of one engine's calls, whose shapes the buckets say."""

    def __init__(self, config: EngineConfig, sizes: Sizes, buckets: Buckets, *, put: Callable[[Any], Any]) -> None:
        """put: lays arrays over slots on the devices."""
        self._sizes, self._buckets, self._put = sizes, buckets, put
        self._table_bp = np.zeros((config.slots, max(buckets.decode_reaches)), np.int32)
        self._tables: dict[int, Any] = {}  # its first columns as the devices have them, by their number

    def joined(self, slot: Slot) -> None:
        """A request has entered a slot. What leaves one needs no call: nothing reads its pages any more."""
        _fill(self._table_bp[slot.seat], slot.pages)
        self._tables.clear()

    def rows(self, call: Call) -> list[Piece | None]:
        """The piece of each row of a call, None: of none."""
        per_rank: list[list[Piece]] = [[] for _ in range(self._sizes.ranks)]
        for piece in call.pieces:
            per_rank[piece.slot // self._sizes.slots].append(piece)
        return [row for own in per_rank for row in (*own, *[None] * (call.rows - len(own)))]

    def pieces(
        self, rows: Sequence[Piece | None], length: int, slots: Mapping[int, Slot], reach: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (r, t) and pages of rows. reach: pages of the table; None: as many as the pieces need."""
        if reach is None:
            most = max(piece.start + piece.count for piece in rows if piece) + self._sizes.drafts
            reach = self._buckets.reach(most, self._buckets.reaches)
        # Padding is no token of the vocabulary, and is embedded as zeros: any token's numbers could be infinite.
        tokens_rt, table_rp = np.full((len(rows), length), NONE, np.int32), np.zeros((len(rows), reach), np.int32)
        for row, piece in enumerate(rows):
            if piece is not None:
                slot = slots[piece.slot]
                tokens_rt[row, : piece.count] = slot.request.prompt[piece.start : piece.start + piece.count]
                _fill(table_rp[row], slot.pages)
        return tokens_rt, table_rp

    def nexts(self, scored: Iterable[tuple[int, Piece, Slot]], shape: tuple[int, int]) -> np.ndarray:
        """(r, t) the token of the prompt after each of these pieces', which are in these rows; NONE for others."""
        next_rt = np.full(shape, NONE, np.int32)
        for row, piece, slot in scored:
            _fill(next_rt[row], slot.request.prompt[piece.start + 1 : piece.start + piece.count + 1])
        return next_rt

    def entries(self, entries: Entries, rows: Sequence[Piece | None], slots: Mapping[int, Slot]) -> Entries:
        """`entries`, of nothing, with what the pieces of rows and their slots say."""
        for row, piece in enumerate(rows):
            if piece is None:
                continue
            slot, end = slots[piece.slot], piece.start + piece.count
            entries.slot_r[row], entries.start_r[row] = piece.slot % self._sizes.slots, piece.start
            entries.count_r[row], entries.left_r[row] = piece.count, max(0, slot.request.max_tokens - 1)
            entries.next_r[row] = NONE if piece.last else slot.request.prompt[end]
            _fill(entries.ends_re[row], slot.end_ids)
        return entries

    def table(self, lengths: Iterable[int]) -> Any:
        """The page table of decoding, on the devices, for texts of these lengths."""
        reaches = self._buckets.decode_reaches
        return self.table_of(reaches[0] if len(reaches) == 1 else self._buckets.reach(max(lengths), reaches))

    def table_of(self, reach: int) -> Any:
        """The same, of so many pages."""
        if reach not in self._tables:
            self._tables[reach] = self._put(self._table_bp[:, :reach].copy())  # a CPU would use the host's own
        return self._tables[reach]

    def text(self, prompt: Sequence[int], length: int) -> np.ndarray:
        """The prompt for every data rank, so long as a slot's text."""
        text_dl = np.full((self._sizes.ranks, length), NONE, np.int32)
        text_dl[:, : len(prompt)] = prompt
        return text_dl

    def slot_row(self, slot: int) -> np.ndarray:
        """The slot's row in the caches of its data rank, and none in the others'."""
        return self._row(slot, slot % self._sizes.slots)

    def snapshot_row(self, slot: int, row: int | None) -> np.ndarray:
        """A row of the snapshots of the slot's data rank, and none of the others'; None: none of any."""
        return self._row(slot, BEYOND if row is None else row)

    def _row(self, slot: int, row: int) -> np.ndarray:
        rows = np.full(self._sizes.ranks, BEYOND, np.int32)
        rows[slot // self._sizes.slots] = row
        return rows


def _fill(row: np.ndarray, values: Sequence[int]) -> None:
    count = min(len(row), len(values))
    row[:count] = values[:count]
