"""Batches of documents: shuffled, packed, shared among processes; their position can be saved and restored.

Legend: b batch (rows), t time.
"""

import copy
import dataclasses
import hashlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.phases import Stretch
from orogen.data.blend import BlendedBatches, Source
from orogen.data.lanes import LaneRows
from orogen.data.packing import Batch, Stream, empty_batch
from orogen.data.splits import Split, Thinned
from orogen.data.windows import WINDOW_TOKENS, PackedRows, stack

THINNED = 4  # times as many tokens as rows need: documents differ in length


class Loader:
    """An iterator over batches whose position can be saved and restored to the bit."""

    def __init__(self, batches: grain.IterDataset, *, identity: dict[str, Any]) -> None:
        self._identity = identity
        self.progress: Callable[[], None] = lambda: None  # reading never takes long enough to call it
        # Kept so that the finalizer can drop it, at exit too: a prefetching iterator of grain 0.2.18 that outlives the
        # interpreter's modules prints a traceback.
        self._held = [iter(batches)]
        weakref.finalize(self, self._held.clear)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._held[0])

    def take(self, state: Any) -> Batch:
        """The next batch: text does not depend on the model's `state`."""
        return next(self)

    def state(self) -> dict[str, Any]:
        """The position after the last batch taken, as plain JSON; the same on every process."""
        return {"position": copy.deepcopy(self._held[0].get_state()), "identity": dict(self._identity)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken. Raises ConfigError if it is from other data."""
        for field in ("position", "identity"):
            if not isinstance(state.get(field), dict):
                raise ConfigError(f"the saved data position has no object {field!r}; expected one")
        for name, value in self._identity.items():
            if state["identity"].get(name) != value:
                raise ConfigError(
                    f"the saved data position has {name} = {state['identity'].get(name)!r}: expected {value!r}, "
                    "or the batches after it would not be those of the saved run"
                )
        if not _alike(state["position"], self._held[0].get_state()):
            raise ConfigError(f"the saved data position is {state['position']!r}; expected one of this corpus's loader")
        self._held[0].set_state(copy.deepcopy(state["position"]))


def _alike(position: Any, known: Any) -> bool:
    """Whether a position has the keys of `known`, an iterator's own, and whole numbers from 0 in the same places."""
    if isinstance(known, dict):
        keys = isinstance(position, dict) and position.keys() == known.keys()
        return keys and all(_alike(position[key], value) for key, value in known.items())
    return type(position) is type(known) and (type(known) is not int or 0 <= position < 2**63)


def make_loader(
    streams: Split | Sequence[Stream],
    *,
    batch_size: int,
    sequence_length: int,
    pad_id: int,
    shuffle_seed: int | None,
    process_index: int = 0,
    process_count: int = 1,
    identity: dict[str, Any] | None = None,
    window_tokens: int = WINDOW_TOKENS,
    lanes: bool = False,
) -> Loader:
    """Endless batches of the streams, each epoch in a new order; `shuffle_seed` None keeps their order.

    Rows are packed, or, with `lanes`, each continues the same row of the previous batch: see `LaneRows`.
    Every process packs the same global batches and keeps its own rows, so that neither the data nor a saved
    position depends on the number of processes. `identity` is what a saved position must agree on.
    Raises ConfigError if there is no stream, a row has no room for a target, or processes cannot share a batch evenly.
    """
    if not len(streams):
        raise ConfigError("streams is empty: expected at least one document")
    own_rows = rows_of_process(batch_size, sequence_length, process_index, process_count)
    documents = grain.MapDataset.source(streams)
    if shuffle_seed is not None:
        documents = documents.shuffle(_spread(shuffle_seed))
    settings = {"batch_size": batch_size, "sequence_length": sequence_length, "shuffle_seed": shuffle_seed}
    if lanes:
        if len(streams) < batch_size:
            expected = f"at most {len(streams)}, the number of documents: each row reads its own, and continues it"
            raise ConfigError(f"batch_size = {batch_size}: expected {expected}")
        settings["lanes"] = True
        batches = LaneRows(documents.repeat(), lanes=batch_size, sequence_length=sequence_length)
    else:
        rows = PackedRows(
            documents.repeat(), sequence_length=sequence_length, pad_id=pad_id, shuffle_seed=shuffle_seed,
            window_tokens=window_tokens, window_documents=len(streams),
        )  # fmt: skip
        batches = rows.batch(batch_size, drop_remainder=True, batch_fn=stack)
    return Loader(
        grain.experimental.ThreadPrefetchIterDataset(batches.map(_rows_taker(own_rows)), prefetch_buffer_size=2),
        identity={**(identity or {}), **settings},
    )


def make_blend(
    splits: Mapping[str, Split],
    stretches: Sequence[Stretch],
    *,
    pad_id: int,
    shuffle_seed: int | None,
    max_epochs: Mapping[str, float | None],
    process_index: int = 0,
    process_count: int = 1,
    identity: dict[str, Any] | None = None,
    window_tokens: int = WINDOW_TOKENS,
) -> Loader:
    """Endless batches of several sources, as the stretches of a run ask for; see `BlendedBatches`.

    Each source is shuffled as a whole, in a new order in every epoch; `shuffle_seed` None keeps the order of documents.
    Processes, positions and identity as in `make_loader`. Raises ConfigError if a source has no document, or if
    processes cannot share a batch evenly.
    """
    sources = {}
    for name, split in splits.items():
        if not len(split):
            raise ConfigError(f"source {name!r} has no document to train on; expected at least one")
        documents = grain.MapDataset.source(split)
        if shuffle_seed is not None:
            documents = documents.shuffle(_spread(shuffle_seed if len(splits) == 1 else f"{shuffle_seed}:{name}"))
        limit = max_epochs.get(name)
        documents = documents.repeat()
        if limit is not None:
            documents = documents.slice(slice(0, max(1, round(limit * len(split)))))
        sources[name] = Source(documents, len(split))
    for one in stretches:
        rows_of_process(one.batch_size, one.sequence_length, process_index, process_count)
    batches = BlendedBatches(
        sources, stretches, pad_id=pad_id, shuffle_seed=shuffle_seed, window_tokens=window_tokens,
    )  # fmt: skip

    def own(batch: Batch) -> Batch:
        rows, length = batch.tokens_bt.shape
        return _rows_taker(rows_of_process(rows, length, process_index, process_count))(batch)

    return Loader(
        grain.experimental.ThreadPrefetchIterDataset(batches.map(own), prefetch_buffer_size=2),
        identity={**(identity or {}), "shuffle_seed": shuffle_seed},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldoutPass:
    """One unshuffled pass over documents; each `iter` starts it anew. The last batch is padded with empty rows.

    bits per byte = sum of nats / ln 2 / `byte_count`. Predicting eos costs nats and adds no byte, so a model pays
    for knowing where a document ends; `byte_count` is of the whole pass, over all processes.
    """

    streams: Split
    batch_size: int
    sequence_length: int
    pad_id: int
    process_rows: slice

    @property
    def byte_count(self) -> int:
        """UTF-8 bytes of all documents of the pass."""
        return self.streams.byte_count

    def thinned(self, rows: int) -> "HeldoutPass":
        """A pass over enough evenly spread documents for `rows` rows, if the split is much larger; else this pass. It
        has no `byte_count`."""
        count, wanted = self.streams.token_count, THINNED * rows * self.sequence_length
        if count is None or count <= max(wanted, WINDOW_TOKENS):
            return self
        number = -(-len(self.streams) * wanted // count)
        return dataclasses.replace(self, streams=Thinned(self.streams, number))

    def __iter__(self) -> Iterator[Batch]:
        rows = PackedRows(
            grain.MapDataset.source(self.streams),
            sequence_length=self.sequence_length,
            pad_id=self.pad_id,
            shuffle_seed=None,
            window_tokens=WINDOW_TOKENS,
            window_documents=len(self.streams),
        )
        take = _rows_taker(self.process_rows)
        for batch in rows.batch(self.batch_size, drop_remainder=False, batch_fn=stack):
            missing = self.batch_size - len(batch.tokens_bt)
            padding = empty_batch(missing, sequence_length=self.sequence_length, pad_id=self.pad_id)
            extras = {name: np.full((missing, *x.shape[1:]), -1, x.dtype) for name, x in batch.extras.items()}
            padding = padding._replace(extras=extras)
            yield take(batch.map(lambda *parts: np.concatenate(parts), padding))


def _rows_taker(rows: slice) -> Callable[[Batch], Batch]:
    return lambda batch: batch.map(lambda x_bt: x_bt[rows])


def rows_of_process(batch_size: int, sequence_length: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that belong to one process. Raises ConfigError for an impossible shape."""
    if sequence_length < 2:
        raise ConfigError(f"sequence_length = {sequence_length}: expected at least 2, a token and its target")
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: expected at least 1")
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index = {process_index}: expected 0 to process_count - 1 = {process_count - 1}")
    if batch_size % process_count:
        raise ConfigError(f"batch_size = {batch_size}: expected a multiple of process_count = {process_count}")
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _spread(seed: int | str) -> int:
    """A seed far from its neighbours: grain's epoch e uses seed + e, so seed 0's epoch 1 would be seed 1's epoch 0."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
