"""What an engine counts."""

import dataclasses

import numpy as np

from orogen.infer.forward import NONE


@dataclasses.dataclass
class Stats:
    """Totals since the engine was made. steps: of decoding, over all slots. called_steps: those that calls were
    dispatched for, once for all slots. drafted: drafts of each depth that could have been kept; accepted: those that
    were. host_seconds: of rounds, without what waits for devices."""

    requests: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    called_steps: int = 0
    drafted: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)
    host_seconds: float = 0.0
    device_seconds: float = 0.0

    def count(self, tokens_bsn: np.ndarray, offered_bn: np.ndarray | None) -> None:
        """Steps of slots, the drafts that were there, None without a drafter, and those that were kept."""
        steps, *accepted = (tokens_bsn != NONE).sum((0, 1)).tolist()
        add = lambda old, new: [a + b for a, b in zip(old, new, strict=True)]  # noqa: E731
        self.steps += steps
        if offered_bn is not None:
            self.drafted = add(self.drafted, offered_bn.sum(0).tolist())
        self.accepted = add(self.accepted, accepted)
