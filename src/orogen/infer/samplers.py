"""What an engine's programs choose tokens with: settings and state of rows, laid on the devices.

Programs that decode come in three kinds, and each call takes the least that can do what its requests ask for; what
reads prompts can do everything, for a call chooses few tokens there.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orogen.infer.budget import thought_of
from orogen.infer.knobs import Features, knobs_of, words_of_mask
from orogen.infer.packing import pack
from orogen.infer.programs import Programs
from orogen.infer.sampling import History, history_of
from orogen.infer.slot import Slot
from orogen.infer.state import MOST_ENDS, Entries, Seats, no_entries, no_seats

GREEDY = Features()
DRAWN = Features(draws=True, restricts=True, logprobs=0)


class Samplers:
    """The samplers of one engine's calls.

    What may be kept on the devices always comes from there: jax compiles a program once more for the host's arrays.
    Settings of slots are kept as the host packs them and as the devices have them. When a request enters or leaves a
    slot, that row alone is packed anew; with nothing changed, a call takes no transfer.
    """

    def __init__(self, programs: Programs) -> None:
        self._programs, config = programs, programs.config
        self._size = programs.opened.config.vocab_size
        self.everything = programs.everything
        # Answers that are the same to the bit come from one program.
        self.kinds = (self.everything,) if config.exact else (GREEDY, DRAWN, self.everything)
        self._packed_bw = {kind: pack(no_seats(config.slots, kind)) for kind in self.kinds}
        self._changed: dict[Features, set[int]] = {kind: set() for kind in self.kinds}  # rows that are not packed yet
        self._laid: dict[Features, Any] = {}
        self._blank: dict[int, tuple[Any, Any]] = {}  # by rows: counts and prompts where nobody is penalised
        self._unmasked: dict[Any, Any] = {}  # by rows, and whether these are slots

    def changed(self, slot: int) -> None:
        """A request has entered or left the slot."""
        for changed in self._changed.values():
            changed.add(slot)

    def decoding(self, slots: Mapping[int, Slot], runs_b: np.ndarray) -> tuple[Features, Any, Any]:
        """For a call of decoding: what its program must be able to do, the packed `Seats` of all slots, and masks.
        runs_b: as in `Seats`."""
        running = [slots.get(number) if runs else None for number, runs in enumerate(runs_b.tolist())]
        wanted = {slot.features for slot in running if slot}
        kind = next(kind for kind in self.kinds if all(_does(kind, each) for each in wanted))
        packed_bw = self._packed_bw[kind]
        if changed := sorted(self._changed[kind]):
            packed_bw[changed] = pack(_seats([slots.get(number) for number in changed], kind))
            self._changed[kind].clear()
            self._laid.pop(kind, None)
        if (packed_bw[:, 0] != runs_b).any():
            packed_bw[:, 0] = runs_b
            self._laid.pop(kind, None)
        if kind not in self._laid:
            self._laid[kind] = self._programs.put(packed_bw.copy())  # a CPU would use the host's own
        return kind, self._laid[kind], self._masks(running, slots=True) if kind.masks else None

    def idle(self, features: Features) -> tuple[Any, Any]:
        """Packed seats and masks of a call of decoding in which no slot runs."""
        packed_bw = pack(no_seats(self._programs.config.slots, features))
        masks = self._masks([None] * len(packed_bw), slots=True) if features.masks else None
        return self._programs.put(packed_bw), masks

    def reading(self, rows: Sequence[Slot | None]) -> tuple[Entries, History, Any]:
        """For a call that reads: `Entries` with the settings of the rows whose prompts end in it, None for the others;
        their counts and prompts; and masks."""
        features, requests = self.everything, [slot and slot.request for slot in rows]
        entries = no_entries(len(rows), features)._replace(knobs=knobs_of(requests, features))
        if features.budgets and any(requests):
            entries = entries._replace(thought=thought_of(requests, [()] * len(rows), self._programs.markers))
        counts = self._counts(rows)
        return entries, History(None, *counts, None), self._masks(rows, slots=False) if features.masks else None

    def _counts(self, rows: Sequence[Slot | None]) -> tuple[Any, Any]:
        """What `History` has counted; for rows that pay no attention to it, what was made before, since it is as large
        as the logits."""
        if any(slot is not None and slot.features.penalties for slot in rows):
            requests = [slot and slot.request for slot in rows]
            made = history_of(requests, Features(penalties=True), vocab_size=self._size)
            return self._programs.put_rows((made.counts_bv, made.prompt_bv))
        if len(rows) not in self._blank:
            shape = len(rows), self._size
            self._blank[len(rows)] = self._programs.put_rows((np.zeros(shape, np.int32), np.zeros(shape, bool)))
        return self._blank[len(rows)]

    def _masks(self, rows: Sequence[Slot | None], *, slots: bool) -> Any:
        """Allowed tokens of all slots, or of rows that are read."""
        put = self._programs.put if slots else self._programs.put_rows
        matched = [
            (row, slot.matcher) for row, slot in enumerate(rows) if slot is not None and slot.matcher is not None
        ]
        shape = len(rows), words_of_mask(self._size)
        if not matched:
            if (len(rows), slots) not in self._unmasked:
                self._unmasked[len(rows), slots] = put(np.full(shape, 2**32 - 1, np.uint32))
            return self._unmasked[len(rows), slots]
        mask_bw = np.full(shape, 2**32 - 1, np.uint32)
        for row, matcher in matched:
            matcher.mask_into(mask_bw[row])
        return put(mask_bw)


def _seats(slots: Sequence[Slot | None], features: Features) -> Seats:
    """What is told of these slots, none of which runs yet. Settings that a program has no room for are left out: it
    does not run while they are asked for."""
    seats, requests = no_seats(len(slots), features), [None if slot is None else slot.request for slot in slots]
    for row, slot in enumerate(slots):
        if slot is not None:
            end_ids = slot.end_ids[:MOST_ENDS]
            seats.ends_be[row, : len(end_ids)] = end_ids
            requests[row] = slot.request if _does(features, slot.features) else None
    return seats._replace(knobs=knobs_of(requests, features))


@functools.cache
def _does(kind: Features, wanted: Features) -> bool:
    """Whether programs of this kind do all that is wanted."""
    none = lambda value: -1 if value is None else int(value)  # noqa: E731
    return all(none(a) >= none(b) for a, b in zip(kind.values, wanted.values, strict=True))
