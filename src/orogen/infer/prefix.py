"""The prefix cache: what was computed for the beginnings of earlier prompts, for models of every kind of layer.

A tree has one node per block of tokens. A node owns the page that holds its block's keys and values in every attention
layer (full attention; MLA); some nodes own a row of the snapshot pool besides: the SSM states, convolution windows and
rings of window attention after the node's last token. Layers of the second kind cannot go on from a node without
a snapshot, so a hit ends at the deepest node that has one. A model with full attention alone needs none, and a hit may
end at any node; a recurrent model has no pages, and its nodes own snapshots alone.

Pages and snapshots are evicted apart, each least recently used first, and never while locked (two orders and two
counters, as in SGLang's cache of hybrid models). A node that lost its snapshot stays for the sake of those below it;
with none below it can serve nobody and goes, and so do the nodes above it that now end in nothing.

A request locks the path to its node as long as it runs. Nodes on a locked path stay out of the order of eviction. All
below a node of the order is in it too, so everything in it can be evicted: how much room can be made is known at once.
Nodes enter the order from the bottom of a path upwards; the oldest in it therefore has no children.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from orogen.infer.pages import Pages, Pool


class _Node:
    __slots__ = ("children", "depth", "key", "locks", "page", "parent", "readers", "row")

    def __init__(self, parent: "_Node | None", key: Hashable, page: int | None):
        self.parent, self.key, self.page = parent, key, page
        self.depth: int = 0 if parent is None else parent.depth + 1  # in blocks
        self.children: dict[Hashable, _Node] = {}
        self.row: int | None = None
        self.locks = self.readers = 0  # of the path to here; of the row


class Hit(NamedTuple):
    """The longest beginning of a prompt that is cached, possibly of no token.

    length: in tokens. pages: those of its blocks, in order; none without attention. row: the snapshot after its last
    token; None if the model needs none or nothing was found. shared: how many tokens the tree knows, at least `length`:
    beyond it snapshots are missing.
    """

    length: int
    pages: tuple[int, ...]
    row: int | None
    shared: int
    node: _Node
    salt: str


class Lock:
    """A request's claim on the path to a node, and at first on the node's snapshot. length: of the path, in tokens."""

    def __init__(self, node: _Node, salt: str, block: int):
        self._node: _Node | None = node
        self._reads: _Node | None = None
        self._salt, self._block = salt, block

    @property
    def node(self) -> _Node:
        """The end of the path. Raises ValueError after `Prefix.unlock`."""
        if self._node is None:
            raise ValueError("a lock was used after it was unlocked")
        return self._node

    @property
    def length(self) -> int:
        """How many tokens the path has."""
        return self.node.depth * self._block


class Prefix:
    """The tree of one data rank. It holds each of its pages and rows once in their pools.

    pages: None if no layer keeps keys and values in pages. snapshots: None if no layer needs one. border: snapshots are
    taken at multiples of so many tokens, itself a multiple of the page. hits: what is found ends at a multiple of so
    many tokens, itself one of the block; None: of a block. lookahead: how many tokens behind a block its
    page depends on: MTP depth k reads token t + k at place t. A block's key includes them, so that a page is shared
    only where they agree. Keys are the tokens themselves: equal hashes of different tokens mix nothing up.
    """

    def __init__(
        self, pages: Pages | None, snapshots: Pool | None, *, border: int, lookahead: int = 0, hits: int | None = None
    ):
        if pages is None and snapshots is None:
            raise ValueError("a prefix cache of neither pages nor snapshots; expected at least one of them")
        self.block = border if pages is None else pages.page
        if border < 1 or border % self.block:
            raise ValueError(f"snapshots every {border} tokens; expected a multiple of the page's {self.block}")
        if lookahead < 0:
            raise ValueError(f"lookahead={lookahead}; expected 0 or more")
        self._hits = self.block if hits is None else hits
        if self._hits < 1 or self._hits % self.block:
            raise ValueError(f"hits at multiples of {hits} tokens; expected a multiple of the block's {self.block}")
        self._pages, self._snapshots, self._border, self._lookahead = pages, snapshots, border, lookahead
        self._root = _Node(None, None, None)
        # What may be evicted, the least recently used first: nodes on no locked path, and nodes with an unread row.
        self._idle: OrderedDict[_Node, None] = OrderedDict()
        self._idle_rows: OrderedDict[_Node, None] = OrderedDict()

    @property
    def evictable_pages(self) -> int:
        """How many pages `evict` could free."""
        return 0 if self._pages is None else len(self._idle)

    @property
    def evictable_snapshots(self) -> int:
        """How many snapshot rows `evict` could free."""
        return len(self._idle_rows)

    def match(self, tokens: Sequence[int], *, salt: str = "") -> Hit:
        """The longest cached beginning that is shorter than `tokens`: at least one token is left, to compute logits
        from. Only requests of one `salt` share anything. Nothing is locked, and no order changes.
        """
        node = best = self._root
        for key in self._keys(tokens, self._root, salt):
            child = node.children.get(key)
            if child is None:
                break
            node, length = child, child.depth * self.block
            found = self._snapshots is None or node.row is not None
            if found and length < len(tokens) and length % self._hits == 0:
                best = node
        pages = tuple(n.page for n in _path(best) if n.page is not None)[::-1]
        return Hit(best.depth * self.block, pages, best.row, node.depth * self.block, best, salt)

    def lock(self, hit: Hit) -> Lock:
        """Keeps the hit's path, and its row until `copied`. The hit must be of the tree as it is now."""
        for node in _path(hit.node):
            self._lock(node)
        lock = Lock(hit.node, hit.salt, self.block)
        if hit.row is not None:
            hit.node.readers += 1
            self._idle_rows.pop(hit.node, None)
            lock._reads = hit.node
        return lock

    def copied(self, lock: Lock) -> None:
        """Lets go of the lock's row, which its request has read. Its path stays locked."""
        if lock._reads is None:
            return
        lock._reads.readers -= 1
        if not lock._reads.readers:
            self._idle_rows[lock._reads] = None
        lock._reads = None

    def unlock(self, lock: Lock) -> None:
        """Lets go of everything the lock keeps. Raises ValueError the second time."""
        end = lock.node
        self.copied(lock)
        for node in list(_path(end)):
            node.locks -= 1
            if node.locks or node is self._root:
                continue
            self._idle[node] = None
            self._prune(node)
        lock._node = None

    def longest(self, known: int, computed: int) -> int:
        """How many tokens of a sequence may be inserted, of which `known` are known, those to come of its prompt
        included, and `computed` have been computed for good: drafts that wait for their verification are not."""
        return max(0, min(computed, known - self._lookahead)) // self.block * self.block

    def saved(self, lock: Lock, tokens: Sequence[int], length: int) -> bool:
        """Whether the tree has a snapshot after `length` tokens already, behind the lock's path."""
        node = lock.node
        for key in self._keys(tokens, node, lock._salt):
            child = node.children.get(key)
            if child is None or node.depth * self.block >= length:
                break
            node = child
        return node.depth * self.block == length and node.row is not None

    def take_row(self) -> int | None:
        """A row to write a snapshot to, the least recently used one's if none is free; None if all are being read or
        written. The caller owns it until it gives it to `insert`, or drops it in the pool. A row that is read is never
        one that is written."""
        if self._snapshots is None or not self.evict(snapshots=1):
            return None
        (row,) = self._snapshots.take(1) or (None,)
        return row

    def insert(self, lock: Lock, tokens: Sequence[int], length: int, *, pages: Sequence[int], row: int | None) -> None:
        """Adds what a request has computed for its first `length` tokens, and moves its lock to their end.

        tokens: from the first, with those behind `length` that the model looks ahead to. pages: the request's, from
        the first; the tree holds those of blocks that it did not have. row: the snapshot after `length` tokens, owned
        by the tree from now on, and free again if it has one of these tokens already. Raises ValueError if `length` is
        none that `longest` gives, ends before the lock, or has no row although the model needs one.
        """
        self._check(lock, tokens, length, row)
        if self._pages is not None and len(pages) * self.block < length:
            raise ValueError(f"{len(pages)} pages of {self.block} tokens for {length}; expected enough")
        for key in self._keys(tokens, lock.node, lock._salt):
            node = lock.node
            if node.depth * self.block >= length:
                break
            child = node.children.get(key)
            if child is None:
                child = _Node(node, key, None if self._pages is None else pages[node.depth])
                node.children[key] = child
                if self._pages is not None:
                    self._pages.hold([pages[node.depth]])
            self._lock(child)
            lock._node = child
        if row is not None:
            self._give(lock.node, row)

    def evict(self, *, pages: int = 0, snapshots: int = 0) -> bool:
        """Whether so many pages and snapshot rows are free, once what was used least recently has gone.

        Nothing is evicted where that would not be enough, nor what is locked.
        """
        free_pages = 0 if self._pages is None else self._pages.free
        free_rows = 0 if self._snapshots is None else self._snapshots.free
        if free_pages + self.evictable_pages < pages or free_rows + self.evictable_snapshots < snapshots:
            return False
        while self._pages is not None and self._pages.free < pages:
            node = next(iter(self._idle))
            self._remove(node)
            self._prune(node.parent)
        while self._snapshots is not None and self._snapshots.free < snapshots:
            node = next(iter(self._idle_rows))
            self._forget_row(node)
            self._prune(node)
        return True

    def clear(self) -> None:
        """Evicts everything, as when the weights change. Raises ValueError while a request has a lock."""
        if self._root.locks:
            raise ValueError(f"clears a prefix cache that {self._root.locks} requests use; expected none")
        for node in list(self._idle):
            self._remove(node)

    def _check(self, lock: Lock, tokens: Sequence[int], length: int, row: int | None) -> None:
        if length != self.longest(len(tokens), length) or length < lock.length:
            raise ValueError(
                f"inserts {length} of {len(tokens)} tokens behind {lock.length}; expected a multiple of {self.block} "
                f"with {self._lookahead} tokens behind it"
            )
        if (row is None) != (self._snapshots is None) or row is not None and length % self._border:
            need = "no row" if self._snapshots is None else f"a row, at a multiple of {self._border} tokens"
            raise ValueError(f"inserts {length} tokens with row {row}; expected {need}")

    def _keys(self, tokens: Sequence[int], behind: _Node, salt: str) -> Iterator[Hashable]:
        """Of the blocks behind a node, as far as their tokens and those they look ahead to are there."""
        reach = self.block + self._lookahead
        for start in range(behind.depth * self.block, len(tokens) - reach + 1, self.block):
            key = tuple(tokens[start : start + reach])
            yield key if start else (salt, key)

    def _lock(self, node: _Node) -> None:
        node.locks += 1
        self._idle.pop(node, None)

    def _give(self, node: _Node, row: int) -> None:
        """Makes `row` the snapshot of a node, unless it has one."""
        assert self._snapshots is not None
        if node.row is not None or node is self._root:
            self._snapshots.drop([row])
        else:
            node.row = row
        if node.row is not None and not node.readers:
            self._idle_rows[node] = None
            self._idle_rows.move_to_end(node)

    def _forget_row(self, node: _Node) -> None:
        assert self._snapshots is not None and node.row is not None
        del self._idle_rows[node]
        self._snapshots.drop([node.row])
        node.row = None

    def _remove(self, node: _Node) -> None:
        """Takes an unlocked node without children, or whose children go too, out of the tree."""
        assert node.parent is not None
        del node.parent.children[node.key], self._idle[node]
        if node.page is not None and self._pages is not None:
            self._pages.drop([node.page])
        if node.row is not None:
            self._forget_row(node)

    def _prune(self, node: _Node | None) -> None:
        """Removes a node that can serve nobody, and those above it that then can serve nobody."""
        while node in self._idle and not node.children and node.row is None and self._snapshots is not None:
            self._remove(node)
            node = node.parent


def _path(node: _Node) -> Iterator[_Node]:
    """The nodes from this one up to the root's children, then the root."""
    while True:
        yield node
        if node.parent is None:
            return
        node = node.parent
