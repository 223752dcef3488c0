"""Captions of images by a trained model: greedy, a batch of images at a time, on one device.

Letters: b batch, t time, p vectors of an image, v their width or the vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.vision import IMAGE
from orogen.data.images import Placed, with_images
from orogen.data.packing import Batch
from orogen.data.tokenizer import Tokenizer
from orogen.layers.documents import Documents
from orogen.model.cache import Rows, both, caches
from orogen.model.lm import LanguageModel
from orogen.vision.examples import FIRST, chunks

BUCKET = 32  # to a multiple of which prompts are padded, so that they share programs


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The tokens before a caption, in which FIRST + n stands for image n of `features` (p, v). captions: those
    retrieved for each image, for a model that encodes them."""

    ids: Sequence[int]
    features: Mapping[int, np.ndarray]
    captions: Mapping[int, Sequence[str]] = dataclasses.field(default_factory=dict)


class Captioner:
    """Continues prompts with images. token: of an image's place; batch: prompts that are continued together."""

    def __init__(self, opened: Opened, token: int, *, tokens: int = 64, batch: int = 16):
        opened.require_one_device()
        if "x" not in opened.config.layers.main:
            raise ConfigError(f"ModelConfig.pattern is {opened.config.pattern!r}; expected layers that see images (x)")
        if opened.tokenizer is None:
            raise ConfigError("the checkpoint has no tokenizer.json; expected one")
        self.opened, self.token, self.tokens, self.batch = opened, token, tokens, batch
        self.tokenizer: Tokenizer = opened.tokenizer

    def captions(self, prompts: Sequence[Prompt]) -> list[str]:
        """The texts of `continued`."""
        return [self.text(ids) for ids in self.continued(prompts)]

    def continued(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The greedy continuation of each prompt up to the end of the text, or `tokens` tokens.

        Raises ConfigError if one may become longer than the model's learned positions.
        """
        most = self.opened.config.learned_positions
        longest = max((len(prompt.ids) for prompt in prompts), default=0) + self.tokens
        if most is not None and longest > most:
            raise ConfigError(
                f"a prompt and its caption may have {longest} tokens; expected at most ModelConfig.learned_positions = "
                f"{most}"
            )
        found: list[list[int]] = []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            filled = [*part, *[part[0]] * (self.batch - len(part))] if len(prompts) > self.batch else part
            batch = self._batch(filled)
            tokens_bt = np.asarray(self._program(self.opened.params, self.opened.buffers, batch))
            found += [self._until_end(tokens_t) for tokens_t in tokens_bt[: len(part)]]
        return found

    def text(self, ids: Sequence[int]) -> str:
        """Their text, without spaces around it."""
        return self.tokenizer.decode(list(ids)).strip()

    def _until_end(self, tokens_t: np.ndarray) -> list[int]:
        ends = np.flatnonzero(tokens_t == self.tokenizer.eos_id)
        return tokens_t[: ends[0] if len(ends) else None].tolist()

    def _batch(self, prompts: Sequence[Prompt]) -> Batch:
        """The prompts as rows that end together: what is in front of a row is padding."""
        longest = max(len(prompt.ids) for prompt in prompts)
        length = -(-longest // BUCKET) * BUCKET
        shape = (len(prompts), length)
        tokens_bt, segments_bt = np.full(shape, self.tokenizer.pad_id, np.int32), np.zeros(shape, np.int32)
        positions_bt, rows = np.zeros(shape, np.int32), []
        for row, prompt in enumerate(prompts):
            start, ids_t = length - len(prompt.ids), np.array(prompt.ids, np.int64)
            stands_t = np.flatnonzero(ids_t >= FIRST)
            rows.append([self._placed(start + int(t), int(ids_t[t]) - FIRST, prompt) for t in stands_t])
            tokens_bt[row, start:] = np.where(ids_t >= FIRST, self.token, ids_t)
            segments_bt[row, start:] = 1
            positions_bt[row, start:] = np.arange(len(ids_t))
        model = self.opened.config
        room = max(map(len, rows))
        batch = Batch(tokens_bt, segments_bt, positions_bt, np.zeros(shape, np.float32))
        shape = model.image_features, model.image_feature_size
        return with_images(batch, rows, room=room, shape=shape, caption_tokens=model.encoded_tokens)

    def _placed(self, position: int, image: int, prompt: Prompt) -> Placed:
        model, features_pv = self.opened.config, prompt.features[image]
        if model.retrieved_captions is None or model.caption_tokens is None:
            return Placed(position, features_pv)
        shape = model.retrieved_captions, model.caption_tokens
        return Placed(position, features_pv, chunks(prompt.captions.get(image, ()), shape, self.tokenizer))

    @cached_property
    def _program(self) -> Any:
        graph = self.opened.built.graph

        def run(params: Any, buffers: Any, batch: Batch) -> Array:
            return self._continue(nnx.merge(graph, params, buffers), batch)

        return jax.jit(run)

    def _continue(self, model: LanguageModel, batch: Batch) -> Array:
        """(b, tokens) int32: what follows, eos after the end."""
        plan, (rows, length) = self.opened.plan, batch.tokens_bt.shape
        dtype = model.embedding.weight.get_value().dtype
        started = model.backbone.start(Rows(rows, length + self.tokens), dtype)
        docs = Documents(jnp.asarray(batch.segments_bt), jnp.asarray(batch.positions_bt))
        step = partial(self._step, model)
        seen = model.given_images(batch.extras, plan)
        next_b, kept = step(jnp.asarray(batch.tokens_bt), docs, both(started, seen))
        # From here on every token sees the last image of its row.
        extras = {**batch.extras, IMAGE: batch.extras[IMAGE][:, -1:]}
        seen = model.given_images(extras, plan)

        def one(carry: Any, number: Array) -> tuple[Any, Array]:
            token_b, ended_b, kept = carry
            at_b = docs.positions_bt[:, -1] + 1 + number
            docs_b1 = Documents(jnp.ones((rows, 1), jnp.int32), at_b[:, None])
            next_b, kept = step(token_b[:, None], docs_b1, both(kept, seen))
            ended_b |= token_b == self.tokenizer.eos_id
            return (jnp.where(ended_b, self.tokenizer.eos_id, next_b), ended_b, kept), token_b

        start = next_b, jnp.zeros(rows, bool), kept
        _, tokens_tb = lax.scan(one, start, jnp.arange(self.tokens, dtype=jnp.int32))
        return tokens_tb.T

    def _step(self, model: LanguageModel, tokens_bt: Array, docs: Documents, given: Any) -> tuple[Array, Any]:
        """The most likely next token (b,) of each row, and the caches after it."""
        plan = self.opened.plan
        h_btd, kept = model.hidden(tokens_bt, docs, plan, given)
        logits_bv = model.project(plan.enter(h_btd[:, -1:]), plan)[:, 0]
        logits_bv = jnp.where(jnp.arange(logits_bv.shape[-1]) < self.tokenizer.vocab_size, logits_bv, -jnp.inf)
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), caches(kept)
