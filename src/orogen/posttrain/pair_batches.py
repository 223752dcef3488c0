"""Batches of pairs: both answers of a pair are neighbours in one row, and a row has as many pairs as fit.

A row lies on one data rank and in one microbatch, so a loss of pairs needs no exchange between these.

Letters: b batch (rows), t time.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from orogen.config.checks import ConfigError
from orogen.data.packing import Batch, best_fit, empty_batch
from orogen.posttrain.pairs import Pair
from orogen.posttrain.preference import REFERENCE

ROW = "row"  # an extra: the number of a row in its batch
# Log-probabilities (p, 2) of each pair's answers under the reference model, float32.
References = np.ndarray


class Reference(Protocol):
    """Gives the references of a split's pairs, (p, 2), from the state that is about to train; see `reference.py`."""

    def of(self, split: str, state: Any, progress: Callable[[], None]) -> References: ...


def packed(pairs: Sequence[Pair], *, length: int) -> list[list[int]]:
    """The numbers of the pairs of each row, by best fit."""
    rows: dict[int, list[int]] = {}
    for number, row in enumerate(best_fit([pair.length for pair in pairs], capacity=length).tolist()):
        rows.setdefault(row, []).append(number)
    return list(rows.values())


def pair_batch(
    rows: Sequence[Sequence[int]],
    pairs: Sequence[Pair],
    references: References | None,
    *,
    size: int,
    length: int,
    pad_id: int,
) -> Batch:
    """A batch of `size` rows, which hold the pairs of these numbers; the last rows may be empty. Without references,
    the batch has none."""
    batch = empty_batch(size, sequence_length=length, pad_id=pad_id)
    extras: dict[str, np.ndarray] = {ROW: np.broadcast_to(np.arange(size, dtype=np.int32)[:, None], (size, length))}
    if references is not None:
        extras[REFERENCE] = np.zeros((size, length), np.float32)
    for row, numbers in enumerate(rows):
        start, segment = 0, 0
        for number in numbers:
            for side, piece in enumerate(pairs[number]):
                tokens_t, weights_t = piece.tokens_t, piece.weights_t
                span, segment = (row, slice(start, start + len(tokens_t))), segment + 1
                batch.tokens_bt[span], batch.segments_bt[span] = tokens_t, segment
                batch.positions_bt[span], batch.weights_bt[span] = np.arange(len(tokens_t)), weights_t
                if references is not None:
                    extras[REFERENCE][row, start] = references[number, side]
                start += len(tokens_t)
    batch.weights_bt[batch.positions_bt == 0] = 0
    return batch._replace(extras=extras)


class PairSource:
    """Endless batches of pairs (see `train.task.Source`): each epoch has every pair once, packed and shuffled anew.

    reference: gives those of the train split's pairs; None: the batches have none. seed: of the order; None
    keeps that of the pairs. identity: what a saved position must agree on. Raises ConfigError if there is no pair.
    """

    def __init__(
        self, pairs: Sequence[Pair], reference: Reference | None, *, size: int, length: int, pad_id: int,
        seed: int | None, identity: dict[str, Any],
    ):  # fmt: skip
        if not pairs:
            raise ConfigError("there is no pair to train on; expected at least one")
        self._pairs, self._reference, self._seed = pairs, reference, seed
        self.progress: Callable[[], None] = lambda: None
        self._shape = {"size": size, "length": length, "pad_id": pad_id}
        self._identity = {**identity, **self._shape, "shuffle_seed": seed}
        self._begin(epoch=0, row=0)

    def _begin(self, *, epoch: int, row: int) -> None:
        """Goes to a row of an epoch."""
        order = np.arange(len(self._pairs))
        rng = None if self._seed is None else np.random.default_rng([self._seed, epoch])
        if rng is not None:
            order = rng.permutation(order)
        rows = packed([self._pairs[number] for number in order.tolist()], length=self._shape["length"])
        if rng is not None:
            rows = [rows[int(number)] for number in rng.permutation(len(rows))]
        self._rows = [order[numbers].tolist() for numbers in rows]
        self._epoch, self._row = epoch, row

    def take(self, state: Any) -> Batch:
        """The next batch; see `Source`."""
        references = None if self._reference is None else self._reference.of("train", state, self.progress)
        rows = []
        while len(rows) < self._shape["size"]:
            if self._row == len(self._rows):
                self._begin(epoch=self._epoch + 1, row=0)
            rows.append(self._rows[self._row])
            self._row += 1
        return pair_batch(rows, self._pairs, references, **self._shape)

    def state(self) -> dict[str, Any]:
        """See `Source`."""
        return {"position": {"epoch": self._epoch, "row": self._row}, "identity": dict(self._identity)}

    def restore(self, state: dict[str, Any]) -> None:
        """See `Source`."""
        identity, position = state.get("identity"), state.get("position")
        if not isinstance(identity, dict) or not isinstance(position, dict):
            raise ConfigError("the saved data position has no identity and position; expected those of pairs")
        for name, value in self._identity.items():
            if identity.get(name) != value:
                raise ConfigError(f"the saved data position has {name} = {identity.get(name)!r}; expected {value!r}")
        epoch, row = position.get("epoch"), position.get("row")
        if type(epoch) is not int or type(row) is not int or min(epoch, row) < 0:
            raise ConfigError(f"the saved data position is {position!r}; expected an epoch and a row")
        self._begin(epoch=epoch, row=row)
        if self._row > len(self._rows):
            raise ConfigError(f"the saved data position has row = {self._row}; expected at most {len(self._rows)}")
