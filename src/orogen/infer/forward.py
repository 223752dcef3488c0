"""One device's part of an engine's programs, inside `Plan.run`: reads pieces of prompts, decodes, drafts.

A step of decoding feeds each slot its last token and `n` drafts of the next ones, and chooses tokens from the logits in
turn as long as each equals its draft: the tokens are those that would have been chosen without drafts, and what was
fed beyond them is taken back. Without drafts a step is one token.

Letters: b rows (of slots, or of pieces), t time, n drafts, p pages of a row, e ids that end a text, l tokens of a text,
v vocabulary, d model.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.infer.budget import Markers
from orogen.infer.exact import choose_rows, read_rows
from orogen.infer.knobs import Features, Knobs
from orogen.infer.lookup import NONE, at, look_up, written
from orogen.infer.sampling import History, choose
from orogen.layers.documents import Documents
from orogen.model.by_letter import by_letter
from orogen.model.cache import caches as caches_of
from orogen.model.cache import without_caches
from orogen.model.lm import LanguageModel
from orogen.model.replayed import counts
from orogen.model.slots import rolled_back, with_tables, without_drafts
from orogen.model.stages import MOE
from orogen.parallel.context import copied, own, taken
from orogen.parallel.plan import Plan
from orogen.train.loss import map_moe


class Caches(NamedTuple):
    """What slots keep: of the backbone's layers; of the multi-token-prediction block's, None unless it drafts; and
    tokens of each text (b, l) int32, at their places, None unless drafts are looked up or `exact` reads them anew."""

    backbone: Any
    mtp: Any
    text_bl: Any


class Control(NamedTuple):
    """Slots before a call, int32. token_b: the last token, which the model has not read; place_b: its place; left_b:
    tokens that may still come, 0 where nothing is decoded; drafts_bn: NONE from the first depth on that has none;
    ends_be: ids that end the text; table_bp."""

    token_b: Any
    place_b: Any
    left_b: Any
    drafts_bn: Any
    ends_be: Any
    table_bp: Any

    @property
    def offered_bn(self) -> Array:
        """(b, n) bool: drafts that the next step could keep. One more token comes with each, so that the last tokens
        of an answer leave no room for as many."""
        depth_n = jnp.arange(1, self.drafts_bn.shape[1] + 1)
        return (self.drafts_bn != NONE) & (depth_n < self.left_b[:, None])


class Pieces(NamedTuple):
    """Pieces of prompts, int32: tokens (b, t), right-padded; the token after each, NONE if the prompt ends there and
    one is to be chosen; the first one's place; how many they are; pages."""

    tokens_bt: Any
    next_b: Any
    start_b: Any
    count_b: Any
    table_bp: Any


class Report(NamedTuple):
    """Tokens, NONE where none was emitted, and what was asked for of each; see `sampling.Choice`. experts: those that
    the tokens fed went to, int16, in each layer of experts in the order of the pattern (…, l, k): of a step, the tokens
    before those emitted; of a piece, all of its tokens."""

    token: Array
    logprob: Array | None
    top_ids: Array | None
    top_logprobs: Array | None
    experts: Array | None = None


class Read(NamedTuple):
    """What came of reading pieces. Of rows whose prompts end: the token chosen, drafts after it, and whether its logits
    were no numbers. h_btd: final hidden states as the residual stream is laid out, None where `exact` is on."""

    caches: Caches
    history: History
    report: Report
    drafts_bn: Array
    bad_b: Array
    h_btd: Array | None


class Exact(NamedTuple):
    """How rows are computed one by one: tokens of a piece, and how many axes each array of the backbone's caches has in
    front."""

    chunk: int
    leads: Any


class Sampler(NamedTuple):
    """What choosing tokens needs beside logits: settings and history of rows, and allowed tokens."""

    knobs: Knobs
    history: History
    mask_bw: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """A model on a plan, ready to decode. drafts: tokens that are drafted at a time, 0 for none. lookup: whether they
    are looked up. exact: None, or how rows are computed one by one. experts: layers of experts and experts per token,
    if those of each token are reported; else None."""

    model: LanguageModel
    plan: Plan
    drafts: int
    lookup: bool
    exact: Exact | None
    features: Features
    is_token_v: Array
    markers: Markers | None
    experts: tuple[int, int] | None = None

    def read(self, caches: Caches, pieces: Pieces, sampler: Sampler) -> Read:
        """Reads a piece of each row's prompt."""
        time_t = jnp.arange(pieces.tokens_bt.shape[1])
        valid_bt = time_t < pieces.count_b[:, None]
        docs = Documents(valid_bt.astype(jnp.int32), pieces.start_b[:, None] + time_t)
        caches = with_pages(caches, pieces.table_bp)
        last_b = jnp.maximum(pieces.count_b - 1, 0)
        ends_b = (pieces.next_b == NONE) & (pieces.count_b > 0)
        if self.exact is not None:
            caches, logits_bv = self._exactly(caches, pieces.start_b, pieces.count_b, pieces.table_bp)
            history, report, bad_b = self._choose(logits_bv, sampler, ends_b)
            return Read(caches, history, report, self._undrafted(ends_b), bad_b, None)
        seen_btd, kept = self.model.hidden(*self._own(pieces.tokens_bt, docs), self.plan, caches.backbone)
        caches = caches._replace(backbone=caches_of(kept))
        logits_bv = self.model.project(self._last(seen_btd, last_b), self.plan)[:, 0]
        history, report, bad_b = self._choose(logits_bv, sampler, ends_b)
        next_b = jnp.where(ends_b, report.token, pieces.next_b)
        next_bt = jnp.concatenate([pieces.tokens_bt[:, 1:], next_b[:, None]], axis=1)
        next_bt = jnp.where(time_t == last_b[:, None], next_b[:, None], next_bt)
        caches, drafts_bn = self._draft(caches, seen_btd, next_bt, docs, live_b=ends_b)
        report = report._replace(experts=self._routed(kept))
        return Read(caches, history, report, drafts_bn, bad_b, seen_btd)

    def step(
        self, caches: Caches, control: Control, sampler: Sampler
    ) -> tuple[Caches, History, Control, Report, Array]:
        """Decodes each live row's next tokens, at most one more than drafts. Returns the report (b, n + 1) and which
        rows' logits were no numbers; those rows have ended."""
        live_b = control.left_b > 0
        tokens_bt = jnp.concatenate([control.token_b[:, None], control.drafts_bn], axis=1)
        fed = tokens_bt.shape[1]
        positions_bt = control.place_b[:, None] + jnp.arange(fed)
        # A place without a draft is padding, which leaves no trace.
        there_bt = live_b[:, None] & ((tokens_bt != NONE) | (jnp.arange(fed) == 0))
        docs = Documents(there_bt.astype(jnp.int32), positions_bt)
        if self.exact is not None:
            return self._step_exactly(caches, control, sampler, docs)
        h_btd, kept = self.model.hidden(tokens_bt, docs, self.plan, caches.backbone)
        logits_btv = self.model.project(self.plan.enter(h_btd), self.plan)
        history, left_b, report, bad_b = self._accept(logits_btv, control, sampler)
        report = report._replace(experts=self._routed(kept))
        count_b = jnp.sum(report.token != NONE, axis=1, dtype=jnp.int32)
        backbone = rolled_back(caches_of(kept), counts(docs) - count_b) if self.drafts else caches_of(kept)
        last_b = jnp.maximum(count_b - 1, 0)
        token_b = jnp.where(live_b, at(report.token, last_b)[:, 0], control.token_b)
        known = docs._replace(segments_bt=(jnp.arange(fed) < count_b[:, None]).astype(jnp.int32))
        caches, drafts_bn = self._draft(
            caches._replace(backbone=backbone), h_btd, report.token, known, live_b=live_b & (left_b > 0)
        )
        control = control._replace(
            token_b=token_b, place_b=control.place_b + count_b, left_b=left_b, drafts_bn=drafts_bn
        )
        return caches, history, control, report, bad_b

    def _step_exactly(
        self, caches: Caches, control: Control, sampler: Sampler, docs: Documents
    ) -> tuple[Caches, History, Control, Report, Array]:
        """`step` without drafts, by reading again the tokens after the last whole piece."""
        assert self.exact is not None
        caches = caches._replace(text_bl=written(caches.text_bl, control.token_b[:, None], docs))
        first_b = control.place_b // self.exact.chunk * self.exact.chunk
        count_b = jnp.where(control.left_b > 0, control.place_b - first_b + 1, 0)
        caches, logits_bv = self._exactly(caches, first_b, count_b, control.table_bp)
        history, left_b, report, bad_b = self._accept(logits_bv[:, None], control, sampler)
        token_b = jnp.where(control.left_b > 0, report.token[:, 0], control.token_b)
        place_b = control.place_b + (control.left_b > 0)
        return caches, history, control._replace(token_b=token_b, place_b=place_b, left_b=left_b), report, bad_b

    def _exactly(self, caches: Caches, first_b: Array, count_b: Array, table_bp: Array) -> tuple[Caches, Array]:
        """The caches with a span of each row's text read, and the logits (b, v) after it; see `exact.read_rows`."""
        assert self.exact is not None
        backbone, logits_bv = read_rows(
            self.model, self.plan, caches.backbone, caches.text_bl, (first_b, count_b), table_bp=table_bp,
            leads=self.exact.leads, chunk=self.exact.chunk,
        )  # fmt: skip
        return caches._replace(backbone=backbone), logits_bv

    def _undrafted(self, like_b: Array) -> Array:
        return jnp.full((len(like_b), self.drafts), NONE, jnp.int32)

    def blank(self, shape: tuple[int, ...]) -> Report:
        """A report of this shape in which no token was emitted."""
        count = self.features.logprobs
        top = (*shape, min(count, self.is_token_v.size)) if count else None
        return Report(
            jnp.full(shape, NONE),
            None if count is None else jnp.zeros(shape),
            None if top is None else jnp.full(top, NONE),
            None if top is None else jnp.zeros(top),
            None if self.experts is None else jnp.full((*shape, *self.experts), NONE, jnp.int16),
        )

    def _routed(self, kept: Any) -> Array | None:
        """(b, t, l, k) int16: the experts of tokens, of what the backbone's layers kept."""
        if self.experts is None:
            return None
        chosen = map_moe(lambda stats: stats.choice.replay.experts, without_caches(kept))
        return jnp.moveaxis(by_letter(chosen, self.model.backbone.items)[MOE], 0, 2).astype(jnp.int16)

    def _accept(self, logits_btv: Array, control: Control, sampler: Sampler) -> tuple[History, Array, Report, Array]:
        """Chooses tokens in turn while they equal the drafts. Returns history, tokens left, the report and bad rows."""

        def one(carry, inputs):
            history, going_b, left_b, bad_b = carry
            logits_bv, draft_b = inputs
            history, report, bad_now_b = self._choose(logits_bv, sampler._replace(history=history), going_b)
            ended_b = jnp.any(report.token[:, None] == control.ends_be, axis=1) | bad_now_b
            left_b = jnp.where(going_b, jnp.where(ended_b, 0, left_b - 1), left_b)
            going_b &= (left_b > 0) & (report.token == draft_b)
            return (history, going_b, left_b, bad_b | bad_now_b), report

        none_b1 = jnp.full((len(control.token_b), 1), NONE, jnp.int32)
        drafts_bt = jnp.concatenate([control.drafts_bn, none_b1], axis=1)
        start = sampler.history, control.left_b > 0, control.left_b, jnp.zeros(control.left_b.shape, bool)
        inputs = jnp.moveaxis(logits_btv, 1, 0), jnp.moveaxis(drafts_bt, 1, 0)
        (history, _, left_b, bad_b), report = lax.scan(one, self.plan.vary(start), inputs)
        return history, left_b, jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), report), bad_b

    def _choose(self, logits_bv: Array, sampler: Sampler, live_b: Array) -> tuple[History, Report, Array]:
        """The next token of live rows."""

        def choose_alone(inputs: Any) -> Any:
            logits_bv, sampler, live_b = inputs
            return choose(
                logits_bv, sampler.knobs, sampler.history, self.features, is_token_v=self.is_token_v,
                mask_bw=sampler.mask_bw, markers=self.markers, live_b=live_b,
            )  # fmt: skip

        inputs = logits_bv, sampler, live_b
        if self.exact is None:
            choice, history = choose_alone(inputs)
        else:  # sums over the vocabulary too
            blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(choose_alone, inputs)[0])
            choice, history = choose_rows(choose_alone, inputs, (blank, sampler.history), live_b)
        report = Report(
            jnp.where(live_b, choice.token_b, NONE), choice.logprob_b, choice.top_ids_bn, choice.top_logprobs_bn
        )
        return history, report, choice.bad_b & live_b

    def _draft(
        self, caches: Caches, h_btd: Array, next_bt: Array, docs: Documents, *, live_b: Array
    ) -> tuple[Caches, Array]:
        """Drafts (b, n) of what follows the last of `next_bt`, the tokens after those of a piece; and the caches with
        them read. h_btd: the piece's final hidden states."""
        none_bn = self._undrafted(live_b)
        if caches.mtp is not None:
            return self._draft_by_mtp(caches, h_btd, next_bt, docs, live_b=live_b)
        if not self.lookup:
            return caches, none_bn
        after = docs._replace(positions_bt=docs.positions_bt + 1)
        text_bl = written(caches.text_bl, next_bt, after)
        end_b = docs.positions_bt[:, 0] + counts(docs)
        found_bn = look_up(text_bl, end_b, self.drafts)
        return caches._replace(text_bl=text_bl), jnp.where(live_b[:, None], found_bn, none_bn)

    def _draft_by_mtp(
        self, caches: Caches, h_btd: Array, next_bt: Array, docs: Documents, *, live_b: Array
    ) -> tuple[Caches, Array]:
        """Each draft is read as if it were the next token, and the block's hidden state as if it were the backbone's,
        as Megatron and vLLM draft; the block's own keys and values there are overwritten when the token is known."""
        last_b = jnp.maximum(counts(docs) - 1, 0)
        h_btd, mtp = self._deeper(caches.mtp, h_btd, *self._own(next_bt, docs), self.plan)
        h_b1d = self._last(h_btd, last_b)
        decoding, place_b1 = copied(self.plan).decoding(), at(docs.positions_bt, last_b)
        drafts, tentative = [self._likeliest(h_b1d)], mtp
        for depth in range(1, self.drafts):
            one = Documents(live_b[:, None].astype(jnp.int32), place_b1 + depth)
            h_b1d, tentative = self._deeper(tentative, decoding.own(h_b1d), drafts[-1], one, decoding)
            h_b1d = decoding.enter(h_b1d)
            drafts.append(self._likeliest(h_b1d))
        return caches._replace(mtp=without_drafts(mtp, tentative)), jnp.concatenate(drafts, axis=1)

    def _deeper(self, caches: Any, h_btd: Array, next_bt: Array, docs: Documents, plan: Plan) -> tuple[Array, Any]:
        """The block's hidden states (b, t, d), and its caches."""
        assert self.model.mtp is not None
        moved = docs._replace(positions_bt=docs.positions_bt + 1)
        embedded_btd = self.model.embedding(next_bt, moved, plan)
        inside = plan.of_layers(self.model.backbone.size)
        h_btd, kept = self.model.mtp(h_btd, embedded_btd, docs, inside, caches)
        return h_btd, caches_of(kept)

    def _own(self, tokens_bt: Array, docs: Documents) -> tuple[Array, Documents]:
        """What this rank of `context` computes of tokens."""
        return own(tokens_bt, self.plan), Documents(*(own(a, self.plan) for a in docs))

    def _last(self, h_btd: Array, last_b: Array) -> Array:
        """(b, 1, d): of the hidden states of a piece those of each row's last token."""
        return taken(self.plan.enter(h_btd), last_b[:, None], self.plan)

    def _likeliest(self, h_b1d: Array) -> Array:
        """(b, 1) int32: the most likely next token."""
        logits_b1v = jnp.where(self.is_token_v, self.model.project(h_b1d, self.plan), -jnp.inf)
        return jnp.argmax(logits_b1v, -1).astype(jnp.int32)


def with_pages(caches: Caches, table_bp: Array) -> Caches:
    """The caches of rows with these pages."""
    mtp = None if caches.mtp is None else with_tables(caches.mtp, table_bp)
    return caches._replace(backbone=with_tables(caches.backbone, table_bp), mtp=mtp)
