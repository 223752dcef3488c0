"""Scores given tokens: logits of every position and the log-probability of each next token.

Letters: b batch, t time, v vocabulary.
"""

import tokenize
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.layers.documents import documents

# Rows are scored together up to this many tokens.
TOKENS_AT_ONCE = 8192


def score(opened: Opened, tokens_bt: np.ndarray, segments_bt: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """`logits` (b, t, v) and `logprobs` (b, t-1), float32; logprobs[:, i] is of token i + 1, given those before it.

    segments_bt: documents of each row, 0 for padding, which may be anywhere; None: a row is one document. A logprob
    is 0 where token i + 1 does not follow token i in one document. Raises ConfigError for tokens or segments of a wrong
    shape, kind or range.
    """
    opened.require_one_device()
    segments_bt = np.ones(tokens_bt.shape, np.int32) if segments_bt is None else segments_bt
    _check(opened, tokens_bt, segments_bt)
    rows = max(1, TOKENS_AT_ONCE // max(1, tokens_bt.shape[1]))
    parts = [
        jax.device_get(
            _score(
                opened.params,
                opened.buffers,
                tokens_bt[first : first + rows].astype(np.int32),
                segments_bt[first : first + rows].astype(np.int32),
                graph=opened.built.graph,
                plan=opened.plan,
            )
        )
        for first in range(0, len(tokens_bt), rows)
    ]
    logits_btv, logprobs_bt = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return {"logits": logits_btv, "logprobs": logprobs_bt}


def read_array(file: Path) -> np.ndarray:
    """The array of a .npy file. Raises ConfigError if it holds none, OSError if it cannot be read."""
    try:
        # Mapped first: a header may state a shape that exceeds the memory, and that the file does not have.
        array = np.load(file, allow_pickle=False, mmap_mode="r")
    except (ValueError, EOFError, OverflowError, SyntaxError, zipfile.BadZipFile, tokenize.TokenError) as error:
        reason = str(error.args[0]) if isinstance(error, tokenize.TokenError) else str(error)
        raise ConfigError(f"{file}: {reason}; expected a .npy file") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ConfigError(f"{file} holds several arrays; expected a .npy file")
    return np.array(array)


def write_arrays(file: Path, arrays: dict[str, Any]) -> None:
    """Writes a .npz file, whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, **arrays)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _check(opened: Opened, tokens_bt: np.ndarray, segments_bt: np.ndarray) -> None:
    size = opened.config.vocab_size
    for name, array in (("tokens", tokens_bt), ("segments", segments_bt)):
        if array.ndim != 2 or array.dtype.kind not in "iu" or not array.size:
            raise ConfigError(f"{name} are {array.dtype} {list(array.shape)}; expected integers (batch, time)")
    if segments_bt.shape != tokens_bt.shape:
        raise ConfigError(f"segments are {list(segments_bt.shape)}; expected {list(tokens_bt.shape)}, as the tokens")
    if not 0 <= tokens_bt.min() <= tokens_bt.max() < size:
        raise ConfigError(f"tokens are from {tokens_bt.min()} to {tokens_bt.max()}; expected 0 to {size - 1}")
    if not 0 <= segments_bt.min() <= segments_bt.max() < 2**31:
        raise ConfigError(f"segments are from {segments_bt.min()} to {segments_bt.max()}; expected 0 to 2**31 - 1")
    longest = opened.config.learned_positions
    if longest is not None and tokens_bt.shape[1] > longest:
        raise ConfigError(f"tokens are {tokens_bt.shape[1]} long; expected at most learned_positions = {longest}")


@partial(jax.jit, static_argnames=("graph", "plan"))
def _score(params, buffers, tokens_bt, segments_bt, *, graph, plan) -> tuple[Array, Array]:
    logits_btv = nnx.merge(graph, params, buffers).logits(tokens_bt, documents(segments_bt), plan)
    likelihood_btv = jax.nn.log_softmax(logits_btv[:, :-1])
    chosen_bt = jnp.take_along_axis(likelihood_btv, tokens_bt[:, 1:, None], axis=-1)[..., 0]
    follows_bt = (segments_bt[:, 1:] == segments_bt[:, :-1]) & (segments_bt[:, 1:] != 0)
    return logits_btv, jnp.where(follows_bt, chosen_bt, 0)
