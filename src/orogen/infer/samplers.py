"""What an engine's programs choose tokens with: settings and state of rows, laid on the devices.

Programs that decode come in three kinds, and each call takes the least that can do what its requests ask for; what
reads prompts can do everything, for a call chooses few tokens there.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orogen.config.checks import ConfigError
from orogen.infer.forward import Sampler
from orogen.infer.knobs import Features, features_of, knobs_of, words_of_mask
from orogen.infer.programs import Programs
from orogen.infer.request import MOST_LOGPROBS
from orogen.infer.sampling import rows_of
from orogen.infer.slot import Slot

GREEDY = Features()
DRAWN = Features(draws=True, restricts=True, logprobs=0)


class Samplers:
    """The samplers of one engine's calls."""

    def __init__(self, programs: Programs) -> None:
        self._programs, config = programs, programs.config
        self._slots, self._size = config.slots, programs.opened.config.vocab_size
        self.everything = _everything(programs)
        # Answers that are the same to the bit come from one program.
        self.kinds = (self.everything,) if config.exact else (GREEDY, DRAWN, self.everything)
        self._decoding: tuple[Features, Sampler] | None = None  # of those that run; None: they have changed
        self._blank: dict[int, tuple[Any, Any]] = {}  # by rows: counts and prompts where nobody is penalised

    def changed(self) -> None:
        """What decodes is other than it was, or has other tokens than what a call left."""
        self._decoding = None

    def advanced(self, rows: Any) -> None:
        """A call of decoding has left these rows."""
        assert self._decoding is not None
        features, sampler = self._decoding
        self._decoding = features, sampler._replace(rows=rows)

    def decoding(self, slots: Mapping[int, Slot]) -> tuple[Features, Sampler]:
        """Of every slot. Made anew after `changed`: the host knows all that was generated."""
        running = [slot if (slot := slots.get(number)) and slot.generated else None for number in range(self._slots)]
        if self._decoding is None:
            wanted = features_of(slot.request for slot in running if slot)
            kind = next(kind for kind in self.kinds if _does(kind, wanted))
            self._decoding = kind, self._made(running, kind)
        features, sampler = self._decoding
        return features, sampler._replace(mask_bw=self._masks(running)) if features.masks else sampler

    def idle(self, features: Features) -> Sampler:
        """Of a call of decoding in which no slot runs."""
        none: list[Slot | None] = [None] * self._slots
        sampler = self._made(none, features)
        return sampler._replace(mask_bw=self._masks(none)) if features.masks else sampler

    def reading(self, rows: Sequence[Slot | None]) -> Sampler:
        """Of rows whose prompts are read, None: of none."""
        sampler = self._made(rows, self.everything)
        return sampler._replace(mask_bw=self._masks(rows)) if self.everything.masks else sampler

    def _made(self, rows: Sequence[Slot | None], features: Features) -> Sampler:
        requests = [slot and slot.request for slot in rows]
        generated = [slot.generated if slot else () for slot in rows]
        markers = self._programs.markers if features.budgets else None
        penalised = features_of(request for request in requests if request).penalties
        made = rows_of(
            requests, features if penalised else features.without_penalties, vocab_size=self._size, markers=markers,
            generated=generated,
        )  # fmt: skip
        knobs, made = self._programs.put((knobs_of(requests, features), made))
        if features.penalties and not penalised:
            counts_bv, prompt_bv = self._unpenalised(len(rows))
            made = made._replace(counts_bv=counts_bv, prompt_bv=prompt_bv)
        return Sampler(knobs, made, None)

    def _unpenalised(self, rows: int) -> tuple[Any, Any]:
        """Counts and prompts of rows that pay no attention to them, kept: they are as large as the logits."""
        if rows not in self._blank:
            shape = rows, self._size
            self._blank[rows] = self._programs.put((np.zeros(shape, np.int32), np.zeros(shape, bool)))
        return self._blank[rows]

    def _masks(self, rows: Sequence[Slot | None]) -> np.ndarray:
        mask_bw = np.full((len(rows), words_of_mask(self._size)), 2**32 - 1, np.uint32)
        for row, slot in enumerate(rows):
            if slot is not None and slot.matcher is not None:
                slot.matcher.mask_into(mask_bw[row])
        return mask_bw


def _everything(programs: Programs) -> Features:
    """All that a request can ask of the model: text only where there is a tokenizer."""
    try:
        budgets = bool(programs.markers)
    except ConfigError:  # a request for a budget is refused with this message
        budgets = False
    masks = programs.opened.tokenizer is not None and importlib.util.find_spec("llguidance") is not None
    return Features(
        draws=True,
        restricts=True,
        penalties=True,
        biases=True,
        masks=masks,
        holds=True,
        budgets=budgets,
        logprobs=MOST_LOGPROBS,
    )


def _does(kind: Features, wanted: Features) -> bool:
    """Whether programs of this kind do all that is wanted."""
    none = lambda value: -1 if value is None else int(value)  # noqa: E731
    return all(none(a) >= none(b) for a, b in zip(kind.values, wanted.values, strict=True))
