"""Continuous batching: requests enter slots, their prompts are read in pieces beside those that decode, and they leave.

The host decides (`schedule.py`), the devices compute (`programs.py`), and the host tells what came of it. What a
request gets depends on nothing that runs beside it: a slot's tokens are masked everywhere, experts have room for all,
and every request draws with a key of its own.

Letters: b slots, r rows that are read, t time, n drafts, p pages of a row, e ids that end a text.
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError, require
from orogen.config.engine import EngineConfig
from orogen.infer.budget import Markers, markers_of
from orogen.infer.capacity import Capacity
from orogen.infer.forward import NONE, Caches, Control, Pieces, Sampler
from orogen.infer.knobs import Features, check_ids, features_of, knobs_of, words_of_mask
from orogen.infer.programs import Emitted, Programs
from orogen.infer.request import CANCELLED, ERROR, LENGTH, STOP, Chosen, Output, Request
from orogen.infer.sampling import rows_of
from orogen.infer.schedule import Admission, Piece, Scheduler
from orogen.infer.text import Texts, TextStream
from orogen.model.lm import written_out

PAGED, RECURRENT = "*+", "Mmw"  # letters whose layers keep pages, and what does not grow with the text
BEYOND = 2**30  # a row that no cache has
SMALLEST_PIECE = 16  # tokens to which the last pieces of prompts are padded at least: a program each would be too many


@dataclasses.dataclass
class Slot:
    """A request that runs. place: of its last token, which the model has not read; None: its prompt is being read."""

    number: int
    request: Request
    pages: tuple[int, ...]
    ends: tuple[int, ...]
    text: TextStream | None
    matcher: Any
    generated: list[int] = dataclasses.field(default_factory=list)
    drafts: Any = None

    @property
    def place(self) -> int:
        """Of the last token, which the model has not read."""
        return len(self.request.prompt) + len(self.generated) - 1

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.request.max_tokens - len(self.generated)


@dataclasses.dataclass
class Stats:
    """Totals since the engine was made. accepted: of the drafts of each depth. host_seconds: of rounds, without what
    waits for devices."""

    requests: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: list[int] = dataclasses.field(default_factory=list)
    host_seconds: float = 0.0
    device_seconds: float = 0.0


class Engine:
    """Answers requests by one model. Not thread-safe. Raises ConfigError for a plan or model that it cannot serve."""

    def __init__(self, opened: Opened, config: EngineConfig | None = None):
        self.config = config = config or EngineConfig()
        _check(opened, config)
        self.opened = opened = _prepared(opened, config)
        model, plan = opened.config, opened.plan
        letters = model.layers.main + (model.layers.mtp if config.drafter == "mtp" else "")
        paged = any(letter in PAGED for letter in letters)
        self._drafts = 0 if config.drafter == "none" else config.drafts
        ranks = plan.size("batch")
        slots = config.slots // ranks
        length = min(config.max_length, model.learned_positions or config.max_length)
        self.length = length
        each = -(-(length + self._drafts) // config.page)
        recurrent = any(letter in RECURRENT for letter in letters)
        pages = (config.pages or slots * each) if paged else 0
        snapshots = config.snapshots if recurrent and config.prefix_cache else 0
        self.scheduler = Scheduler(
            Capacity(
                slots=config.slots, ranks=ranks, page=config.page, pages=pages, recurrent=recurrent,
                snapshots=snapshots, chunk=config.chunk, prefill_tokens=config.prefill_tokens, queue=config.queue,
                drafts=self._drafts, lookahead=int(config.drafter == "mtp"), reuse=config.prefix_cache,
            )
        )  # fmt: skip
        self._markers: Markers | None = None
        self.programs = Programs(opened, config, self._drafts, length, _is_token(opened), None)
        self._each = each if paged else 1
        self._caches: Caches = self.programs.start(slots, pages)
        self._snapshots: Caches = self.programs.start(max(snapshots, 1), 0)
        self._slots: dict[int, Slot] = {}
        self._waiting: dict[int, tuple[Request, Any]] = {}
        self._sampler: tuple[Features, Sampler] | None = None
        self._outputs: list[Output] = []
        self._texts = Texts(opened.tokenizer) if opened.tokenizer is not None else None
        self._constraints: Any = None
        self._seeds = np.random.default_rng(config.seed)
        self.stats = Stats(accepted=[0] * self._drafts)

    @property
    def busy(self) -> bool:
        """Whether anything waits, runs, or is still to be told."""
        return self.scheduler.busy or bool(self._outputs)

    def submit(self, request: Request, *, salt: str = "") -> int:
        """Queues a request and returns its number. Requests of different salts share no cached prefix.

        Raises ConfigError for one that this engine can never answer, Full if too many wait.
        """
        request = self._checked(request)
        matcher = self._matcher(request)
        number = self.scheduler.submit(request, salt=salt)
        self._waiting[number] = request, matcher
        self.stats.requests += 1
        return number

    def cancel(self, number: int) -> None:
        """Ends a request, which answers with CANCELLED; nothing happens if it has ended."""
        try:
            slot = self.scheduler.cancel(number)
        except KeyError:
            return
        self._waiting.pop(number, None)
        if slot is not None:
            self._leave(slot)
        self._outputs.append(Output(number, finish=CANCELLED))

    def step(self) -> list[Output]:
        """One round: admits, reads pieces of prompts, and decodes. Returns what there is to tell."""
        began, waited = time.perf_counter(), self.stats.device_seconds
        plan = self.scheduler.round()
        for admission in plan.admitted:
            self._admit(admission)
        emitted: list[tuple[Sequence[int], Emitted]] = []
        if plan.pieces:
            emitted += self._read(plan.pieces)
        if plan.decoding:
            emitted.append((plan.decoding, self._decode(plan.decoding)))
        for slots, each in emitted:
            self._tell(slots, each)
        outputs, self._outputs = self._outputs, []
        self.stats.host_seconds += time.perf_counter() - began - (self.stats.device_seconds - waited)
        return outputs

    def run(self, requests: Iterable[Request]) -> list[list[Output]]:
        """Answers the requests, together, and returns the outputs of each."""
        numbers = [self.submit(request) for request in requests]
        found: dict[int, list[Output]] = {number: [] for number in numbers}
        while self.busy:
            for output in self.step():
                found[output.number].append(output)
        return [found[number] for number in numbers]

    def _checked(self, request: Request) -> Request:
        """The request with a seed. Raises ConfigError."""
        size = self.opened.config.vocab_size
        wrong = [i for i in (*request.prompt, *request.stop_ids) if not 0 <= i < size]
        if wrong:
            raise ConfigError(f"token id {wrong[0]}; expected 0 to {size - 1}")
        check_ids(request, size)
        if len(request.prompt) + request.max_tokens > self.length:
            raise ConfigError(
                f"a prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens}; expected at most "
                f"{self.length} in all"
            )
        if request.stop and self.opened.tokenizer is None:
            raise ConfigError("Request.stop without a tokenizer; expected token ids in stop_ids")
        if request.budget is not None and self._markers is None:
            self._markers = markers_of(self.opened.tokenizer, size)
            self.programs = dataclasses.replace(self.programs, markers=self._markers)
        if request.sampling.seed is None:
            seed = int(self._seeds.integers(2**63))
            request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed))
        return request

    def _matcher(self, request: Request) -> Any:
        """What a request's text must match, None if anything."""
        if request.grammar is None:
            return None
        from orogen.infer.constrain import Constraints

        if self._constraints is None:
            self._constraints = Constraints(self.opened.tokenizer, self.opened.config.vocab_size)
        return self._constraints.matcher(request.grammar, prompt=request.prompt)

    def _admit(self, admission: Admission) -> None:
        request, matcher = self._waiting.pop(admission.number)
        tokenizer = self.opened.tokenizer
        ends = request.stop_ids
        if tokenizer is not None and not request.ignore_eos:
            ends = (*ends, *sorted(tokenizer.end_ids))
        text = self._texts and self._texts.stream(after=request.prompt, stops=request.stop, shown=request.shown)
        self._slots[admission.slot] = Slot(admission.number, request, admission.pages, ends, text, matcher)
        source = self._snapshots_row(admission.slot, admission.row)
        self._caches = self.programs.copy(self._caches, self._snapshots, self._slot_row(admission.slot), source)
        self._sampler = None
        self.stats.cached_tokens += admission.length

    def _leave(self, slot: int) -> None:
        del self._slots[slot]
        self._sampler = None

    def _read(self, pieces: Sequence[Piece]) -> list[tuple[Sequence[int], Emitted]]:
        """Reads the pieces, those of one padded length together."""
        found = []
        for length in sorted({self._padded(piece.count) for piece in pieces}):
            together = [piece for piece in pieces if self._padded(piece.count) == length]
            features, sampler = self._sampling()
            slot_r, arrays = self._pieces(together, length)
            self._caches, rows, emitted = self.programs.read(self._caches, slot_r, arrays, sampler, features)
            self._sampler = features, sampler._replace(rows=rows)
            found.append(([piece.slot for piece in together if piece.last], emitted))
            for piece in together:
                if piece.row is not None:
                    into = self._snapshots_row(piece.slot, piece.row)
                    source = self._slot_row(piece.slot)
                    self._snapshots = self.programs.copy(self._snapshots, self._caches, into, source)
                self.scheduler.prefilled(piece.slot, piece.count)
                self.stats.read_tokens += piece.count
        return found

    def _decode(self, decoding: Sequence[int]) -> Emitted:
        """Some steps of the slots. One at a time where grammars say what may come next, and few while others wait."""
        features, sampler = self._sampling()
        steps = 1 if features.masks else self.config.steps
        fed = steps * (self._drafts + 1)
        control = self._control(decoding, fed)
        self._caches, rows, emitted = self.programs.decode(self._caches, control, sampler, features, steps)
        self._sampler = features, sampler._replace(rows=rows)
        return emitted

    def _tell(self, slots: Sequence[int], emitted: Emitted) -> None:
        """What a call emitted becomes outputs, and requests that have ended leave."""
        began = time.perf_counter()
        emitted = jax.device_get(emitted)
        self.stats.device_seconds += time.perf_counter() - began
        for number in slots:
            if number not in self._slots:
                continue
            slot = self._slots[number]
            if emitted.report.token.ndim == 3:
                self._count(emitted.report.token[number])
            slot.drafts = emitted.drafts_bn[number]
            output = self._advanced(slot, _chosen(emitted, number, slot.request.logprobs), bool(emitted.bad_b[number]))
            if output.finish is not None:
                self.scheduler.finished(number, committed=slot.generated[:-1])
                self._leave(number)
            self._outputs.append(output)

    def _advanced(self, slot: Slot, tokens: Sequence[Chosen], bad: bool) -> Output:
        """The slot with new tokens, and what there is to tell."""
        kept, text, finish, error = [], "", None, None
        for token in tokens:
            if bad and token is tokens[-1]:
                finish, error = ERROR, f"the logits of token {len(slot.generated)} are not numbers, or allow no token"
                break
            kept.append(token)
            slot.generated.append(token.id)
            self.stats.generated_tokens += 1
            if token.id in slot.ends:
                finish = STOP
            elif slot.text is not None:
                text += slot.text.push((token.id,))
                finish = STOP if slot.text.stopped else None
            if slot.matcher is not None and finish is None:
                error = slot.matcher.advance(token.id)
                finish = ERROR if error else STOP if slot.matcher.finished else None
            if finish is None and not slot.left:
                finish = LENGTH
            if finish is not None:
                break
        if finish is not None and slot.text is not None and not slot.text.stopped:
            text += slot.text.finish()
        return Output(slot.number, tuple(kept), text, finish, error)

    def _sampling(self) -> tuple[Features, Sampler]:
        """Settings and state of every slot's sampling. Made anew when requests come or go: the host knows all that was
        generated."""
        requests = [self._slots[s].request if s in self._slots else None for s in range(self.config.slots)]
        features = features_of(r for r in requests if r is not None)
        if self._sampler is None or self._sampler[0] != features:
            generated = [self._slots[s].generated if s in self._slots else () for s in range(self.config.slots)]
            size = self.opened.config.vocab_size
            rows = rows_of(requests, features, vocab_size=size, markers=self._markers, generated=generated)
            self._sampler = features, Sampler(*jax.device_put((knobs_of(requests, features), rows)), None)
        sampler = self._sampler[1]
        if features.masks:
            sampler = sampler._replace(mask_bw=self._masks())
        return features, sampler

    def _masks(self) -> np.ndarray:
        mask_bw = np.full((self.config.slots, words_of_mask(self.opened.config.vocab_size)), 2**32 - 1, np.uint32)
        for number, slot in self._slots.items():
            if slot.matcher is not None:
                slot.matcher.mask_into(mask_bw[number])
        return mask_bw

    def _pieces(self, pieces: Sequence[Piece], length: int) -> tuple[np.ndarray, Pieces]:
        """The pieces as arrays, as many rows for every data rank: a power of two, so that there are few programs."""
        per_rank: list[list[Piece]] = [[] for _ in range(self.programs.ranks)]
        for piece in pieces:
            per_rank[piece.slot // self._per_rank].append(piece)
        width = max(_power(max(map(len, per_rank))), self.opened.plan.size("tensor"))
        reach = max(-(-(p.start + p.count + self._drafts) // self.config.page) for p in pieces)
        rows = [row for each in per_rank for row in (*each, *[None] * (width - len(each)))]
        count = len(rows)
        tokens_rt, table_rp = np.zeros((count, length), np.int32), np.zeros((count, self._reach(reach)), np.int32)
        slot_r, next_r, start_r, count_r = (np.full(count, fill, np.int32) for fill in (self._per_rank, NONE, 0, 0))
        for row, piece in enumerate(rows):
            if piece is None:
                continue
            prompt, end = self._slots[piece.slot].request.prompt, piece.start + piece.count
            tokens_rt[row, : piece.count] = prompt[piece.start : end]
            slot_r[row], start_r[row], count_r[row] = piece.slot % self._per_rank, piece.start, piece.count
            next_r[row] = NONE if piece.last else prompt[end]
            _fill(table_rp[row], self._slots[piece.slot].pages)
        return slot_r, Pieces(tokens_rt, next_r, start_r, count_r, table_rp)

    def _control(self, decoding: Sequence[int], fed: int) -> Control:
        """The slots as arrays. fed: the most tokens that each will read."""
        count = self.config.slots
        token_b, place_b, left_b = (np.zeros(count, np.int32) for _ in range(3))
        drafts_bn = np.full((count, self._drafts), NONE, np.int32)
        ends_be = np.full((count, _power(max(len(self._slots[s].ends) for s in decoding))), NONE, np.int32)
        reach = max(-(-(self._slots[s].place + min(fed, self._slots[s].left + self._drafts)) // self.config.page)
                    for s in decoding)  # fmt: skip
        table_bp = np.zeros((count, self._reach(reach)), np.int32)
        for number in decoding:
            slot = self._slots[number]
            token_b[number], place_b[number], left_b[number] = slot.generated[-1], slot.place, slot.left
            if slot.drafts is not None and slot.matcher is None:
                drafts_bn[number] = slot.drafts
            ends_be[number, : len(slot.ends)] = slot.ends
            _fill(table_bp[number], slot.pages)
        return Control(token_b, place_b, left_b, drafts_bn, ends_be, table_bp)

    def _count(self, tokens_nt: np.ndarray) -> None:
        """Steps of a slot, and the drafts that were kept."""
        steps = int((tokens_nt[:, 0] != NONE).sum())
        self.stats.steps += steps
        self.stats.drafted += steps * self._drafts
        for depth in range(self._drafts):
            self.stats.accepted[depth] += int((tokens_nt[:, depth + 1] != NONE).sum())

    @property
    def _per_rank(self) -> int:
        return self.config.slots // self.programs.ranks

    def _padded(self, count: int) -> int:
        config = self.config
        if config.exact:
            return config.chunk * min(_power(-(-count // config.chunk)), config.prefill_tokens // config.chunk)
        return min(max(_power(count), SMALLEST_PIECE), config.prefill_tokens)

    def _reach(self, pages: int) -> int:
        """How many pages of a row a program reads: a power of two, so that there are few programs."""
        return self._each if self.config.exact else min(_power(max(pages, 1)), self._each)

    def _slot_row(self, slot: int) -> np.ndarray:
        return self._row(slot, slot % self._per_rank)

    def _snapshots_row(self, slot: int, row: int | None) -> np.ndarray:
        return self._row(slot, BEYOND if row is None else row)

    def _row(self, slot: int, row: int) -> np.ndarray:
        """A row of the slot's data rank, and none of the others."""
        rows = np.full(self.programs.ranks, BEYOND, np.int32)
        rows[slot // self._per_rank] = row
        return rows


def _prepared(opened: Opened, config: EngineConfig) -> Opened:
    """The model as the engine runs it."""
    plan = dataclasses.replace(opened.plan, decode_kernels=config.kernels)
    if not config.written_out:
        return opened._replace(plan=plan)
    built, (params, buffers) = written_out(opened.config, opened.built, opened.params, opened.buffers)
    return opened._replace(plan=plan, built=built, params=params, buffers=buffers)


def _check(opened: Opened, config: EngineConfig) -> None:
    plan, model = opened.plan, opened.config
    require(plan.config.stage == 1, plan.config, "stage", "1: an engine has no pipeline")
    require(plan.config.context == 1, plan.config, "context", "1: an engine keeps a text on one rank")
    require(plan.config.capacity_factor is None, plan.config, "capacity_factor", "None: no token is dropped here")
    require(plan.config.linear == "plain", plan.config, "linear", "plain here")
    each = plan.size("batch") * plan.size("tensor")
    require(config.slots % each == 0, config, "slots", f"a multiple of data x tensor = {each}")
    single = plan.config.devices == 1
    require(single or not config.exact, config, "exact", f"False on {plan.config.devices} devices")
    has_block = config.drafter != "mtp" or bool(model.layers.mtp)
    require(has_block, config, "drafter", "none or lookup: the model has no multi-token-prediction block")


def _is_token(opened: Opened) -> np.ndarray:
    """(v,) whether a token may be chosen: rows of the vocabulary beyond the tokenizer's stand for nothing."""
    is_token_v = np.ones(opened.config.vocab_size, bool)
    if opened.tokenizer is not None:
        is_token_v[:] = False
        is_token_v[: opened.tokenizer.vocab_size] = opened.tokenizer.is_token_v
    return is_token_v


def _chosen(emitted: Emitted, slot: int, logprobs: int | None) -> list[Chosen]:
    """The tokens of one slot in order."""
    report = emitted.report
    found = []
    for place in np.argwhere(report.token[slot] != NONE):
        index = (slot, *place)
        top = ()
        if logprobs:
            ids, values = report.top_ids[index][:logprobs], report.top_logprobs[index][:logprobs]
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        logprob = None if logprobs is None else float(report.logprob[index])
        found.append(Chosen(int(report.token[index]), logprob, top))
    return found


def _fill(row: np.ndarray, values: Sequence[int]) -> None:
    count = min(len(row), len(values))
    row[:count] = values[:count]


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
