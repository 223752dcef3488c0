"""Continuous batching: requests enter slots, their prompts are read in pieces beside those that decode, and they leave.

The host decides (`schedule.py`), the devices compute (`programs.py`), and the host tells what came of it (`slot.py`).
What a request gets depends on nothing that runs beside it: a slot's tokens are masked everywhere, experts have room for
all, and every request draws with a key of its own.
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.infer.arrays import Arrays
from orogen.infer.buckets import Buckets
from orogen.infer.forward import NONE, Caches
from orogen.infer.knobs import check_ids
from orogen.infer.programs import Emitted, Programs
from orogen.infer.request import CANCELLED, ERROR, EngineFailed, Output, Request
from orogen.infer.samplers import Samplers
from orogen.infer.schedule import Admission, Piece, Scheduler
from orogen.infer.sizes import Sizes, sizes_of
from orogen.infer.slot import Slot, plain, reported
from orogen.infer.text import Texts, TextStream
from orogen.infer.warm import compiling, run_all
from orogen.model.lm import written_out
from orogen.model.slots import FEW

Placed = list[tuple[int, int]]  # (row of a call, its slot) pairs


@dataclasses.dataclass
class Stats:
    """Totals since the engine was made. steps: of decoding, over all slots. drafted: drafts of each depth that could
    have been kept; accepted: those that were. host_seconds: of rounds, without what waits for devices."""

    requests: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    drafted: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)
    host_seconds: float = 0.0
    device_seconds: float = 0.0


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
        self.opened = opened = _prepared(opened, config, release=release)
        self.scheduler = Scheduler(sizes.capacity(config))
        self.programs = Programs(opened, config, sizes.drafts, sizes.length, _is_token(opened))
        self.buckets = _buckets(opened, config, sizes)
        self._arrays = Arrays(config, sizes, self.buckets, put=self.programs.put)
        self._samplers = Samplers(self.programs)
        self._caches: Caches = self.programs.start(sizes.slots, sizes.pages)
        # With a page that nobody uses: jax forgets how arrays of no element are laid over devices.
        self._snapshots: Caches = self.programs.start(max(sizes.snapshots, 1), min(sizes.pages, 1))
        self._slots: dict[int, Slot] = {}
        self._waiting: dict[int, tuple[Request, TextStream | None, Any]] = {}
        self._failure: str | None = None
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
        """Queues a request and returns its number. Requests of different salts share no cached prefix.

        Raises ConfigError for one that this engine can never answer, Full if too many wait, EngineFailed.
        """
        self._require_sound()
        self._check(request)
        number = self.scheduler.submit(request, salt=salt)
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
        began, waited = time.perf_counter(), self.stats.device_seconds
        plan = self.scheduler.round()
        for admission in plan.admitted:
            self._admit(admission)
        emitted = self._read(plan.pieces)
        if plan.decoding:
            emitted.append(([(slot, slot) for slot in plan.decoding], self._decode(plan.decoding)))
        for placed, each in emitted:
            self._tell(placed, each)
        outputs, self._outputs = self._outputs, []
        self.stats.host_seconds += time.perf_counter() - began - (self.stats.device_seconds - waited)
        return outputs

    def run(self, requests: Iterable[Request]) -> list[list[Output]]:
        """Answers the requests, together, and returns the outputs of each. Nothing else may be under way."""
        found: dict[int, list[Output]] = {}
        for request in requests:
            while self.scheduler.queued >= self.config.queue:
                self._collect(found)
            found[self.submit(request)] = []
        while self.busy:
            self._collect(found)
        return list(found.values())

    def _collect(self, found: dict[int, list[Output]]) -> None:
        for output in self.step():
            found[output.number].append(output)

    def warm(self) -> int:
        """Compiles every program that requests can need, which then wait for none. Returns how many there are."""
        stores = self._caches, self._snapshots
        jobs = compiling(self.programs, self.buckets, self._arrays, self._samplers, stores)
        run_all(jobs)
        return len(jobs)

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
        self._waiting.clear()
        self._slots.clear()
        self._outputs.clear()
        self._changed()

    def _require_sound(self) -> None:
        if self._failure is not None:
            raise EngineFailed(f"the engine has failed: {self._failure}")

    def _check(self, request: Request) -> None:
        """Raises ConfigError for what this engine can never answer."""
        size = self.opened.config.vocab_size
        wrong = [i for i in (*request.prompt, *request.stop_ids) if not 0 <= i < size]
        if wrong:
            raise ConfigError(f"token id {wrong[0]}; expected 0 to {size - 1}")
        known = self.programs.is_token_v[np.array(request.prompt)]
        if not known.all():
            raise ConfigError(f"token id {request.prompt[known.argmin()]}; expected one that the tokenizer has")
        check_ids(request, size)
        if len(request.prompt) + request.max_tokens > self.length:
            raise ConfigError(
                f"a prompt of {len(request.prompt)} tokens and max_tokens={request.max_tokens}; expected at most "
                f"{self.length} in all"
            )
        if request.stop and self.opened.tokenizer is None:
            raise ConfigError("Request.stop without a tokenizer; expected token ids in stop_ids")
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
        ends = request.stop_ids
        if tokenizer is not None and not request.ignore_eos:
            ends = (*ends, *sorted(tokenizer.end_ids))
        self._slots[admission.slot] = Slot(admission.number, request, admission.pages, ends, text, matcher)
        source = self._arrays.snapshot_row(admission.slot, admission.row)
        into = self._arrays.slot_row(admission.slot)
        self._caches = self.programs.copy(self._caches, self._snapshots, into, source)
        if self.programs.keeps_text:  # the whole prompt: what comes from the prefix cache is not read
            text_dl = self._arrays.text(request.prompt, self.programs.text_length)
            self._caches = self.programs.write(self._caches, text_dl, into)
        self._changed()
        self.stats.cached_tokens += admission.length

    def _leave(self, slot: int) -> Slot:
        self._changed()
        return self._slots.pop(slot)

    def _changed(self) -> None:
        """Requests came or went: what was made for those that ran is made anew."""
        self._samplers.changed()
        self._arrays.changed()

    def _read(self, pieces: Sequence[Piece]) -> list[tuple[Placed, Emitted]]:
        """Reads the pieces. Returns what was emitted by calls in which prompts ended."""
        planned, found = {piece.slot: piece for piece in pieces}, []
        for call in self.buckets.calls(pieces):
            rows, inputs = self._arrays.pieces(call, self._slots)
            sampler = self._samplers.reading([piece and self._slots[piece.slot] for piece in rows])
            features = self._samplers.everything
            self._caches, emitted = self.programs.read(self._caches, inputs, sampler, features=features)
            placed = [(row, piece.slot) for row, piece in enumerate(rows) if piece and piece.last]
            if placed:
                found.append((placed, emitted))
            for piece in call.pieces:
                whole = planned[piece.slot]
                if piece.start + piece.count == whole.start + whole.count:
                    self._has_read(whole)
        return found

    def _has_read(self, piece: Piece) -> None:
        """Keeps what is to be kept behind a piece, and reports it."""
        if piece.row is not None:
            into = self._arrays.snapshot_row(piece.slot, piece.row)
            source = self._arrays.slot_row(piece.slot)
            self._snapshots = self.programs.copy(self._snapshots, self._caches, into, source)
        self.scheduler.prefilled(piece.slot, piece.count)
        self.stats.read_tokens += piece.count

    def _decode(self, decoding: Sequence[int]) -> Emitted:
        """Some steps of the slots: one at a time where grammars say what may come next."""
        features, sampler = self._samplers.decoding(self._slots)
        constrained = any(self._slots[slot].matcher is not None for slot in decoding)
        steps = 1 if constrained else self.config.steps
        control = self._arrays.control(decoding, self._slots, steps * (self.sizes.drafts + 1))
        self._caches, rows, emitted = self.programs.decode(
            self._caches, control, sampler, features=features, steps=steps
        )
        self._samplers.advanced(rows)
        return emitted

    def _tell(self, placed: Placed, emitted: Emitted) -> None:
        """What a call emitted in these rows becomes outputs, and requests that have ended leave."""
        began = time.perf_counter()
        report, drafts_bn, bad_b, offered_bn = jax.device_get(tuple(emitted))
        self.stats.device_seconds += time.perf_counter() - began
        if report.token.ndim == 3:
            slots = [slot for _, slot in placed]
            self._count(report.token[slots], offered_bn[slots])
        else:
            self._samplers.changed()  # what read its prompt decodes from now on
        bad, ids = bad_b.tolist(), report.token.reshape(len(bad_b), -1).tolist()
        for row, number in placed:
            slot = self._slots[number]
            most = slot.request.logprobs
            chosen = plain(ids[row]) if most is None else reported(report, row, most)
            slot.drafts = drafts_bn[row]
            output = slot.told(chosen, bad=bad[row])
            self.stats.generated_tokens += len(output.tokens)
            if output.finish is not None:
                committed = () if output.finish == ERROR else slot.generated[:-1]
                self.scheduler.finished(number, committed=committed)
                self._leave(number)
            self._outputs.append(output)

    def _count(self, tokens_bsn: np.ndarray, offered_bn: np.ndarray) -> None:
        """Steps of slots, the drafts that were there, and those that were kept."""
        steps, *accepted = (tokens_bsn != NONE).sum((0, 1)).tolist()
        add = lambda old, new: [a + b for a, b in zip(old, new, strict=True)]  # noqa: E731
        self.stats.steps += steps
        self.stats.drafted = add(self.stats.drafted, offered_bn.sum(0).tolist())
        self.stats.accepted = add(self.stats.accepted, accepted)


def _prepared(opened: Opened, config: EngineConfig, *, release: bool) -> Opened:
    """The model as the engine runs it."""
    plan = dataclasses.replace(opened.plan, decode_kernels=config.kernels)
    if not config.written_out:
        return opened._replace(plan=plan)
    states = opened.params, opened.buffers
    built, (params, buffers) = written_out(opened.config, opened.built, *states, release=release)
    return opened._replace(plan=plan, built=built, params=params, buffers=buffers)


def _buckets(opened: Opened, config: EngineConfig, sizes: Sizes) -> Buckets:
    """The shapes of its programs."""
    layers = opened.config.layers
    latent = "+" in layers.main + (layers.mtp if config.drafter == "mtp" else "")
    by_kernel = config.kernels == "triton" and not latent and not config.exact and sizes.drafts < FEW
    return Buckets(config, sizes, tensor=opened.plan.size("tensor"), tables_cost_nothing=by_kernel)


def _is_token(opened: Opened) -> np.ndarray:
    """(v,) whether a token may be chosen: rows of the vocabulary beyond the tokenizer's stand for nothing."""
    is_token_v = np.ones(opened.config.vocab_size, bool)
    if opened.tokenizer is not None:
        is_token_v[:] = False
        is_token_v[: opened.tokenizer.vocab_size] = opened.tokenizer.is_token_v
    return is_token_v
