"""Reward models: their first parameters, from a language model's, and the scores that they give to conversations."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from orogen.checkpoint.folders import ExtendedFolder, Folder
from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError, require
from orogen.data.packing import Batch, Stream, best_fit, empty_batch, pack
from orogen.infer.chat import Chat
from orogen.infer.generate import rounded
from orogen.layers.embedding import ScoreHead
from orogen.model.by_letter import plain
from orogen.model.lm import Built, build
from orogen.parallel import distributed, placement
from orogen.parallel.plan import Plan
from orogen.posttrain.conversations import Conversation
from orogen.posttrain.pair_batches import ROW
from orogen.posttrain.preference import last_scores
from orogen.posttrain.reference import SAID, by_document
from orogen.train.heldout import measure
from orogen.train.step import batch_to_devices

SCORE = "score"  # the part of the model that only a reward model has


def with_score(folder: Folder, *, seed: int) -> Folder:
    """The folder, if its model has a head for scores; else as that of such a model, with a new head."""
    if folder.config.score_head:
        return folder
    return _WithScore(folder, dataclasses.replace(folder.config, score_head=True), seed)


class _WithScore(ExtendedFolder):
    """The folder of a language model as that of a reward model, whose head is drawn."""

    def read(self, built: Built, plan: Plan, dtype: str) -> tuple[nnx.State, nnx.State]:
        """See `Folder.read`."""
        without = build(self.inner.config, built.layout, built.vocab_rows)
        params, buffers = self.inner.read(without, plan, dtype)
        there = placement.shardings(plain(built.params)[SCORE], plan)

        def draw() -> dict[str, nnx.Param]:
            return {"weight": ScoreHead(self.config, nnx.Rngs(jax.random.key(self.seed))).weight}

        return nnx.State({**plain(params), SCORE: jax.jit(draw, out_shardings=there)()}), buffers


class RewardModel:
    """Scores conversations by a reward model on its plan. dtype: of the computation. batch_tokens: most tokens of a
    batch, unless one conversation has more.

    Raises ConfigError for a model without a head for scores, and for a plan that drops tokens.
    """

    def __init__(self, opened: Opened, chat: Chat, *, dtype: str = "float32", batch_tokens: int = 8192):
        plan = opened.plan.config
        expected = "True: a reward model, as `orogen dpo` trains it"
        require(opened.config.score_head, opened.config, "score_head", expected)
        if plan.capacity_factor is not None or plan.buffer_factor is not None:
            raise ConfigError("the plan drops tokens; expected PlanConfig.evaluating()")
        self._opened, self._chat, self._dtype, self._batch_tokens = opened, chat, dtype, batch_tokens
        self._programs: dict[tuple[int, int, int], Callable[..., Any]] = {}

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """The reward of each conversation, of its end. Raises ConfigError for one that is longer than the model's
        learned positions, and for tokens that the model has no rows for."""
        pieces = [self._piece(conversation) for conversation in conversations]
        if not pieces:
            return []
        longest = max(len(piece.tokens_t) for piece in pieces)
        length = self._length(longest)
        row_n = best_fit([len(piece.tokens_t) for piece in pieces], capacity=length)
        place_n = [int(np.sum(row_n[:number] == row)) for number, row in enumerate(row_n)]
        count = 1 << max(place_n).bit_length()
        scores_rn = self._scores(pack(pieces, sequence_length=length, pad_id=0), count)
        return [float(scores_rn[row, place]) for row, place in zip(row_n, place_n, strict=True)]

    def _piece(self, conversation: Conversation) -> Stream:
        ids = self._chat.prompt(list(conversation.messages), tools=list(conversation.tools), generate=False).ids
        most, size = self._opened.config.learned_positions, self._opened.config.vocab_size
        if most is not None and len(ids) > most:
            raise ConfigError(f"a conversation of {len(ids)} tokens; expected at most {most} learned positions")
        if max(ids) >= size:
            raise ConfigError(f"a conversation has token {max(ids)}; expected ids below vocab_size = {size}")
        return Stream(np.array(ids, np.int32), np.ones(len(ids), np.float32))

    def _length(self, longest: int) -> int:
        """Tokens of a row: a power of two, or the next multiple of what the plan splits."""
        model, plan = self._opened.config, self._opened.plan.config
        unit = plan.context * plan.sequence_pieces(routed="E" in model.layers.main)
        least = 2 * plan.context * model.reach if plan.context > 1 else 0
        return -(-max(rounded(longest), least) // unit) * unit

    def _scores(self, batch: Batch, count: int) -> np.ndarray:
        """(r, n): of each document of each row."""
        plan, (rows, length) = self._opened.plan, batch.tokens_bt.shape
        unit = plan.config.data * plan.config.microbatches
        size = max(1, min(self._batch_tokens // length, 1 << (rows - 1).bit_length()) // unit) * unit
        params, found = self._opened.params, []
        if plan.storage != plan.rules:
            params = jax.jit(placement.working, static_argnums=1)(params, plan)
        padding = empty_batch(-rows % size, sequence_length=length, pad_id=0)
        batch = batch.map(lambda *parts: np.concatenate(parts), padding)
        number_bt = np.broadcast_to(np.arange(size, dtype=np.int32)[:, None], (size, length))
        for start in range(0, rows, size):
            part = batch.map(lambda x_bt, start=start: x_bt[start : start + size])._replace(extras={ROW: number_bt})
            program = self._program(size, length, count)
            metrics = program(params, self._opened.buffers, batch_to_devices(part, plan))
            found.append(np.asarray(jax.device_get(metrics[SAID].sum)).reshape(size, count))
        return np.concatenate(found)

    def _program(self, rows: int, length: int, count: int) -> Callable[..., Any]:
        """The compiled function of batches of this shape, with at most `count` documents in a row."""
        shape = rows, length, count
        if shape not in self._programs:
            opened, objective = self._opened, by_document(rows, count, last_scores)
            measured = measure(opened.built, objective, opened.config, opened.plan, self._dtype)
            self._programs[shape] = distributed.compiled_together(measured)
        return self._programs[shape]
