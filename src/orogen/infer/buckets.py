"""The shapes of an engine's programs: so few that all of them can be compiled before the first request.

Pieces of prompts are padded to one of a few lengths, calls to one of a few numbers of rows, and page tables to one of a
few widths, each about FACTOR times the next smaller one; on a GPU half of the most tokens is a length too. Where
padding would more than double a call, it is split instead. A piece is split where that is cheaper: a call costs what
its padded tokens cost, and as much as CALL_TOKENS more.
"""

import bisect
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from orogen.config.engine import EngineConfig
from orogen.infer.schedule import Piece
from orogen.infer.sizes import Sizes

FACTOR = 4
SMALLEST_PIECE, SMALLEST_PIECE_GPU, SMALLEST_TABLE = 32, 128, 256  # tokens
CALL_TOKENS, CALL_TOKENS_GPU = 32, 256  # tokens that could be read in the time that a call takes besides its tokens


class Call(NamedTuple):
    """Pieces that one call reads, padded to `length` tokens, in `rows` rows of each data rank."""

    pieces: tuple[Piece, ...]
    length: int
    rows: int


class Parts(NamedTuple):
    """How a piece is dealt over the ranks of `context`: in so many parts, of at least so many tokens each."""

    count: int
    tokens: int


class Buckets:
    """The shapes of one engine. lengths, rows (of a length) and reaches, pages of a row, ascend.

    reaches: of what reads prompts; decode_reaches: of what decodes.
    """

    def __init__(
        self,
        config: EngineConfig,
        sizes: Sizes,
        *,
        tensor: int,
        tables_cost_nothing: bool,
        parts: Parts = Parts(1, 1),  # noqa: B008
    ) -> None:
        """tensor: ranks that share the tokens and the rows of a call. tables_cost_nothing: decoding reads no more of a
        wide page table than of a narrow one."""
        self._sizes, self._tensor, self._exact = sizes, tensor, config.exact
        on_gpu = config.kernels == "triton" and not config.exact
        self._call_tokens = CALL_TOKENS_GPU if on_gpu else CALL_TOKENS
        self._tokens = config.prefill_tokens
        self._most, self._page = min(config.prefill_tokens, sizes.length), config.page
        # What is read row by row takes any number of tokens, and no time for rows without any.
        smallest = self._most if config.exact else SMALLEST_PIECE_GPU if on_gpu else SMALLEST_PIECE
        # Fractions of what a call may read, not of a text: more of them are multiples of what layers compute at once.
        fractions = {*_fractions(self._most if config.exact else config.prefill_tokens, smallest)}
        if on_gpu and (half := -(-config.prefill_tokens // 2)) >= 2 * CALL_TOKENS_GPU:
            fractions.add(half)
        fractions = sorted({min(n, self._most) for n in fractions})
        padded = (max(n, parts.count * parts.tokens) for n in fractions)
        self.lengths = tuple(dict.fromkeys(_multiple(n, parts.count * tensor) for n in padded))
        narrow = -(-SMALLEST_TABLE // config.page)
        self.reaches = _fractions(sizes.reach, sizes.reach if config.exact else narrow)
        self.decode_reaches = self.reaches[-1:] if tables_cost_nothing else self.reaches

    def rows(self, length: int) -> tuple[int, ...]:
        """How many rows of each data rank a call of this length may have."""
        most = min(self._sizes.slots, max(1, self._tokens // length))
        if self._exact:
            return (self._sizes.slots,)
        powers = [FACTOR**n for n in range(most.bit_length()) if FACTOR**n <= most]
        return tuple(dict.fromkeys(_multiple(n, self._tensor) for n in powers))

    def reads(self) -> Iterator[tuple[int, int, int]]:
        """Rows, length and reach of every call that reads prompts."""
        for place, length in enumerate(self.lengths):
            shortest = self._shortest(place)
            for reach in self.reaches:
                if reach * self._page >= min(shortest, self._sizes.reach * self._page):
                    yield from ((rows, length, reach) for rows in self.rows(length))

    def reach(self, tokens: int, reaches: Sequence[int]) -> int:
        """The least of the reaches that has room for so many tokens; the last one if none has."""
        return next((r for r in reaches if r * self._page >= tokens), reaches[-1])

    def calls(self, pieces: Sequence[Piece]) -> Iterator[Call]:
        """The calls that read these pieces, each piece in order."""
        parts = [list(self._parts(piece)) for piece in pieces]
        for turn in range(max(map(len, parts), default=0)):
            now = [each[turn] for each in parts if turn < len(each)]
            for length in sorted({length for _, length in now}):
                yield from self._together([piece for piece, padded in now if padded == length], length)

    def _together(self, pieces: Sequence[Piece], length: int) -> Iterator[Call]:
        """Calls of pieces of one length: as many rows as are at least half used."""
        ranks: list[list[Piece]] = [[] for _ in range(self._sizes.ranks)]
        for piece in pieces:
            ranks[piece.slot // self._sizes.slots].append(piece)
        while any(ranks):
            count, buckets = max(map(len, ranks)), self.rows(length)
            fitting = [rows for rows in buckets if rows < 2 * count]
            rows = next((r for r in fitting if r >= count), (fitting or buckets)[-1 if fitting else 0])
            yield Call(tuple(piece for rank in ranks for piece in rank[:rows]), length, rows)
            ranks = [rank[rows:] for rank in ranks]

    def _parts(self, piece: Piece) -> Iterator[tuple[Piece, int]]:
        """Parts of a piece with the lengths that they are padded to, as cheap as can be."""
        start, left = piece.start, piece.count
        while left:
            length = self._cheapest(left)[1]
            count = min(left, length)
            complete = count == left
            yield (
                piece._replace(
                    start=start, count=count, last=piece.last and complete, row=piece.row if complete else None
                ),
                length,
            )
            start, left = start + count, left - count

    @functools.lru_cache(None)  # noqa: B019 - an engine has one of these
    def _cheapest(self, tokens: int) -> tuple[int, int]:
        """What it costs to read so many tokens, in tokens, and the length of the first call: the least that holds them
        all, or the next shorter one."""
        if not tokens:
            return 0, 0
        place = min(bisect.bisect_left(self.lengths, tokens), len(self.lengths) - 1)
        costs = (
            (length + self._call_tokens + self._cheapest(max(0, tokens - length))[0], -length)
            for length in self.lengths[max(0, place - 1) : place + 1]
        )
        cost, length = min(costs)
        return cost, -length

    def _shortest(self, place: int) -> int:
        """The fewest tokens that are padded to the length at this place: the more there are, the dearer is to split
        them."""
        length, below = self.lengths[place], self.lengths[place - 1] if place else 0
        whole = lambda tokens: self._cheapest(tokens)[1] == length  # noqa: E731
        return below + 1 + bisect.bisect_left(range(below + 1, length), True, key=whole)


def _fractions(most: int, least: int) -> tuple[int, ...]:
    """`most` and its FACTOR-th parts, rounded up, down to `least` at the lowest."""
    found = [most]
    while found[0] > 1 and -(-found[0] // FACTOR) >= least:
        found.insert(0, -(-found[0] // FACTOR))
    return tuple(found)


def _multiple(count: int, of: int) -> int:
    """The next multiple."""
    return -(-count // of) * of
