"""Rows that continue: each row of a batch, a lane, begins where the same row of the previous batch ended.

Legend: b batch (lanes), t time.
"""

from typing import Any

import grain
import numpy as np

from orogen.config.checks import ConfigError
from orogen.data.packing import NEXT, NEXT_WEIGHT, NOTHING, Batch, Stream, empty_batch

_BY_LANE = ("document", "read")


class LaneRows(grain.IterDataset):
    """Endless batches of `lanes` rows over `documents`, an endless dataset. Each lane reads one document to its last
    token, then the next one that no lane has taken. Nothing is padded, and every token except a document's first is
    predicted once, by NEXT, with its weight. Positions count from a document's first token, across rows."""

    def __init__(self, documents: grain.MapDataset[Stream], *, lanes: int, sequence_length: int) -> None:
        super().__init__()
        self._documents, self._lanes, self._sequence_length = documents, lanes, sequence_length

    def __iter__(self) -> "_LaneIterator":
        return _LaneIterator(self._documents, self._lanes, self._sequence_length)


class _LaneIterator(grain.DatasetIterator):
    """Its state is each lane's document, the number of tokens read of it, and the next document to take."""

    def __init__(self, documents: grain.MapDataset[Stream], lanes: int, sequence_length: int) -> None:
        super().__init__()
        self._documents, self._lanes, self._sequence_length = documents, lanes, sequence_length
        # Lane b begins at the first token of document b.
        self._document, self._read, self._next = list(range(lanes)), [0] * lanes, lanes
        self._held: dict[int, Stream] = {}

    def get_state(self) -> dict[str, Any]:
        by_lane = lambda numbers: {str(lane): number for lane, number in enumerate(numbers)}  # noqa: E731
        return {"document": by_lane(self._document), "read": by_lane(self._read), "next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._document, self._read = ([state[name][str(lane)] for lane in range(self._lanes)] for name in _BY_LANE)
        self._next, self._held = state["next"], {}
        for lane, read in enumerate(self._read):
            if read > (length := len(self._stream(lane).tokens_t)):
                raise ConfigError(f"the saved data position has read = {read}; expected at most {length}")

    def __next__(self) -> Batch:
        batch = empty_batch(self._lanes, sequence_length=self._sequence_length, pad_id=0)
        extras = {NEXT: np.full_like(batch.tokens_bt, NOTHING), NEXT_WEIGHT: np.zeros_like(batch.weights_bt)}
        batch = batch._replace(extras=extras)
        for lane in range(self._lanes):
            self._fill(lane, batch.map(lambda x_bt, lane=lane: x_bt[lane]))
        return batch

    def _fill(self, lane: int, row: Batch) -> None:
        """Writes the lane's next row."""
        used, segment = 0, 0
        while used < self._sequence_length:
            (tokens_t, weights_t, _), read = self._stream(lane), self._read[lane]
            if read == len(tokens_t):
                self._held.pop(lane)
                self._document[lane], self._read[lane] = self._next, 0
                self._next += 1
                continue
            length = min(len(tokens_t) - read, self._sequence_length - used)
            span, segment = slice(used, used + length), segment + 1
            row.tokens_bt[span] = tokens_t[read : read + length]
            row.segments_bt[span] = segment
            row.positions_bt[span] = np.arange(read, read + length)
            row.weights_bt[span] = np.where(row.positions_bt[span] > 0, weights_t[read : read + length], 0)
            following = slice(read + 1, read + length + 1)
            predicting = slice(used, used + len(tokens_t[following]))
            row.extras[NEXT][predicting] = tokens_t[following]
            row.extras[NEXT_WEIGHT][predicting] = weights_t[following]
            self._read[lane] += length
            used += length

    def _stream(self, lane: int) -> Stream:
        """The lane's document, which is built once, however many rows it fills."""
        if lane not in self._held:
            stream: Any = self._documents[self._document[lane]]
            self._held[lane] = stream
        return self._held[lane]
