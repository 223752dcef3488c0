"""Scores long documents in pieces: what the layers keep of a piece (states, keys and values) is carried to the next.

Every token is predicted from its whole document, as by one pass over it, in the memory of one piece and of the keys and
values of the document. States do not grow.

Letters: b rows, t time of a piece.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from orogen.checkpoint.open import Opened
from orogen.config.checks import require
from orogen.evaluate.likelihood import Row, Score, at_work
from orogen.layers.documents import Documents
from orogen.model.cache import Rows
from orogen.model.cache import caches as caches_of
from orogen.model.heads import judge
from orogen.parallel import placement
from orogen.precision.policy import working_copy

ROWS = 4  # documents per data rank that are read beside one another
PIECE = 512  # tokens that are read at once, where nobody says


class Piece(NamedTuple):
    """Tokens (b, t), their segments (1, or 0 for padding) and places in the document, and the next token of each with
    whether it is asked for."""

    tokens_bt: Any
    segments_bt: Any
    positions_bt: Any
    next_bt: Any
    asked_bt: Any


class Held(NamedTuple):
    """Rows that are read at once, tokens of a piece and of the caches, and the bytes of the caches on all devices."""

    rows: int
    piece: int
    length: int
    caches: int


class Carrier:
    """Scores rows of any length, by pieces of `piece` tokens, or a few more that the plan can split. dtype: of the
    computation.

    Raises ConfigError for a plan with stages or context ranks.
    """

    def __init__(self, opened: Opened, *, piece: int, dtype: str = "float32"):
        plan = opened.plan.config
        require(plan.stage == 1, plan, "stage", "1: pieces are carried through one stage")
        require(plan.context == 1, plan, "context", "1: pieces are carried on one rank")
        unit = plan.sequence_pieces(routed="E" in opened.config.layers.main)
        self._opened, self._dtype, self._piece = opened, jnp.dtype(dtype), -(-piece // unit) * unit

    def score(
        self, rows: Sequence[Row], weights: tuple[Any, Any], progress: Callable[[], None] = lambda: None
    ) -> list[Score]:
        """The score of each row; see `Scorer.score`."""
        weights = at_work(weights[0], self._opened.plan), weights[1]
        self._longest(rows)
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens_t))
        at_once, scores = self._at_once(len(rows)), [Score(0.0, 0, 0)] * len(rows)
        for start in range(0, len(order), at_once):
            numbers = order[start : start + at_once]
            found = self._together([rows[number] for number in numbers], at_once, weights, progress)
            for number, (nats, hits, asked) in zip(numbers, found.T.tolist(), strict=False):
                scores[number] = Score(-nats, int(hits), int(asked))
        return scores

    def held(self, rows: Sequence[Row]) -> Held:
        """What is held while the longest of the rows are scored. Raises ConfigError for more than learned positions."""
        at_once, size = self._at_once(len(rows)), self._longest(rows)
        length = self._pieces(size) * self._piece
        arrays = jax.tree.leaves(self._shapes(Rows(at_once, length)))
        return Held(at_once, self._piece, length, sum(a.size * a.dtype.itemsize for a in arrays))

    def _longest(self, rows: Sequence[Row]) -> int:
        longest = self._opened.config.learned_positions
        size = max((len(row.tokens_t) for row in rows), default=0)
        require(longest is None or size <= longest, self._opened.config, "learned_positions", f"{size} or more")
        return size

    def _at_once(self, rows: int) -> int:
        ranks = self._opened.plan.size("batch")
        return ranks * min(ROWS, max(1, -(-rows // ranks)))

    def _pieces(self, tokens: int) -> int:
        """Pieces of the caches' length: a power of two, so that documents share programs."""
        return 1 << (-(-tokens // self._piece) - 1).bit_length()

    def _together(
        self, rows: Sequence[Row], at_once: int, weights: tuple[Any, Any], progress: Callable[[], None]
    ) -> np.ndarray:
        """(3, b) float64: nats, hits and tokens that are asked for."""
        size = max(len(row.tokens_t) for row in rows)
        count = -(-size // self._piece)
        kept, total = self._starter(at_once, self._pieces(size))(*weights), np.zeros((3, at_once))
        for number in range(count):
            kept, sums = self._step(*weights, kept, self._batch(rows, number, at_once))
            total += np.asarray(jax.device_get(sums), np.float64)
            progress()
        return total

    def _batch(self, rows: Sequence[Row], number: int, at_once: int) -> Piece:
        start, size = number * self._piece, self._piece
        arrays = np.zeros((5, at_once, size), np.int32)
        for place, row in enumerate(rows):
            tokens_t, next_t = row.tokens_t[start : start + size], row.tokens_t[start + 1 : start + 1 + size]
            arrays[0, place, : len(tokens_t)] = tokens_t
            arrays[1, place, : len(tokens_t)] = 1
            arrays[3, place, : len(next_t)] = next_t
            arrays[4, place, : len(next_t)] = row.asked_t[start + 1 : start + 1 + size]
        arrays[2] = np.where(arrays[1], start + np.arange(size), 0)
        sharding = self._opened.plan.sharding("batch")
        return Piece(*(placement.from_host(array, sharding) for array in arrays))

    @functools.cached_property
    def _layout(self) -> tuple[Any, Any]:
        """The logical axes of the caches' arrays, and how many axes of repeated layers are in front."""
        built, room = self._opened.built, Rows(1, 1)
        axes = nnx.merge(built.graph, built.params, built.buffers).backbone.cache_axes(room)
        return axes, jax.tree.map(lambda array, names: array.ndim - len(names), self._shapes(room), axes)

    def _shapes(self, room: Rows) -> Any:
        """The shapes and dtypes of the caches."""
        built = self._opened.built
        start = lambda p, b: nnx.merge(built.graph, p, b).backbone.start(room, self._dtype)  # noqa: E731
        return jax.eval_shape(start, built.params, built.buffers)

    @functools.cached_property
    def _specs(self) -> Any:
        axes, leads = self._layout
        return jax.tree.map(lambda lead, names: self._opened.plan.spec(*(None,) * lead, *names), leads, axes)

    def _settled(self, caches: Any) -> Any:
        """The caches as they leave a program: equal arrays of several ranks are one."""
        axes, leads = self._layout
        agreed = lambda a, lead, names: self._opened.plan.agreed(a, *(None,) * lead, *names)  # noqa: E731
        return jax.tree.map(agreed, caches, leads, axes)

    @property
    def _weight_specs(self) -> tuple[Any, Any]:
        plan, built = self._opened.plan, self._opened.built
        return plan.specs(built.params), plan.specs(built.buffers)

    @functools.cached_property
    def _starter(self) -> Callable[[int, int], Any]:
        """By rows and pieces of their documents, the jitted (parameters, buffers) -> empty caches."""
        return functools.cache(self._starting)

    def _starting(self, rows: int, pieces: int) -> Any:
        plan, built = self._opened.plan, self._opened.built
        room = Rows(rows // plan.size("batch"), pieces * self._piece)

        def make(params: Any, buffers: Any) -> Any:
            model = nnx.merge(built.graph, params, buffers)
            return self._settled(plan.vary(model.backbone.start(room, self._dtype)))

        run = plan.run(make, inputs=self._weight_specs, outputs=self._specs)
        return jax.jit(run)

    @functools.cached_property
    def _step(self) -> Any:
        """The jitted (parameters, buffers, caches, piece) -> the caches after it, and sums (3, b)."""
        plan, built = self._opened.plan, self._opened.built

        def step(params: Any, buffers: Any, kept: Any, piece: Piece) -> tuple[Any, Array]:
            model = nnx.merge(built.graph, working_copy(params, self._dtype.name), buffers)
            docs = Documents(piece.segments_bt, piece.positions_bt)
            h_btd, after = model.hidden(piece.tokens_bt, docs, plan, kept)
            found, asked_bt = judge(h_btd, model, piece.next_bt, plan), piece.asked_bt != 0
            sums = jnp.where(asked_bt, jnp.stack([-found.log_likelihood, found.greedy, asked_bt]), 0).sum(2)
            # Whole on every process, which all read it.
            return self._settled(caches_of(after)), plan.agreed(plan.gather(sums, "batch"))

        inputs = (*self._weight_specs, self._specs, plan.spec("batch"))
        run = plan.run(step, inputs=inputs, outputs=(self._specs, plan.spec()))
        return jax.jit(run, donate_argnums=2, compiler_options=plan.compiler_options)
