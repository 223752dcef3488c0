"""Who holds which page: reference counts on the host of memory that the device has in one piece.

A page is a run of consecutive tokens in every attention layer's cache. Several slots and the prefix cache may hold one
page; it is free when nobody does. Only full pages are shared and a full page is never written again, so that nothing
has to be copied on write. Each data rank has an allocator of its own: ids count from 0 in each.
"""

from collections import Counter
from collections.abc import Iterable


class Pool:
    """`count` things with ids 0 … count - 1, each free or held a number of times. what: their name in messages."""

    def __init__(self, count: int, *, what: str = "row"):
        if count < 0:
            raise ValueError(f"{count} {what}s; expected 0 or more")
        self.count, self._what = count, what
        self._holders = [0] * count
        self._free = list(range(count))[::-1]  # a stack: the one freed last is taken next

    @property
    def free(self) -> int:
        """How many nobody holds."""
        return len(self._free)

    def holders(self, one: int) -> int:
        """How many times `one` is held."""
        self._require_held_or_free(one)
        return self._holders[one]

    def take(self, count: int) -> tuple[int, ...] | None:
        """`count` free ones, now held once each; None, and nothing is taken, if fewer are free."""
        if count < 0:
            raise ValueError(f"takes {count} {self._what}s; expected 0 or more")
        if count > len(self._free):
            return None
        taken = tuple(self._free.pop() for _ in range(count))
        for one in taken:
            self._holders[one] = 1
        return taken

    def hold(self, ids: Iterable[int]) -> None:
        """Holds each once more. Raises ValueError, and holds none, if one of them is free: it may be anybody's next."""
        ids = tuple(ids)
        for one in ids:
            self._require_held_or_free(one)
            if not self._holders[one]:
                raise ValueError(f"holds {self._what} {one}, which is free; expected one that somebody holds")
        for one in ids:
            self._holders[one] += 1

    def drop(self, ids: Iterable[int]) -> None:
        """Holds each once less. Raises ValueError, and drops none, if that is more often than one of them is held."""
        times = Counter(ids)
        for one, count in times.items():
            self._require_held_or_free(one)
            if count > self._holders[one]:
                held = self._holders[one]
                raise ValueError(f"drops {self._what} {one} {count} times, held {held} times; expected at most as many")
        for one, count in times.items():
            self._holders[one] -= count
            if not self._holders[one]:
                self._free.append(one)

    def _require_held_or_free(self, one: int) -> None:
        if not 0 <= one < self.count:  # a negative one would count from the end
            raise ValueError(f"{self._what} {one}; expected one from 0 to {self.count - 1}")


class Pages(Pool):
    """A pool of `count` pages of `page` tokens."""

    def __init__(self, count: int, *, page: int):
        super().__init__(count, what="page")
        if page < 1:
            raise ValueError(f"pages of {page} tokens; expected at least 1")
        self.page = page
