"""Continuous batching: requests enter slots, their prompts are read in pieces beside those that decode, and they leave.

The host decides (`schedule.py`), the devices compute (`programs.py`), and the host tells what came of it (`slot.py`).
What a request gets depends on nothing that runs beside it: a slot's tokens are masked everywhere, experts have room for
all, and every request draws with a key of its own.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.infer.arrays import Arrays
from orogen.infer.dispatched import Dispatched, logprobs_wanted
from orogen.infer.lane import Lane
from orogen.infer.packing import pack
from orogen.infer.prepare import buckets_of, check_request, is_token, prepared
from orogen.infer.programs import Emitted, Programs
from orogen.infer.request import CANCELLED, ERROR, EngineFailed, Output, Request
from orogen.infer.samplers import Samplers
from orogen.infer.schedule import Admission, Piece, Scheduler
from orogen.infer.sizes import sizes_of
from orogen.infer.slot import Slot, plain, reported
from orogen.infer.state import OFF, ON, UNDRAFTED
from orogen.infer.stats import Stats
from orogen.infer.text import Texts, TextStream
from orogen.infer.warm import compiling, run_all

# Steps of a call while requests wait for a slot, which is free only when the host has heard of its end; and while
# prompts are read in several rounds, since slots that cannot decode yet stand empty in every step.
SHORT = 4


class Engine:
    """Answers requests by one model. Not thread-safe. Raises ConfigError for a plan or model that it cannot serve.

    What fails on the host for one request, as its text or grammar, ends that request alone, with ERROR. What fails
    otherwise ends the engine, for its programs own the caches that they are given: the step raises, all that was held
    is given back, no request has an output any more, and whatever is asked of the engine then raises EngineFailed.
    """

    def __init__(self, opened: Opened, config: EngineConfig | None = None, *, release: bool = False):
        """release: the engine takes over the model's arrays, which `opened` then has no more; see `written_out`."""
        self.config = config = config or EngineConfig()
        self.sizes = sizes = sizes_of(opened.config, opened.plan.config, config)
        self._bare = opened._replace(params=None, buffers=None)
        self.opened = opened = prepared(opened, config, release=release)
        self.scheduler = Scheduler(sizes.capacity(config))
        self.programs = Programs(opened, config, sizes.drafts, sizes.length, is_token(opened))
        self.buckets = buckets_of(opened, config, sizes)
        self._arrays = Arrays(config, sizes, self.buckets, put=self.programs.put)
        self._samplers = Samplers(self.programs)
        self._lane = Lane(self.programs, sizes)
        self._slots: dict[int, Slot] = {}
        self._waiting: dict[int, tuple[Request, TextStream | None, Any]] = {}
        self._dispatched: collections.deque[Dispatched] = collections.deque()
        self._failure, self.version, self._swaps = None, 0, 0
        self._outputs: list[Output] = []
        self._texts = Texts(opened.tokenizer) if opened.tokenizer is not None else None
        self._constraints: Any = None
        self._seeds = np.random.default_rng(config.seed)
        self.stats = Stats(drafted=[0] * sizes.drafts, accepted=[0] * sizes.drafts)

    @property
    def length(self) -> int:
        """The most tokens of a prompt and its answer."""
        return self.sizes.length

    @property
    def busy(self) -> bool:
        """Whether anything waits, runs, or is still to be told."""
        return self.scheduler.busy or bool(self._outputs)

    def submit(self, request: Request, *, salt: str = "") -> int:
        """Queues a request and returns its number. Those of different salts, or weights, share no cached prefix.

        Raises ConfigError for one that this engine can never answer, Full if too many wait, EngineFailed.
        """
        self._require_sound()
        self._check(request)
        number = self.scheduler.submit(request, salt=f"{self._swaps}/{salt}")
        try:
            text = self._texts and self._texts.stream(after=request.prompt, stops=request.stop, shown=request.shown)
            matcher = self._matcher(request)
        except BaseException:  # its grammar is refused
            self.scheduler.cancel(number)
            raise
        if request.sampling.seed is None:  # drawn last, so that seeds do not depend on what was refused
            seed = int(self._seeds.integers(2**63))
            request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed))
        self._waiting[number] = request, text, matcher
        self.stats.requests += 1
        return number

    def cancel(self, number: int) -> None:
        """Ends a request, which answers with CANCELLED; nothing happens if it has ended."""
        try:
            place = self.scheduler.cancel(number)
        except KeyError:
            return
        self._waiting.pop(number, None)
        output = Output(number, finish=CANCELLED)
        if place is not None:
            output = self._leave(place).cancelled()
        self._outputs.append(output)

    def step(self) -> list[Output]:
        """One round: admits, reads pieces of prompts, and decodes. Returns what there is to tell.

        Raises EngineFailed after a step that raised anything.
        """
        self._require_sound()
        try:
            return self._round()
        except BaseException as error:
            self._fail(error)
            raise

    def _round(self) -> list[Output]:
        """Dispatches what there is to do, then tells what came of it: all but this round's decoding, which goes on
        while the host prepares the next round. A grammar must see a token before it says what may come next, so that
        with one nothing is dispatched ahead."""
        began, waited = time.perf_counter(), self.stats.device_seconds
        plan = self.scheduler.round()
        for admission in plan.admitted:
            self._admit(admission)
        self._read(plan.pieces)
        ready = (*plan.decoding, *(piece.slot for piece in plan.pieces if piece.last))
        constrained = any((slot := self._slots.get(seat)) and slot.matcher is not None for seat in ready)
        if constrained:
            self._tell_all_but(0)
        running = [slot for seat in ready if (slot := self._slots.get(seat)) and slot.undispatched > 0]
        if running:
            self._decode(running, 1 if constrained else self._steps(unread=len(self._slots) > len(ready)))
        self._tell_all_but(1 if running and not constrained else 0)
        self._end_round()
        outputs, self._outputs = self._outputs, []
        self.stats.host_seconds += time.perf_counter() - began - (self.stats.device_seconds - waited)
        return outputs

    def _steps(self, *, unread: bool) -> int:
        """Of the next call of decoding. unread: whether slots have more of their prompts to read."""
        return min(self.config.steps, SHORT) if unread or self.scheduler.queued else self.config.steps

    def run(self, requests: Iterable[Request], progress: Callable[[], None] = lambda: None) -> list[list[Output]]:
        """Answers the requests, together, and returns the outputs of each. Nothing else may be under way. progress:
        called after each round."""
        found: dict[int, list[Output]] = {}
        for request in requests:
            while self.scheduler.queued >= self.config.queue:
                self._collect(found)
            found[self.submit(request)] = []
        while self.busy:
            self._collect(found)
            progress()
        return list(found.values())

    def _collect(self, found: dict[int, list[Output]]) -> None:
        for output in self.step():
            found[output.number].append(output)

    def warm(self) -> int:
        """Compiles every program that requests can need, which then wait for none. Returns how many there are."""
        jobs = compiling(self.programs, self.buckets, self._arrays, self._samplers, self._lane.settled())
        run_all(jobs)
        return len(jobs)

    def give(self, params: Any, buffers: Any, *, version: int = 0) -> None:
        """Answers from now on by other weights of the same model, laid out and sharded like those of `opened`. Nothing
        that was cached stays, and slots and pages are given out as by a new engine: answers are the same to the bit as
        its. Raises ValueError while anything is under way, EngineFailed."""
        if self.busy:
            raise ValueError("an engine that answers takes no other weights; expected it to be idle")
        self.swap(params, buffers, version=version)
        self.scheduler = Scheduler(self.sizes.capacity(self.config))

    def swap(self, params: Any, buffers: Any, *, version: int) -> None:
        """As `give`, between two steps and while requests run: these, and those that wait, go on with what earlier
        weights cached; later ones do not. version: told with each token that weights choose. Raises EngineFailed."""
        self._require_sound()
        self._lane.settled()
        self.opened = prepared(self._bare._replace(params=params, buffers=buffers), self.config, release=False)
        self.programs.take(self.opened)
        self.version, self._swaps = version, self._swaps + 1

    def close(self) -> None:
        """Ends the process that compiles grammars, if there is one."""
        if self._constraints is not None:
            self._constraints.close()

    def _fail(self, error: BaseException) -> None:
        """Gives back all that requests hold, and what the prefix cache does: nobody knows what the caches are now."""
        self._failure = f"{type(error).__name__}: {error}".splitlines()[0]
        for number in dict.fromkeys((*self._waiting, *self.scheduler.running.values())):  # some may be in both
            self.scheduler.cancel(number)
        for rank in self.scheduler.ranks:
            if rank.prefix is not None:
                rank.prefix.clear()
        for kept in (self._waiting, self._slots, self._outputs, self._dispatched):
            kept.clear()

    def _require_sound(self) -> None:
        if self._failure is not None:
            raise EngineFailed(f"the engine has failed: {self._failure}")

    def _check(self, request: Request) -> None:
        """Raises ConfigError for what this engine can never answer."""
        check_request(request, self.opened, self.programs.is_token_v, length=self.length)
        if request.prompt_logprobs is not None and self.config.exact:
            raise ConfigError("Request.prompt_logprobs where EngineConfig.exact is True; expected None")
        if request.budget is not None:
            _ = self.programs.markers  # refuses a tokenizer that has none

    def _matcher(self, request: Request) -> Any:
        """What a request's text must match, None if anything."""
        if request.grammar is None:
            return None
        from orogen.infer.constrain import Constraints

        if self._constraints is None:
            self._constraints = Constraints(self.opened.tokenizer, self.opened.config.vocab_size)
        return self._constraints.matcher(request.grammar, prompt=request.prompt)

    def _admit(self, admission: Admission) -> None:
        request, text, matcher = self._waiting.pop(admission.number)
        tokenizer = self.opened.tokenizer
        end_ids = request.stop_ids
        if tokenizer is not None and not request.ignore_eos:
            end_ids = (*end_ids, *sorted(tokenizer.end_ids))
        held = admission.number, request, admission.pages, end_ids, text, matcher, admission.slot, admission.length
        slot = Slot(*held)
        self._slots[slot.seat] = slot
        into = self._arrays.slot_row(admission.slot)
        self._lane.restore(into, self._arrays.snapshot_row(admission.slot, admission.row))
        if self.programs.keeps_text:  # the whole prompt: what comes from the prefix cache is not read
            self._lane.write(self._arrays.text(request.prompt, self.programs.text_length), into)
        self._samplers.changed(slot.seat)
        self._arrays.joined(slot)
        self.stats.cached_tokens += admission.length

    def _leave(self, seat: int) -> Slot:
        self._samplers.changed(seat)
        return self._slots.pop(seat)

    def _read(self, pieces: Sequence[Piece]) -> None:
        """Dispatches calls that read the pieces."""
        planned = {piece.slot: piece for piece in pieces}
        for call in self.buckets.calls(pieces):
            rows = self._arrays.rows(call)
            ending = [self._slots[piece.slot] if piece and piece.last else None for piece in rows]
            entries, counted, mask_rw = self._samplers.reading(ending)
            packed_rw = pack(self._arrays.entries(entries, rows, self._slots))
            inputs = packed_rw, *self._arrays.pieces(rows, call.length, self._slots), counted, mask_rw
            placed = [(row, slot) for row, slot in enumerate(ending) if slot]
            emitted, hidden = self._lane.read(inputs, logprobs=logprobs_wanted(placed))
            self._score(rows, call.length, hidden)
            for row, piece in enumerate(rows if self.config.report_experts else ()):
                if piece is not None:
                    self._slots[piece.slot].pieces.append((piece.start, emitted, row, piece.count))
            self._dispatch(placed, emitted, 0)
            for piece in call.pieces:
                whole = planned[piece.slot]
                if piece.start + piece.count == whole.start + whole.count:
                    self._has_read(whole)

    def _score(self, rows: Sequence[Piece | None], length: int, hidden: Future[Any]) -> None:
        """Dispatches the scores of the pieces' own tokens, where a request asks for them."""
        of_rows = [(row, piece, self._slots[piece.slot]) for row, piece in enumerate(rows) if piece is not None]
        scored = [(row, piece, slot) for row, piece, slot in of_rows if slot.request.prompt_logprobs is not None]
        if scored:
            report = self._lane.score(hidden, self._arrays.nexts(scored, (len(rows), length)))
            for row, piece, slot in scored:
                slot.scored.append((report, row, piece.count))

    def _dispatch(self, placed: list[tuple[int, Slot]], emitted: Future[Emitted], steps: int) -> None:
        """Notes whose tokens a call emits."""
        if not placed:
            return
        for _, slot in placed:
            slot.ahead += steps or 1
        self._dispatched.append(Dispatched(placed, emitted, steps, self.version))

    def _has_read(self, piece: Piece) -> None:
        """Keeps what is to be kept behind a piece, and reports it."""
        if piece.row is not None:
            into = self._arrays.snapshot_row(piece.slot, piece.row)
            self._lane.keep(into, self._arrays.slot_row(piece.slot))
        self.scheduler.prefilled(piece.slot, piece.count)
        self.stats.read_tokens += piece.count

    def _decode(self, running: Sequence[Slot], steps: int) -> None:
        """Dispatches so many steps of these slots."""
        runs_b = np.full(self.config.slots, OFF, np.int32)
        for slot in running:
            runs_b[slot.seat] = ON if slot.matcher is None else UNDRAFTED
        features, packed_bw, mask_bw = self._samplers.decoding(self._slots, runs_b)
        table_bp = self._arrays.table(slot.length_after(steps, self.sizes.drafts) for slot in running)
        inputs = packed_bw, table_bp, mask_bw
        placed = [(slot.seat, slot) for slot in running]
        emitted = self._lane.decode(inputs, features=features, steps=steps, logprobs=logprobs_wanted(placed))
        self.stats.called_steps += steps
        self._dispatch(placed, emitted, steps)

    def _tell_all_but(self, count: int) -> None:
        """Tells what was dispatched but the last so many calls."""
        while len(self._dispatched) > count:
            self._tell(self._dispatched.popleft())

    def _end_round(self) -> None:
        began = time.perf_counter()
        self._lane.end_round()
        self.stats.device_seconds += time.perf_counter() - began

    def _tell(self, call: Dispatched) -> None:
        """What a call emitted becomes outputs, and requests that have ended leave. Those that had left before have no
        part in it."""
        began = time.perf_counter()
        report, bad_b, offered_bn = jax.device_get(call.emitted.result())
        self.stats.device_seconds += time.perf_counter() - began
        placed = [(row, slot) for row, slot in call.placed if self._slots.get(slot.seat) is slot]
        if call.steps:
            report = jax.tree.map(lambda a: a[:, : call.steps], report)
            rows = [row for row, _ in placed]
            self.stats.count(report.token[rows], None if offered_bn is None else offered_bn[rows])
        bad, ids = bad_b.tolist(), report.token.reshape(len(bad_b), -1).tolist()
        for row, slot in placed:
            slot.ahead -= call.steps or 1
            most = slot.request.logprobs
            chosen = plain(ids[row]) if most is None else reported(report, row, most)
            if not chosen and not bad[row]:
                continue  # it has ended, which is told already
            output = slot.told(chosen, bad=bad[row])
            if call.version or report.experts is not None:
                experts = slot.experts(report, row, len(output.tokens))
                output = dataclasses.replace(output, experts=experts, version=call.version)
            self.stats.generated_tokens += len(output.tokens)
            if output.finish is not None:
                keeps = output.finish != ERROR and self.opened.plan.size("context") == 1  # see `Stores.holding`
                committed = slot.generated[:-1] if keeps else ()
                self.scheduler.finished(slot.seat, committed=committed)
                self._leave(slot.seat)
            self._outputs.append(output)
