"""An engine without a model: it carries out what a scheduler plans, and remembers what it wrote to every page and
snapshot."""

from orogen.infer.capacity import Capacity
from orogen.infer.request import Request
from orogen.infer.schedule import Piece, Scheduler

KINDS = "attention", "recurrent", "hybrid", "plain"


def capacity(kind: str = "attention", **changes) -> Capacity:
    """Of a model with these kinds of memory; `plain`: with none at all."""
    sizes = {"slots": 4, "page": 2, "pages": 16, "chunk": 4, "prefill_tokens": 8, "queue": 6, "snapshots": 4}
    sizes |= {"recurrent": kind in ("recurrent", "hybrid")} | changes
    if kind in ("recurrent", "plain"):
        sizes["pages"] = 0
    if not sizes["recurrent"]:
        sizes["snapshots"] = 0
    return Capacity(**sizes)


class Engine:
    """Carries out what a scheduler plans, and asserts that it may."""

    def __init__(self, room: Capacity):
        self.room, self.scheduler = room, Scheduler(room)
        self.pages: dict[tuple[int, int], object] = {}  # content by rank and page
        self.rows: dict[tuple[int, int], object] = {}
        self.waiting: dict[int, tuple[Request, str]] = {}
        self.running: dict[int, dict] = {}  # by slot

    def submit(self, prompt, *, max_tokens=3, priority=0, salt="") -> int:
        request = Request(prompt=tuple(prompt), max_tokens=max_tokens, priority=priority)
        number = self.scheduler.submit(request, salt=salt)
        self.waiting[number] = request, salt
        return number

    def rank(self, slot: int) -> int:
        return slot // (self.room.slots // self.room.ranks)

    def content(self, tokens, salt: str, place: int) -> object:
        return salt, tuple(tokens[: (place + 1) * self.room.page + self.room.lookahead])

    def plan(self):
        """Takes a round's plan, and checks it, but for the pieces' execution."""
        ready = {slot for slot, job in self.running.items() if job["done"] == len(job["prompt"])}
        plan = self.scheduler.round()
        assert set(plan.decoding) == ready
        for admission in plan.admitted:
            self.admit(admission)
        by_rank: dict[int, int] = {}
        for slot, start, count, last, row in plan.pieces:
            job = self.running[slot]
            assert start == job["done"] and count > 0 and job["piece"] is None
            assert last == (start + count == len(job["prompt"])) and (last or (start + count) % self.room.chunk == 0)
            assert row is None or (start + count) % self.room.chunk == 0
            reads = [(self.rank(s), j["reads"]) for s, j in self.running.items()]
            assert row is None or (self.rank(slot), row) not in reads, "a row that is read would be written"
            by_rank[self.rank(slot)] = by_rank.get(self.rank(slot), 0) + count
            job["piece"] = Piece(slot, start, count, last, row)
        assert all(count <= self.room.prefill_tokens for count in by_rank.values())
        for rank in range(self.room.ranks):  # whoever is first in a rank goes on
            unread = [(j["order"], s) for s, j in self.running.items() if self.rank(s) == rank and s not in ready]
            assert not unread or self.running[min(unread)[1]]["piece"] is not None
        return plan

    def admit(self, admission):
        slot, number, length, pages, row = admission
        rank = self.rank(slot)
        assert number == min(self.waiting, key=lambda n: (self.waiting[n][0].priority, n)), "nobody is passed"
        request, salt = self.waiting.pop(number)
        assert slot not in self.running and length < len(request.prompt)
        tokens = len(request.prompt) + request.max_tokens + self.room.drafts
        assert len(set(pages)) == len(pages) == (-(-tokens // self.room.page) if self.room.pages else 0)
        shared = length // self.room.page if self.room.pages else 0
        for place, page in enumerate(pages[:shared]):
            assert self.pages[rank, page] == self.content(request.prompt, salt, place)
        others = {p for s, j in self.running.items() if self.rank(s) == rank for p in j["pages"]}
        assert not others & set(pages[shared:])
        assert (row is None) == (not self.room.recurrent or length == 0)
        assert row is None or self.rows[rank, row] == (salt, request.prompt[:length])
        self.running[slot] = {
            "number": number, "order": (request.priority, number), "prompt": request.prompt, "salt": salt,
            "pages": pages, "shared": shared, "done": length, "piece": None, "reads": row, "left": request.max_tokens,
            "tokens": request.prompt,
        }  # fmt: skip

    def write(self, slot: int, start: int, stop: int):
        """Fills the pages of these tokens, which must be the slot's alone."""
        job = self.running[slot]
        if self.room.pages:
            for place in range(start // self.room.page, -(-stop // self.room.page)):
                page = job["pages"][place]
                holders = [s for s, j in self.running.items() if self.rank(s) == self.rank(slot) and page in j["pages"]]
                assert place >= job["shared"] and holders == [slot]
                self.pages[self.rank(slot), page] = self.content(job["tokens"], job["salt"], place)

    def prefill(self, slot: int):
        job = self.running[slot]
        piece, job["piece"], job["reads"] = job["piece"], None, None
        job["done"] += piece.count
        self.write(slot, piece.start, job["done"])
        if piece.row is not None:
            self.rows[self.rank(slot), piece.row] = job["salt"], job["prompt"][: job["done"]]
        self.scheduler.prefilled(slot, piece.count)

    def finish(self, slot: int, new: tuple[int, ...] = ()):
        """Ends a request that has read its prompt, and generated these tokens besides a last one."""
        job = self.running[slot]
        start, job["tokens"] = len(job["prompt"]), (*job["prompt"], *new)
        if new:  # the prompt's last entries, too, look ahead to what was generated
            self.write(slot, max(job["shared"] * self.room.page, start - self.room.lookahead), len(job["tokens"]))
        border = len(job["tokens"]) // self.room.chunk * self.room.chunk
        row = self.scheduler.finished(slot, committed=new, border=border if new else None)
        if row is not None:
            self.rows[self.rank(slot), row] = job["salt"], job["tokens"][:border]
        del self.running[slot]

    def step(self, *, finish: bool = False):
        """A whole round; with `finish`, all that decode end."""
        plan = self.plan()
        for piece in plan.pieces:
            self.prefill(piece.slot)
        for slot in plan.decoding if finish else ():
            self.finish(slot)
        return plan

    def drain(self):
        """Runs until nothing waits or runs; each round must bring that nearer."""
        left = sum(len(j["prompt"]) - j["done"] for j in self.running.values())
        left += sum(len(r.prompt) for r, _ in self.waiting.values())
        for _ in range(2 * left + 4 * (len(self.waiting) + len(self.running)) + 1):
            if not self.scheduler.busy:
                break
            self.step(finish=True)
        assert not self.scheduler.busy and not self.waiting and not self.running

    def nothing_is_lost(self):
        for rank in self.scheduler.ranks:
            prefix = rank.prefix
            if rank.pages is not None:
                assert rank.pages.free + (prefix.evictable_pages if prefix else 0) == rank.pages.count
            if rank.snapshots is not None:
                assert rank.snapshots.free + (prefix.evictable_snapshots if prefix else 0) == rank.snapshots.count
