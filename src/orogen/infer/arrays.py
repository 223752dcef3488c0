"""What an engine's programs are called with, as arrays that the host builds.

Letters: b slots, r rows that are read, t time, n drafts, p pages of a row, e ids that end a text, d data ranks,
l tokens of a text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from orogen.config.engine import EngineConfig
from orogen.infer.buckets import Buckets, Call
from orogen.infer.forward import NONE, Control, Pieces
from orogen.infer.schedule import Piece
from orogen.infer.sizes import Sizes
from orogen.infer.slot import MOST_ENDS, Slot

BEYOND = 2**30  # a row that no cache has


class Arrays:
    """Builds the arrays of one engine's calls, whose shapes the buckets say."""

    def __init__(self, config: EngineConfig, sizes: Sizes, buckets: Buckets, *, put: Callable[[Any], Any]) -> None:
        """put: lays arrays over slots on the devices."""
        self._config, self._sizes, self._buckets, self._put = config, sizes, buckets, put
        # What does not change with the tokens: ids that end texts, and pages by the width of their table.
        self._ends: Any = None
        self._tables: dict[int, Any] = {}

    def changed(self) -> None:
        """A request came or went."""
        self._ends = None
        self._tables.clear()

    def pieces(
        self, call: Call, slots: Mapping[int, Slot], reach: int | None = None
    ) -> tuple[list[Piece | None], tuple[np.ndarray, Pieces]]:
        """The piece of each row, None: of none; and the slot of each row in its rank, with the arrays. reach: pages of
        the table; None: as many as the pieces need."""
        each = self._sizes.slots
        per_rank: list[list[Piece]] = [[] for _ in range(self._sizes.ranks)]
        for piece in call.pieces:
            per_rank[piece.slot // each].append(piece)
        if reach is None:
            most = max(piece.start + piece.count for piece in call.pieces) + self._sizes.drafts
            reach = self._buckets.reach(most, self._buckets.reaches)
        length, width = call.length, call.rows
        rows = [row for own in per_rank for row in (*own, *[None] * (width - len(own)))]
        count = len(rows)
        # Padding is no token of the vocabulary, and is embedded as zeros: any token's numbers could be infinite.
        tokens_rt, table_rp = np.full((count, length), NONE, np.int32), np.zeros((count, reach), np.int32)
        slot_r, next_r, start_r, count_r = (np.full(count, fill, np.int32) for fill in (each, NONE, 0, 0))
        for row, piece in enumerate(rows):
            if piece is None:
                continue
            slot, end = slots[piece.slot], piece.start + piece.count
            tokens_rt[row, : piece.count] = slot.request.prompt[piece.start : end]
            slot_r[row], start_r[row], count_r[row] = piece.slot % each, piece.start, piece.count
            next_r[row] = NONE if piece.last else slot.request.prompt[end]
            _fill(table_rp[row], slot.pages)
        return rows, (slot_r, Pieces(tokens_rt, next_r, start_r, count_r, table_rp))

    def control(
        self, decoding: Sequence[int], slots: Mapping[int, Slot], fed: int, reach: int | None = None
    ) -> Control:
        """The slots that decode. fed: the most tokens that each will read. reach: as in `pieces`."""
        count, drafts = self._config.slots, self._sizes.drafts
        small_3b = np.zeros((3, count), np.int32)
        small_3b[0] = NONE  # of slots that do not decode, as padding in `pieces`
        rows = [(slot.generated[-1], slot.place, slot.left) for slot in map(slots.__getitem__, decoding)]
        small_3b[:, decoding] = np.array(rows, np.int32).reshape(-1, 3).T
        token_b, place_b, left_b = small_3b
        drafts_bn = np.full((count, drafts), NONE, np.int32)
        for number in decoding if drafts else ():
            slot = slots[number]
            if slot.drafts is not None and slot.matcher is None:
                drafts_bn[number] = slot.drafts
        fed += max(drafts - 1, 0)  # the block that drafts reads drafts too
        if reach is None:
            most = max(place + min(fed, left + drafts) for _, place, left in rows)
            reach = self._buckets.reach(most, self._buckets.decode_reaches)
        if reach not in self._tables:
            table_bp = np.zeros((count, reach), np.int32)
            for number, slot in slots.items():
                _fill(table_bp[number], slot.pages)
            self._tables[reach] = self._put(table_bp)
        if self._ends is None:
            ends_be = np.full((count, MOST_ENDS), NONE, np.int32)
            for number, slot in slots.items():
                _fill(ends_be[number], slot.ends)
            self._ends = self._put(ends_be)
        return Control(token_b, place_b, left_b, drafts_bn, self._ends, self._tables[reach])

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
