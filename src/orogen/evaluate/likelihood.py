"""Log-likelihoods of given tokens, row by row, on any plan: all that perplexity and multiple choice need.

A row is one sequence. Its last token is only predicted, never read. Rows are sorted by length and padded to lengths and
numbers of rows from a short list, so that each shape compiles once. The forward pass is that of the held-out loss
(`train.heldout.measure`): pipelines, context and ZeRO included, and experts drop nothing.

Letters: b rows, t time, n rows of a batch.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.data.packing import NEXT, NEXT_WEIGHT, Batch
from orogen.model.heads import judge
from orogen.model.lm import LanguageModel
from orogen.parallel import distributed
from orogen.parallel.plan import Plan
from orogen.train.heldout import at_work, measure
from orogen.train.next_token import target_weights, targets
from orogen.train.step import batch_to_devices
from orogen.train.task import ByName, Objective

NATS, HITS, ASKED = "nats", "hits", "asked"
ROW = "row"
SHORTEST = 32  # tokens to which rows are padded at least


class Row(NamedTuple):
    """A sequence of tokens, int32, and which of them (t,) bool are asked for, given all before; never the first."""

    tokens_t: np.ndarray
    asked_t: np.ndarray


class Score(NamedTuple):
    """Of the tokens of a row that are asked for: the sum of their log-likelihoods in nats, how many of them greedy
    decoding would choose, given the true tokens before, and how many they are."""

    log_likelihood: float
    hits: int
    asked: int

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would write them all."""
        return self.hits == self.asked


class Scorer:
    """Scores rows by a model on its plan. dtype: of the computation. batch_tokens: most tokens of a batch.

    Raises ConfigError for a plan that drops tokens.
    """

    def __init__(self, opened: Opened, *, dtype: str = "float32", batch_tokens: int = 8192):
        plan = opened.plan.config
        if plan.capacity_factor is not None or plan.buffer_factor is not None:
            raise ConfigError("the plan drops tokens; expected PlanConfig.evaluating()")
        self._opened, self._dtype, self._batch_tokens = opened, dtype, batch_tokens
        self._programs: dict[tuple[int, int], Callable[..., Any]] = {}

    @property
    def programs(self) -> set[tuple[int, int]]:
        """The shapes (rows, length) that were compiled."""
        return set(self._programs)

    def shapes(self, rows: Sequence[Row]) -> set[tuple[int, int]]:
        """The shapes (rows, length) of the batches of these rows."""
        return {(size, length) for _, size, length in self._batches(_read(rows))}

    def score(
        self, rows: Sequence[Row], weights: tuple[Any, Any], progress: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """The score of each row. weights: parameters and buffers of the model, as they are stored between steps.
        progress is called after each batch. Raises ConfigError for a row that is longer than the model's learned
        positions and the token that follows them, or that asks for its first token."""
        self._check(rows)
        params = at_work(weights[0], self._opened.plan)
        scores: list[Score] = [Score(0.0, 0, 0)] * len(rows)
        for numbers, size, length in self._batches(_read(rows)):
            batch = self._batch([rows[number] for number in numbers], size, length)
            found = jax.device_get(self._program(size, length)(params, weights[1], batch))
            by_row = zip(*(np.asarray(found[name].sum, np.float64) for name in (NATS, HITS, ASKED)), strict=True)
            for number, (nats, hits, asked) in zip(numbers, by_row, strict=False):
                scores[number] = Score(-float(nats), int(hits), int(asked))
            progress()
        return scores

    def _check(self, rows: Sequence[Row]) -> None:
        most, size = self._opened.config.learned_positions, self._opened.config.vocab_size
        for row in rows:
            length = len(row.tokens_t)
            if most is not None and length > most + 1:
                expected = f"at most {most + 1}, one more than ModelConfig.learned_positions"
                raise ConfigError(f"a text of {length} tokens; expected {expected}")
            if not length or row.asked_t[0]:
                raise ConfigError("a text asks for its first token; expected a token before each that is asked for")
            if not 0 <= row.tokens_t.min() <= row.tokens_t.max() < size:
                raise ConfigError(
                    f"tokens are from {row.tokens_t.min()} to {row.tokens_t.max()}; expected 0 to {size - 1}"
                )

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], int, int]]:
        """(numbers of rows, rows of the batch, its length), longest first, so that too little memory shows at once."""
        alike: dict[int, list[int]] = {}
        for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
            alike.setdefault(self._padded(lengths[number]), []).append(number)
        for length, numbers in alike.items():
            size = self._rows(length, len(numbers))
            for start in range(0, len(numbers), size):
                yield numbers[start : start + size], size, length

    def _padded(self, length: int) -> int:
        """The next length of the list: the shortest that the plan can split, doubled as often as it takes."""
        model, plan = self._opened.config, self._opened.plan.config
        unit = plan.context * plan.sequence_pieces(routed="E" in model.layers.main)
        shortest = max(SHORTEST, 2 * plan.context * model.reach if plan.context > 1 else 0)
        padded = -(-shortest // unit) * unit
        while padded < length:
            padded *= 2
        return padded

    def _rows(self, length: int, count: int) -> int:
        """Rows of a batch of this length: a multiple of what the plan splits them over, and of `count` rows that do not
        fill a batch the next power of two."""
        plan = self._opened.plan.config
        unit = plan.data * plan.microbatches
        few = 1 << (-(-count // unit) - 1).bit_length()
        return max(1, min(self._batch_tokens // length // unit, few)) * unit

    def _batch(self, rows: Sequence[Row], size: int, length: int) -> Batch:
        tokens_bt, segments_bt, next_bt = np.zeros((3, size, length), np.int32)
        asked_bt = np.zeros((size, length), np.float32)
        for place, row in enumerate(rows):
            read = len(row.tokens_t) - 1
            tokens_bt[place, :read], next_bt[place, :read] = row.tokens_t[:-1], row.tokens_t[1:]
            segments_bt[place, :read] = 1
            asked_bt[place, :read] = row.asked_t[1:]
        positions_bt = np.where(segments_bt, np.arange(length, dtype=np.int32), 0)
        number_bt = np.broadcast_to(np.arange(size, dtype=np.int32)[:, None], (size, length))
        extras = {ROW: number_bt, NEXT: next_bt, NEXT_WEIGHT: asked_bt}
        batch = Batch(tokens_bt, segments_bt, positions_bt, np.zeros_like(asked_bt), extras)
        return batch_to_devices(batch, self._opened.plan)

    def _program(self, size: int, length: int) -> Callable[..., Any]:
        """The compiled function of batches of this shape."""
        if (size, length) not in self._programs:
            opened = self._opened
            measured = measure(opened.built, by_row(size), opened.config, opened.plan, self._dtype)
            self._programs[size, length] = distributed.compiled_together(measured)
        return self._programs[size, length]


def _read(rows: Sequence[Row]) -> list[int]:
    """How many tokens of each row the model reads."""
    return [max(len(row.tokens_t) - 1, 1) for row in rows]


def by_row(rows: int) -> Objective:
    """Sums over the targets of each row of a global batch of `rows`, whose numbers are in the batch's extra ROW."""
    return Objective(
        counts=functools.partial(_counts, rows), sums=functools.partial(_sums, rows),
        shares=lambda config, depths: {NATS: 1.0}, deeper=False,
    )  # fmt: skip


def _counts(rows: int, batch: Batch, depths: int, plan: Plan) -> ByName:
    asked_n = _per_row(target_weights(batch, 0, plan), batch, rows)
    return {NATS: asked_n, HITS: asked_n, ASKED: asked_n}


def _sums(rows: int, model: LanguageModel, hidden: list[Array], batch: Batch, plan: Plan) -> ByName:
    weights_bt = target_weights(batch, 0, plan)
    asked_bt = weights_bt > 0
    found = judge(hidden[0], model, targets(batch, 0, plan), plan)
    by_token = {
        NATS: jnp.where(asked_bt, -found.log_likelihood, 0),
        HITS: (asked_bt & found.greedy).astype(jnp.float32),
        ASKED: weights_bt,
    }
    return {name: _per_row(x_bt, batch, rows) for name, x_bt in by_token.items()}


def _per_row(x_bt: Array, batch: Batch, rows: int) -> Array:
    """(n,) the sums of each global row, over this device's tokens of it."""
    mine_bn = batch.extras[ROW][:, :1] == jnp.arange(rows)
    return jnp.where(mine_bn, x_bt.sum(1)[:, None], 0).sum(0)
