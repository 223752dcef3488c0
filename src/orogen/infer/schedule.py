"""What an engine does next: which requests enter which slots, which pieces of prompts are read, which slots decode.

Decisions over plain values, without arrays; the engine carries them out and reports what it has done:

    number = scheduler.submit(request)
    while scheduler.busy:
        plan = scheduler.round()
        for a in plan.admitted: …      # a.pages is the slot's page table; copy snapshot a.row to the slot, or clear it
        for p in plan.pieces: …        # read prompt[p.start : p.start + p.count], then copy the slot to snapshot p.row
            scheduler.prefilled(p.slot, p.count)
        for slot in plan.decoding: …   # generate some tokens
            scheduler.finished(slot)   # when one ends

Admission reserves every page that a request may need, for its prompt, all of `max_tokens` and drafts beyond them. So
nothing that runs ever lacks a page, and nothing is preempted: to preempt a hybrid model's request means to copy its
states out, tens of megabytes each, or to compute its whole prompt once more. The price is that pages of tokens that are
never generated lie idle. What the prefix cache holds is evicted for an admission, least recently used first.

The queue is strict: lower `priority` first, then who came first. A request for which there is no room waits at the
front, and none passes it; therefore it starts once enough of those running have ended, however large it is. Requests of
a higher rank that keep coming do starve others: that is what priorities are for.

Each round reads at most `prefill_tokens` of prompts and lets every slot decode that can, so that neither kind of work
waits for more than one round of the other.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from orogen.config.checks import ConfigError
from orogen.infer.capacity import Capacity, Rank, make_ranks
from orogen.infer.prefix import Hit, Lock, Prefix
from orogen.infer.request import Full, Request


class Admission(NamedTuple):
    """A request enters a slot.

    length: tokens of its prompt that are cached. pages: its page table, those of the cached tokens first; they stay its
    own until it ends. row: the snapshot to copy into the slot before its first piece; None: the slot is cleared.
    """

    slot: int
    number: int
    length: int
    pages: tuple[int, ...]
    row: int | None


class Piece(NamedTuple):
    """Part of a prompt to read. last: a token is chosen from the logits at its end. row: where to copy, behind it, what
    the slot keeps beside pages; None: nowhere. A slot has one piece in a round at most."""

    slot: int
    start: int
    count: int
    last: bool
    row: int | None


class Round(NamedTuple):
    """What to do, in this order. decoding: slots that had read their prompts when the round began."""

    admitted: tuple[Admission, ...]
    pieces: tuple[Piece, ...]
    decoding: tuple[int, ...]


@dataclasses.dataclass
class _Job:
    """A request that waits or runs. done: tokens of the prompt that need not be read any more. marks: borders at which
    snapshots are still to be taken. piece: what the engine has been told and has not reported."""

    number: int
    request: Request
    salt: str
    slot: int = -1
    pages: tuple[int, ...] = ()
    lock: Lock | None = None
    done: int = 0
    marks: list[int] = dataclasses.field(default_factory=list)
    piece: Piece | None = None

    @property
    def order(self) -> tuple[int, int]:
        return self.request.priority, self.number

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.prompt


class Scheduler:
    """The queue, the slots and the memory of one engine. ranks: for what wants to count. Not thread-safe."""

    def __init__(self, capacity: Capacity):
        self._capacity = capacity
        self.ranks = make_ranks(capacity)
        self._next_number = 0
        self._queue: list[tuple[int, int]] = []  # of those that wait, sorted: priority, number
        self._waiting: dict[int, _Job] = {}
        self._running: dict[int, _Job] = {}  # by slot
        self._stuck: int | None = None  # the first of the queue, if it had no room and nothing has changed since

    @property
    def queued(self) -> int:
        """How many requests wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> dict[int, int]:
        """The request's number in each occupied slot."""
        return {slot: job.number for slot, job in self._running.items()}

    @property
    def occupied(self) -> int:
        """How many requests have a slot. Any thread may ask, unlike for `running`."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._waiting or self._running)

    def submit(self, request: Request, *, salt: str = "") -> int:
        """Queues a request. Returns its number. Requests of different salts share no cached prefix.

        Raises ConfigError if it could never be admitted, Full if the queue is full.
        """
        c, need = self._capacity, self._pages_needed(request)
        if need > (most := c.reach or c.pages):
            raise ConfigError(
                f"a prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens} need {need} pages of "
                f"{c.page} tokens; expected at most {most}, for {most * c.page - c.drafts} tokens in all"
            )
        if len(self._waiting) >= self._capacity.queue:
            raise Full(f"{len(self._waiting)} requests wait; expected fewer than {self._capacity.queue}")
        job = _Job(self._next_number, request, salt)
        self._next_number += 1
        self._waiting[job.number] = job
        bisect.insort(self._queue, job.order)
        return job.number

    def cancel(self, number: int) -> int | None:
        """Ends a request that waits or runs. Returns the slot that it had; None if it still waited.

        Raises KeyError for any other number, such as one that has ended.
        """
        if number in self._waiting:
            self._queue.remove(self._waiting.pop(number).order)
            return None
        if slots := [slot for slot, job in self._running.items() if job.number == number]:
            self.finished(slots[0])
            return slots[0]
        raise KeyError(f"request {number} neither waits nor runs")

    def round(self) -> Round:
        """Admits what fits, and plans the round. Raises ValueError if a piece of the last one was not reported."""
        for job in self._running.values():
            if job.piece is not None:
                raise ValueError(f"slot {job.slot} has not reported {job.piece}; expected prefilled() or finished()")
        decoding = tuple(sorted(slot for slot, job in self._running.items() if job.done == len(job.prompt)))
        admitted = tuple(self._admissions())
        pieces = tuple(piece for rank in self.ranks for piece in self._pieces(rank))
        return Round(admitted, pieces, decoding)

    def prefilled(self, slot: int, count: int) -> None:
        """The engine has dispatched a piece, the copies before and behind it included. Others may find it from now on.

        Raises ValueError if no piece of `count` tokens was planned for the slot.
        """
        job = self._job(slot)
        if job.piece is None or job.piece.count != count:
            raise ValueError(f"slot {slot} reports a piece of {count} tokens; expected {job.piece}")
        row, job.piece = job.piece.row, None
        job.done += count
        prefix = self._rank(slot).prefix
        if prefix is None or job.lock is None:
            return
        prefix.copied(job.lock)
        if row is not None or not self._capacity.recurrent:
            length = prefix.longest(len(job.prompt), job.done)
            prefix.insert(job.lock, job.prompt, max(length, job.lock.length), pages=job.pages, row=row)
            self._stuck = None  # pages that the first of the queue shares with this request need not be found again

    def finished(self, slot: int, *, committed: Sequence[int] = (), border: int | None = None) -> int | None:
        """Ends the request in a slot, whatever it was doing, and returns all it held; the slot is free.

        committed: tokens it generated that the model has read for good, so neither the last one chosen nor drafts; what
        is not given is not cached. What looks ahead to them must have been written anew where drafts were wrong.
        border: a multiple of `chunk`, at most the prompt and these, after which the engine still has the state. Returns
        the row to which it must copy that state at once, None if it need not.

        Raises ValueError for another border, and for generated tokens of a prompt that has not been read.
        """
        job, rank = self._job(slot), self._rank(slot)
        if committed and job.done < len(job.prompt):
            raise ValueError(
                f"slot {slot} ends with {len(committed)} generated tokens after {job.done} of {len(job.prompt)} of its "
                "prompt; expected none"
            )
        if border is not None and (border % self._capacity.chunk or border > len(job.prompt) + len(committed)):
            raise ValueError(
                f"slot {slot} has the state after {border} of {len(job.prompt) + len(committed)} tokens; expected a "
                f"multiple of chunk={self._capacity.chunk}"
            )
        row = None
        if rank.prefix is not None and job.lock is not None:
            if job.piece is not None and job.piece.row is not None and rank.snapshots is not None:
                rank.snapshots.drop([job.piece.row])
            if committed:
                row = self._keep(rank.prefix, job, (*job.prompt, *committed), border)
            rank.prefix.unlock(job.lock)
        if rank.pages is not None:
            rank.pages.drop(job.pages)
        del self._running[slot]
        self._stuck = None
        return row

    def _keep(self, prefix: Prefix, job: _Job, tokens: tuple[int, ...], border: int | None) -> int | None:
        """Inserts what a request leaves behind. Returns the row of its snapshot."""
        assert job.lock is not None
        length = prefix.longest(len(tokens), len(tokens))
        row = None
        if self._capacity.recurrent:
            if border is None or not job.lock.length <= border <= length:
                return None
            length = border
            row = None if prefix.saved(job.lock, tokens, length) else prefix.take_row()
            if row is None:
                return None
        prefix.insert(job.lock, tokens, max(length, job.lock.length), pages=job.pages, row=row)
        return row

    def _job(self, slot: int) -> _Job:
        if slot not in self._running:
            raise ValueError(f"slot {slot} has no request; expected one of {sorted(self._running)}")
        return self._running[slot]

    def _rank(self, slot: int) -> Rank:
        return self.ranks[slot // len(self.ranks[0].slots)]

    def _jobs(self, rank: Rank) -> list[_Job]:
        return [self._running[slot] for slot in rank.slots if slot in self._running]

    def _pages_needed(self, request: Request) -> int:
        c = self._capacity
        return -(-(len(request.prompt) + request.max_tokens + c.drafts) // c.page) if c.pages else 0

    def _admissions(self) -> Iterator[Admission]:
        """The first of the queue, one by one, until one has no room."""
        while self._queue:
            number = self._queue[0][1]
            if number == self._stuck or (admission := self._admit(self._waiting[number])) is None:
                return
            del self._waiting[number], self._queue[0]
            yield admission

    def _admit(self, job: _Job) -> Admission | None:
        """Puts a request into a slot of the rank that will have read its prompt first, then has the most pages left."""
        known = job.request.cacheable
        free = {i: s for i, r in enumerate(self.ranks) if (s := [s for s in r.slots if s not in self._running])}
        hits = {i: p.match(known, salt=job.salt) if (p := self.ranks[i].prefix) else None for i in free}
        waits = False

        def rank_order(i: int) -> tuple[int, int, int]:
            hit, pages = hits[i], self.ranks[i].pages
            ahead = sum(len(other.prompt) - other.done for other in self._jobs(self.ranks[i]))
            return ahead - (hit.length if hit else 0), -(pages.free if pages else len(free[i])), i

        for i in sorted(free, key=rank_order):
            if self._computed_soon(self.ranks[i], job, hits[i]):
                waits = True
            elif self._reserve(self.ranks[i], job, hits[i]):
                job.slot = free[i][0]
                self._running[job.slot] = job
                length, row = (hit.length, hit.row) if (hit := hits[i]) else (0, None)
                return Admission(job.slot, job.number, length, job.pages, row)
        self._stuck = None if waits else job.number
        return None

    def _computed_soon(self, rank: Rank, job: _Job, hit: Hit | None) -> bool:
        """Whether a slot of the rank is about to compute more of the prompt than is cached: only the first of several
        samples need read it. The others wait at most until that slot has read its own, which comes before theirs."""
        if hit is None or rank.prefix is None or not job.request.cacheable:
            return False
        for other in self._jobs(rank):
            if other.salt != job.salt or other.done == len(other.prompt) or other.order > job.order:
                continue
            reach = rank.prefix.longest(min(len(other.prompt), len(job.prompt) - 1), len(other.prompt))
            marks = other.marks if self._capacity.recurrent else (hit.length + rank.prefix.block,)
            for mark in marks:
                known = mark + self._capacity.lookahead
                if hit.length < mark <= reach and job.prompt[:known] == other.prompt[:known]:
                    return True
        return False

    def _reserve(self, rank: Rank, job: _Job, hit: Hit | None) -> bool:
        """Takes all that the request will need of a rank; takes nothing if that is not there."""
        cached = hit.pages if hit else ()
        need = self._pages_needed(job.request) - len(cached)
        lock = rank.prefix.lock(hit) if rank.prefix is not None and hit is not None else None
        if rank.pages is not None:
            room = rank.prefix.evict(pages=need) if rank.prefix is not None else rank.pages.free >= need
            own = rank.pages.take(need) if room else None
            if own is None:
                if rank.prefix is not None and lock is not None:
                    rank.prefix.unlock(lock)
                return False
            rank.pages.hold(cached)
            job.pages = (*cached, *own)
        job.lock, job.done = lock, hit.length if hit else 0
        job.marks = self._marks(job.prompt, hit) if hit and self._capacity.recurrent else []
        return True

    def _marks(self, prompt: tuple[int, ...], hit: Hit) -> list[int]:
        """Where snapshots of a prompt are worth it: where it leaves what is known, since others may leave there too; at
        its last border, where a longer prompt or another sample goes on; and every so many tokens, as was chosen."""
        chunk, every = self._capacity.chunk, self._capacity.snapshot_every
        last = (len(prompt) - max(1, self._capacity.lookahead)) // chunk * chunk
        marks = {min(hit.shared, last) // chunk * chunk, *(range(every, last + 1, every) if every else ())}
        if self._capacity.snapshot_last:
            marks.add(last)
        return sorted(m for m in marks if m > hit.length)

    def _pieces(self, rank: Rank) -> Iterator[Piece]:
        left = self._capacity.prefill_tokens
        for job in sorted((j for j in self._jobs(rank) if j.done < len(j.prompt)), key=lambda j: j.order):
            job.piece = self._piece(rank, job, left)
            if job.piece is not None:
                left -= job.piece.count
                yield job.piece

    def _piece(self, rank: Rank, job: _Job, most: int) -> Piece | None:
        """The next piece of a prompt, of at most so many tokens. It ends where the prompt ends, or at a border: at the
        next at which a snapshot is wanted and there is a row for it, or at the last within reach."""
        chunk, end = self._capacity.chunk, min(len(job.prompt), job.done + most)
        if end < len(job.prompt):
            end = end // chunk * chunk
        row = None
        while row is None and job.marks and job.done < job.marks[0] <= end and rank.prefix and job.lock:
            mark = job.marks.pop(0)
            if not rank.prefix.saved(job.lock, job.prompt, mark):
                row = rank.prefix.take_row()
                end = end if row is None else mark
        if end <= job.done:
            return None
        return Piece(job.slot, job.done, end - job.done, end == len(job.prompt), row)
