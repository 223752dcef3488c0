"""Batches of several sources in given shares, with shapes and shares that change on the way.

Every source is shuffled and packed by itself, so a row holds documents of one source. Each row is taken from the source
that is furthest behind its share of the tokens seen. That is deterministic, and no source is ever further from its
share than a few rows, in a batch or after a million.

Legend: b batch (rows), t time.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from orogen.config.checks import ConfigError
from orogen.config.phases import Stretch
from orogen.data.packing import Batch
from orogen.data.windows import PackedRows, stack


class Source(NamedTuple):
    """documents: shuffled and repeated as often as allowed; count: those of one epoch."""

    documents: grain.MapDataset
    count: int


class BlendedBatches(grain.IterDataset):
    """Batches of the stretches of a run.

    Where the sequence length changes, every source goes on with the window of documents behind the one that it was
    reading; the unread rows of that window are dropped (at most `window_tokens` per source and change). A source whose
    documents are used up is left out from then on. Raises ConfigError if none is left.
    """

    def __init__(self, sources: Mapping[str, Source], stretches: Sequence[Stretch], **settings: Any) -> None:
        super().__init__()
        self._sources, self._stretches, self._settings = sources, stretches, settings

    def __iter__(self) -> "_Iterator":
        return _Iterator(self._sources, self._stretches, self._settings)


class _Iterator(grain.DatasetIterator):
    """Its state: the step, which a roll-back changes; the sequence length of the windows; the phase and the tokens seen
    by source since the shares last changed; and by source its position, the epochs read and whether it is used up."""

    def __init__(self, sources: Mapping[str, Source], stretches: Sequence[Stretch], settings: dict[str, Any]) -> None:
        super().__init__()
        self._stretches, self._counts = stretches, {name: source.count for name, source in sources.items()}
        self._step, self._length, self._phase = 0, stretches[0].sequence_length, 0
        self._iterators: dict[str, Any] = {
            name: iter(
                PackedRows(
                    source.documents, sequence_length=self._length, window_documents=source.count, **settings
                )
            )
            for name, source in sources.items()
        }  # fmt: skip
        self._seen = dict.fromkeys(sources, 0)
        self._used_up, self._epochs = dict.fromkeys(sources, 0), dict.fromkeys(sources, 0.0)

    def get_state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "sequence_length": self._length,
            "phase": self._phase,
            "seen": dict(self._seen),
            "used_up": dict(self._used_up),
            "rows": {name: copy.deepcopy(iterator.get_state()) for name, iterator in self._iterators.items()},
            "epochs": dict(self._epochs),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._step, self._length, self._phase = state["step"], state["sequence_length"], state["phase"]
        self._seen, self._used_up = dict(state["seen"]), dict(state["used_up"])
        self._epochs = dict(state["epochs"])
        for name, iterator in self._iterators.items():
            iterator.resize(self._length)
            iterator.set_state(state["rows"][name])

    def __next__(self) -> Batch:
        now = [one for one in self._stretches if one.after <= self._step][-1]
        if now.phase != self._phase:
            self._phase, self._seen = now.phase, dict.fromkeys(self._seen, 0)
        if now.sequence_length != self._length:
            self._length = now.sequence_length
            for iterator in self._iterators.values():
                iterator.leave_window()
                iterator.resize(self._length)
        batch = stack([self._next_row(now.weights) for _ in range(now.batch_size)])
        self._step += 1
        return batch

    def _next_row(self, weights: Mapping[str, float]) -> Batch:
        while True:
            name = self._furthest_behind(weights)
            try:
                row = next(self._iterators[name])
            except StopIteration:
                # The others keep their shares among each other, counted anew.
                self._used_up[name], self._seen = 1, dict.fromkeys(self._seen, 0)
                continue
            self._seen[name] += int(np.count_nonzero(row.segments_bt))
            self._epochs[name] = self._iterators[name].documents_read / self._counts[name]
            return row

    def _furthest_behind(self, weights: Mapping[str, float]) -> str:
        left = {name: weight for name, weight in weights.items() if weight > 0 and not self._used_up[name]}
        if not left:
            asked = [name for name, weight in weights.items() if weight > 0]
            raise ConfigError(
                f"step {self._step + 1} finds no more documents in {asked}; expected SourceConfig.max_epochs that "
                "suffice for TrainConfig.steps"
            )
        wanted = (sum(self._seen.values()) + self._length) / sum(left.values())
        return max(left, key=lambda name: left[name] * wanted - self._seen[name])


def measures(position: Any) -> dict[str, float]:
    """What a saved position says about a blend: its phase and, by source, the share of the tokens seen since the shares
    last changed, and the epochs. Empty for other positions."""
    state = position.get("position") if isinstance(position, dict) else None
    if not isinstance(state, dict) or "seen" not in state:
        return {}
    total = max(sum(state["seen"].values()), 1)
    shares = {f"share/{name}": seen / total for name, seen in state["seen"].items()}
    return {"phase": state["phase"], **shares, **{f"epochs/{name}": x for name, x in state["epochs"].items()}}


def at_step(position: Any, step: int) -> Any:
    """The position as one after `step` steps: after a roll-back, phases begin at the same steps as without one."""
    state = position.get("position") if isinstance(position, dict) else None
    if not isinstance(state, dict) or "step" not in state:
        return position
    return {**position, "position": {**state, "step": step}}
