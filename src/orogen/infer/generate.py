"""Samples text, recomputing the whole sequence for every token: slow and plainly correct.

Letters: b batch, t time, v vocabulary.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.run import MAX_LENGTH
from orogen.infer.knobs import Features, Knobs, features_of, knobs_of
from orogen.infer.request import SEEDS, Request, Sampling
from orogen.infer.sampling import Rows, choose, rows_of
from orogen.layers.documents import documents

# Sequences are padded to a multiple of this, so that prompts of different lengths share a compiled program.
BUCKET = 64


def generate(
    opened: Opened, prompts: Sequence[str], *, tokens: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
) -> list[str]:
    """Continuations of `prompts`, each up to `tokens` tokens or the first that ends a text.

    The tokenizer's folder decides what is put around a prompt; rows of the vocabulary without a token are not sampled.
    Raises ConfigError for a model without a tokenizer, and if prompt and continuation have more than MAX_LENGTH tokens
    or need more positions than the model has learned.
    """
    opened.require_one_device()
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise ConfigError("the checkpoint has no tokenizer.json; expected one, to read the prompt with")
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts]
    lengths_b = np.array([len(i) for i in ids])
    if tokens > MAX_LENGTH - int(lengths_b.max()):
        raise ConfigError(
            f"a prompt of {lengths_b.max()} tokens and {tokens} new ones; expected at most {MAX_LENGTH} in all"
        )
    positions = opened.config.learned_positions
    if positions is not None and lengths_b.max() + tokens > positions:
        raise ConfigError(
            f"a prompt of {lengths_b.max()} tokens and {tokens} new ones; expected at most "
            f"ModelConfig.learned_positions = {positions}"
        )
    length = -(-(int(lengths_b.max()) + tokens) // BUCKET) * BUCKET
    tokens_bt = np.full((len(ids), length), tokenizer.pad_id, np.int32)
    for row, i in zip(tokens_bt, ids, strict=True):
        row[: len(i)] = i
    is_token_v = np.zeros(opened.config.vocab_size, bool)
    is_token_v[: tokenizer.vocab_size] = tokenizer.is_token_v
    # Rows with one prompt are drawn apart.
    samplings = [Sampling(temperature=temperature, top_p=top_p, seed=(seed + row) % SEEDS) for row in range(len(ids))]
    requests = [Request(prompt=tuple(i), max_tokens=tokens, sampling=s) for i, s in zip(ids, samplings, strict=True)]
    features = features_of(requests)
    continued_bt = np.asarray(
        _continue(
            opened.params,
            opened.buffers,
            tokens_bt,
            lengths_b,
            is_token_v,
            knobs=knobs_of(requests, features),
            features=features,
            steps=tokens,
            graph=opened.built.graph,
            plan=opened.plan,
        )
    )
    texts = []
    for row, prompt in zip(continued_bt, ids, strict=True):
        new = row[len(prompt) : len(prompt) + tokens].tolist()
        texts.append(tokenizer.decode(itertools.takewhile(lambda i: i not in tokenizer.end_ids, new), after=prompt))
    return texts


@partial(jax.jit, static_argnames=("features", "steps", "graph", "plan"))
def _continue(
    params, buffers, tokens_bt, lengths_b, is_token_v, *, knobs: Knobs, features: Features, steps, graph, plan
) -> Array:
    model = nnx.merge(graph, params, buffers)
    rows = jnp.arange(tokens_bt.shape[0])

    def extend(step: Array, state: tuple[Array, Rows]) -> tuple[Array, Rows]:
        tokens_bt, state_b = state
        last_b = lengths_b + step - 1
        segments_bt = (jnp.arange(tokens_bt.shape[1]) <= last_b[:, None]).astype(jnp.int32)
        h_btd, _ = model.hidden(tokens_bt, documents(segments_bt), plan)
        logits_bv = model.project(h_btd[rows, last_b][:, None], plan)[:, 0]
        choice, state_b = choose(logits_bv, knobs, state_b, features, is_token_v=is_token_v)
        return tokens_bt.at[rows, last_b + 1].set(choice.token_b), state_b

    started = rows_of([None] * len(tokens_bt), features, vocab_size=len(is_token_v))
    return lax.fori_loop(0, steps, extend, (tokens_bt, jax.tree.map(jnp.asarray, started)))[0]
