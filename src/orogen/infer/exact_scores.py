"""Log-probabilities of given tokens, equal to the bit to those that an exact engine reports when it writes them.

Each token is computed as in decoding: the tokens of its piece are read anew up to it, row by row; see `exact.py`.

Letters: b rows, l tokens of a text, v vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from orogen.infer.engine import Engine
from orogen.infer.exact import COMPILER_OPTIONS, choose_rows, read_rows
from orogen.infer.forward import Caches, with_pages
from orogen.infer.sampling import logprobs_of


class ExactScores:
    """Scores texts by the weights that an engine has. Raises ValueError for one that is not exact."""

    def __init__(self, engine: Engine) -> None:
        if not engine.config.exact:
            raise ValueError("an engine that is not exact; expected EngineConfig.exact")
        self._engine, self._programs = engine, engine.programs
        self._rows = engine.config.slots

    def of(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[np.ndarray]:
        """Per text (l - start,) float32: the log-probability of each token from number `start` (1 or more) on, given
        all before it."""
        found: list[np.ndarray] = []
        for first in range(0, len(texts), self._rows):
            some, begin = texts[first : first + self._rows], starts[first : first + self._rows]
            found += self._together(some, begin)
        return found

    def _together(self, texts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[np.ndarray]:
        text_bl = np.zeros((self._rows, self._programs.text_length), np.int32)
        start_b, length_b = np.zeros((2, self._rows), np.int32)
        for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
            text_bl[row, : len(text)] = text
            start_b[row], length_b[row] = start - 1, len(text)
        weights = jax.tree.leaves((self._engine.opened.params, self._engine.opened.buffers))
        score_bl = np.asarray(self._program(self._empty, weights, (text_bl, start_b, length_b)))
        rows = zip(score_bl, texts, starts, strict=False)
        return [score_l[start - 1 : len(text) - 1] for score_l, text, start in rows]

    @functools.cached_property
    def _empty(self) -> Caches:
        """Caches of texts that have not begun, which every call starts from."""
        sizes = self._engine.sizes
        return self._programs.start(self._rows, self._rows * sizes.reach if sizes.pages else 0)

    @functools.cached_property
    def _program(self) -> Any:
        programs, opened = self._programs, self._engine.opened
        plan, chunk, reach = programs.plan, self._engine.config.chunk, self._engine.sizes.reach
        nested = jax.tree.structure((opened.params, opened.buffers))
        is_token_v = jnp.asarray(programs.is_token_v)

        def score(caches: Caches, weights: list[Array], inputs: Any) -> Array:
            model = programs.merged(*jax.tree.unflatten(nested, weights))
            text_bl, start_b, length_b = inputs
            rows, most = text_bl.shape
            table_bp = jnp.arange(rows * reach, dtype=jnp.int32).reshape(rows, reach)
            settings: Any = {"table_bp": table_bp, "leads": programs.layout.leads.backbone, "chunk": chunk}

            def one(place: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
                layers, score_bl = carry
                asked_b = (place >= start_b) & (place < length_b - 1)
                whole_b = (place < start_b) & (place % chunk == chunk - 1)
                count_b = jnp.where(asked_b | whole_b, place % chunk + 1, 0)
                spans = jnp.broadcast_to(place // chunk * chunk, count_b.shape), count_b
                layers, logits_bv = read_rows(model, plan, layers, text_bl, spans, **settings)
                next_b = lax.dynamic_index_in_dim(text_bl, jnp.minimum(place + 1, most - 1), 1, keepdims=False)
                alone = lambda row: logprobs_of(row[0], row[1], is_token_v)  # noqa: E731
                found_b = choose_rows(alone, (logits_bv, next_b), jnp.zeros(rows), asked_b)
                score_b = jnp.where(asked_b, found_b, lax.dynamic_index_in_dim(score_bl, place, 1, keepdims=False))
                return layers, lax.dynamic_update_index_in_dim(score_bl, score_b, place, 1)

            layers = with_pages(caches, table_bp).backbone
            _, score_bl = lax.fori_loop(0, jnp.max(length_b) - 1, one, (layers, jnp.zeros(text_bl.shape)))
            return score_bl

        model = plan.specs(opened.params), plan.specs(opened.buffers)
        inputs = programs.layout.specs, jax.tree.leaves(model), plan.spec("batch")
        run = plan.run(score, inputs=inputs, outputs=plan.spec("batch"))
        return jax.jit(run, compiler_options=COMPILER_OPTIONS)
