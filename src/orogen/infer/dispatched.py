"""A call to the devices whose outputs the host has not told yet."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from orogen.infer.programs import Emitted
from orogen.infer.slot import Slot


class Dispatched(NamedTuple):
    """A call whose outputs are not told yet: the row of each request, most steps (0 for one that read), and the version
    of the weights."""

    placed: list[tuple[int, Slot]]
    emitted: Future[Emitted]
    steps: int
    version: int


def logprobs_wanted(placed: Sequence[tuple[int, Slot]]) -> bool:
    """Whether any of these requests wants them."""
    return any(slot.request.logprobs is not None for _, slot in placed)
