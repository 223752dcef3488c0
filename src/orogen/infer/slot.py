"""A request that runs, and what is told of the tokens that a call emitted for it."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from orogen.infer.forward import Report
from orogen.infer.knobs import Features, features_of
from orogen.infer.lookup import NONE
from orogen.infer.programs import Emitted
from orogen.infer.request import CANCELLED, ERROR, LENGTH, STOP, Chosen, Output, Request
from orogen.infer.state import MOST_ENDS
from orogen.infer.text import TextStream


class _Plain(dict[int, Chosen]):
    """Tokens without log-probabilities by their ids: most requests ask for none, and one object stands for all."""

    def __missing__(self, token: int) -> Chosen:
        return self.setdefault(token, Chosen(token))


_PLAIN = _Plain()


@dataclasses.dataclass
class Slot:
    """A request that runs. seat: the slot that it has. cached: tokens of its prompt that were. pages: its own, in
    order. end_ids: ids that end it. text, matcher: None without. generated: all ids that have been told. ahead: steps
    that were dispatched and not told, each of which gives a token at least, if the text goes on. scored: of the pieces
    of a prompt that is scored, in order, what was reported, the row, and the tokens. pieces: of every piece, where
    experts are reported, its first place, what was emitted, the row, and the tokens."""

    number: int
    request: Request
    pages: tuple[int, ...]
    end_ids: tuple[int, ...]
    text: TextStream | None
    matcher: Any
    seat: int = 0
    cached: int = 0
    generated: list[int] = dataclasses.field(default_factory=list)
    ahead: int = 0
    scored: list[tuple[Future[Report], int, int]] = dataclasses.field(default_factory=list)
    pieces: list[tuple[int, Future[Emitted], int, int]] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def features(self) -> Features:
        """What it asks of the sampler."""
        return features_of([self.request])

    @property
    def left(self) -> int:
        """Tokens that may still be told."""
        return self.request.max_tokens - len(self.generated)

    @property
    def undispatched(self) -> int:
        """The most tokens that may come of further calls."""
        return self.left - self.ahead

    def length_after(self, steps: int, drafts: int) -> int:
        """The most tokens of its text, drafts included, that the model may have read after so many more steps."""
        read = len(self.request.prompt) + len(self.generated) - 1
        fed = (self.ahead + steps) * (drafts + 1) + max(drafts - 1, 0)  # the block that drafts reads drafts too
        return read + min(fed, self.left + drafts)

    def told(self, chosen: Sequence[Chosen], *, bad: bool) -> Output:
        """As `advance`; what goes wrong with its text or its grammar ends this request."""
        before = len(self.generated)
        try:
            return dataclasses.replace(self.advance(chosen, bad=bad), prompt=self._scores())
        except Exception as error:
            kept = tuple(chosen[: len(self.generated) - before])
            return Output(self.number, kept, finish=ERROR, error=_failure(error))

    def cancelled(self) -> Output:
        """What there is to tell of a request that ends here."""
        try:
            return Output(self.number, text="" if self.text is None else self.text.finish(), finish=CANCELLED)
        except Exception as error:
            return Output(self.number, finish=ERROR, error=_failure(error))

    def advance(self, chosen: Sequence[Chosen], *, bad: bool) -> Output:
        """Takes new tokens, of which only the last may end the text by its id or `max_tokens`, and returns what there
        is to tell. bad: the last one was chosen from logits that are no numbers, or allow no token."""
        if not self.request.max_tokens:
            return Output(self.number, finish=LENGTH, cached=self.cached)
        if bad:
            chosen = chosen[:-1]
        kept, text, finish, error = [], "", None, None
        cached = None if self.generated else self.cached
        # What may end the text before its last token is looked for token by token.
        each = self.matcher is not None or self.request.stop or len(self.end_ids) > MOST_ENDS
        step = 1 if each else max(len(chosen), 1)
        for first in range(0, len(chosen), step):
            some = chosen[first : first + step]
            kept += some
            more, finish, error = self._take([one.id for one in some])
            text += more
            if finish is not None:
                break
        if bad and finish is None:
            finish = ERROR
            error = f"the logits of token {len(self.generated)} are not numbers, or allow no token"
        if finish is not None and self.text is not None and not self.text.stopped:
            text += self.text.finish()
        stop = self._stop() if finish == STOP else None
        return Output(self.number, tuple(kept), text, finish, error, stop, cached)

    def _scores(self) -> tuple[Chosen, ...]:
        """The prompt's tokens but the first, as they were requested, once."""
        found: list[Chosen] = []
        for report, row, count in self.scored:
            some = jax.tree.map(lambda a, row=row, count=count: np.asarray(a)[row : row + 1, :count], report.result())
            found += reported(some, 0, self.request.prompt_logprobs or 0)
        self.scored.clear()
        if odd := [place for place, one in enumerate(found, 1) if one.logprob is None or math.isnan(one.logprob)]:
            raise ValueError(f"the log-probability of token {odd[0]} of the prompt is not a number")
        return tuple(found)

    def experts(self, report: Report, row: int, count: int) -> np.ndarray | None:
        """(n, l, k) int16: the experts of the tokens that the model read for an output of `count` tokens: first the
        whole prompt, then the tokens before these. None where they are not reported."""
        if report.experts is None:
            return None
        if self.pieces:
            of_each = sorted(self.pieces, key=lambda piece: piece[0])
            parts = [np.asarray(found.result().report.experts)[at, :some] for _, found, at, some in of_each]
            self.pieces.clear()
            return np.concatenate(parts)
        tokens: Any = report.token[row]
        return np.asarray(report.experts[row])[tokens != NONE][:count]

    def _stop(self) -> str | int | None:
        """What of the request ended it; None: an end of the model's own, or a grammar that is complete."""
        if self.text is not None and self.text.stopped:
            return self.text.stop
        return self.generated[-1] if self.generated[-1] in self.request.stop_ids else None

    def _take(self, ids: list[int]) -> tuple[str, str | None, str | None]:
        """The text of these tokens, why it ends with the last one, None if it does not, and what is wrong."""
        self.generated += ids
        ended = ids[-1] in self.end_ids
        searched = len(self.generated) > self.request.min_tokens
        text = "" if self.text is None else self.text.push(ids[:-1] if ended else ids, searched=searched)
        finish, error = STOP if ended or (self.text is not None and self.text.stopped) else None, None
        if self.matcher is not None and finish is None:
            error = self.matcher.advance(ids[-1])
            finish = ERROR if error else STOP if self.matcher.finished else None
        return text, LENGTH if finish is None and not self.left else finish, error


def _failure(error: Exception) -> str:
    return f"the request failed: {type(error).__name__}: {error}".splitlines()[0]


def plain(ids: Sequence[int]) -> list[Chosen]:
    """The tokens among `ids`, without log-probabilities."""
    return [_PLAIN[i] for i in ids if i != NONE]


def reported(report: Report, slot: int, logprobs: int) -> list[Chosen]:
    """The tokens of one slot with their log-probabilities. report: numpy arrays, with slots in front. logprobs: see
    `Request`."""
    tokens: Any = report.token[slot]
    there = tokens != NONE  # what comes with a token has its axes, and those of the likeliest ones behind them
    values, top_ids, top_values = (None if array is None else np.asarray(array[slot])[there] for array in report[1:4])
    assert values is not None
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(values)
    if logprobs and top_ids is not None and top_values is not None:
        pairs = zip(top_ids[:, :logprobs].tolist(), top_values[:, :logprobs].tolist(), strict=True)
        tops = [tuple(zip(ids, logs, strict=True)) for ids, logs in pairs]
    return list(map(Chosen, tokens[there].tolist(), values.tolist(), tops))
