"""What an engine's memory has room for, and the pools and prefix caches made of it."""

import dataclasses
from typing import NamedTuple

from orogen.config.checks import check_types, require
from orogen.infer.pages import Pages, Pool
from orogen.infer.prefix import Prefix


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the engine's memory has room for. Pages and snapshots are counted per data rank.

    slots: requests that run at a time, over all ranks; slot s belongs to rank s // (slots / ranks). page: tokens.
    pages: 0 for a model without attention over all tokens. reach: pages that a request has at most, the width of a page
    table; None: all there are. recurrent: whether a slot has more than pages: SSM states,
    convolution windows, rings of window attention. snapshots: rows of the pool for those; without any a recurrent model
    has no prefix cache. chunk: pieces of prompts end at its multiples, and snapshots are taken there. prefill_tokens:
    of prompts that a rank reads in a round. queue: requests that wait at most. drafts: places beyond its last token
    that a request may write. lookahead: see `Prefix`. snapshot_every: tokens of a prompt between snapshots; 0: none but
    where prompts part. snapshot_last: whether one is taken at a prompt's last border, at the price of one more piece,
    since a piece ends there. reuse: whether there is a prefix cache. whole: whether what it gives ends at a multiple of
    `chunk`, also where pages alone are needed.
    """

    slots: int
    ranks: int = 1
    page: int
    pages: int
    reach: int | None = None
    recurrent: bool
    snapshots: int
    chunk: int
    prefill_tokens: int
    queue: int
    drafts: int = 0
    lookahead: int = 0
    snapshot_every: int = 0
    snapshot_last: bool = True
    reuse: bool = True
    whole: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("slots", "ranks", "page", "chunk", "prefill_tokens", "queue"):
            require(getattr(self, field) >= 1, self, field, "1 or more")
        for field in ("pages", "snapshots", "drafts", "lookahead", "snapshot_every"):
            require(getattr(self, field) >= 0, self, field, "0 or more")
        require(self.slots % self.ranks == 0, self, "slots", f"a multiple of ranks={self.ranks}")
        require(self.chunk % self.page == 0, self, "chunk", f"a multiple of page={self.page}")
        require(self.prefill_tokens >= self.chunk, self, "prefill_tokens", f"at least chunk={self.chunk}")
        require(self.snapshot_every % self.chunk == 0, self, "snapshot_every", f"a multiple of chunk={self.chunk}")
        require(self.reach is None or 1 <= self.reach <= self.pages, self, "reach", f"1 to pages={self.pages}")
        require(self.recurrent or not self.snapshots, self, "snapshots", "0, since recurrent=False")


class Rank(NamedTuple):
    """The memory of one data rank: its slots, and its pools, of which a model may lack either, and the prefix cache."""

    slots: range
    pages: Pages | None
    snapshots: Pool | None
    prefix: Prefix | None


def make_ranks(capacity: Capacity) -> tuple[Rank, ...]:
    """The ranks, with nothing in them."""
    each = capacity.slots // capacity.ranks
    return tuple(_rank(capacity, range(r * each, (r + 1) * each)) for r in range(capacity.ranks))


def _rank(capacity: Capacity, slots: range) -> Rank:
    pages = Pages(capacity.pages, page=capacity.page) if capacity.pages else None
    snapshots = Pool(capacity.snapshots, what="snapshot") if capacity.snapshots else None
    usable = snapshots is not None if capacity.recurrent else pages is not None
    if not capacity.reuse or not usable:
        return Rank(slots, pages, snapshots, None)
    hits = capacity.chunk if capacity.whole else None
    prefix = Prefix(pages, snapshots, border=capacity.chunk, lookahead=capacity.lookahead, hits=hits)
    return Rank(slots, pages, snapshots, prefix)
