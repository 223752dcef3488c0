"""Packs a stream of documents into rows, window by window, so that a position in it is small and can be saved.

Legend: b batch (rows), t time.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from orogen.config.checks import ConfigError
from orogen.data.packing import Batch, Stream, in_pieces, pack

# Rows are packed, and shuffled, within a window of documents of at least this many tokens and rows: wide enough
# that a batch mixes about a hundred source files and that the one unfilled row of a window does not matter.
WINDOW_TOKENS = 2**19
WINDOW_ROWS = 64


class PackedRows(grain.IterDataset):
    """Streams split and packed window by window; an element is one row, a Batch without its b axis."""

    def __init__(self, documents: grain.MapDataset, **settings: Any) -> None:
        # No reading threads: the documents are in memory, and `make_loader` prefetches whole batches.
        super().__init__(documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
        self._settings = settings

    def __iter__(self) -> "_Iterator":
        return _Iterator(iter(self._parent), **self._settings)


class _Iterator(grain.DatasetIterator):
    """Its state is the upstream position at which the window began, the window's number and the next row; the window
    itself is packed again."""

    def __init__(
        self,
        parent: grain.DatasetIterator,
        *,
        sequence_length: int,
        pad_id: int,
        shuffle_seed: int | None,
        window_tokens: int,
        window_documents: int,
    ) -> None:
        super().__init__(parent)
        self._pad_id = pad_id
        self._shuffle_seed = shuffle_seed
        self._least_tokens = window_tokens
        self._window_documents = window_documents
        self.resize(sequence_length)
        self._start_window(number=0, row=0)

    def resize(self, sequence_length: int) -> None:
        """Gives the windows from the next one on another sequence length."""
        self._sequence_length = sequence_length
        self._window_tokens = max(self._least_tokens, WINDOW_ROWS * sequence_length)

    def leave_window(self) -> None:
        """Goes to the beginning of the next window, unless no row of this one has been read."""
        if self._row:
            self._window = self._window or self._next_window()
            self._start_window(number=self._number + 1, row=0)
        elif self._window is not None:
            self._parent.set_state(self._parent_state)
            self._window = None

    @property
    def documents_read(self) -> int:
        """Documents of the windows before this one, and of this one in proportion to the rows read."""
        before = self._parent_state["next_index"]
        if self._window is None:
            return before
        held = self._parent.get_state()["next_index"] - before
        return before + held * self._row // len(self._window.tokens_bt)

    def _start_window(self, *, number: int, row: int) -> None:
        self._parent_state = self._parent.get_state()
        self._number = number
        self._row = row
        self._window: Batch | None = None

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent_state, "window": self._number, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._start_window(number=state["window"], row=state["row"])

    def __next__(self) -> Batch:
        if self._window is None:
            self._window = self._next_window()
            if self._row >= len(self._window.tokens_bt):  # possible only for a saved position
                rows = len(self._window.tokens_bt)
                raise ConfigError(f"the saved data position has row = {self._row}; expected below {rows}")
        row = self._window.map(lambda x_bt: x_bt[self._row])
        self._row += 1
        if self._row == len(self._window.tokens_bt):
            self._start_window(number=self._number + 1, row=0)
        return row

    def _next_window(self) -> Batch:
        """The next documents, packed. A window holds at most one epoch; otherwise it would read a tiny corpus many
        times."""
        pieces: list[Stream] = []
        tokens = documents = 0
        while tokens < self._window_tokens and documents < self._window_documents:
            try:
                stream = next(self._parent)
            except StopIteration:
                break
            documents += 1
            tokens += len(stream.tokens_t)
            pieces += in_pieces(stream, sequence_length=self._sequence_length)
        if not pieces:
            raise StopIteration
        window = pack(pieces, sequence_length=self._sequence_length, pad_id=self._pad_id)
        if self._shuffle_seed is None:
            return window
        order_b = np.random.default_rng([self._shuffle_seed, self._number]).permutation(len(window.tokens_bt))
        return window.map(lambda x_bt: x_bt[order_b])


def stack(rows: Sequence[Batch]) -> Batch:
    """A batch of rows that have no b axis."""
    return rows[0].map(lambda *x_t: np.stack(x_t), *rows[1:])
