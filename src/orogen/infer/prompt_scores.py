"""Log-probabilities of a prompt's own tokens, from the hidden states of its pieces.

A program of their own computes them after the one that reads the prompt. So requests that want none compute no logits
of their prompts, and share all their programs with requests that do. The cost: the reading program also returns hidden
states, rows x time x width, and warming an engine compiles a scorer for each shape of a piece.

Letters: b rows, t time, d model, n tokens of a span, v vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.infer.forward import Report
from orogen.infer.request import MOST_LOGPROBS
from orogen.infer.sampling import reported
from orogen.model.lm import LanguageModel
from orogen.parallel.context import own, whole
from orogen.parallel.plan import Plan

SPAN = 512  # tokens whose logits are held at a time


def score(model: LanguageModel, plan: Plan, h_btd: Array, next_bt: Array, *, is_token_v: Array) -> Report:
    """What is reported of the tokens (b, t) that follow those of a piece; NONE where none is wanted.

    h_btd: the piece's final hidden states, as the residual stream is laid out. next_bt and the report are whole on
    every rank.
    """
    h_btd, own_bt = plan.enter(h_btd), own(next_bt, plan)
    rows, time = own_bt.shape
    width = max(1, min(time, SPAN // rows))
    spans = -(-time // width)

    def apart(a: Array) -> Array:
        padded = jnp.pad(a, ((0, 0), (0, spans * width - time), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(padded.reshape(rows, spans, width, *a.shape[2:]), 1, 0).reshape(spans, -1, *a.shape[2:])

    def together(a: Array) -> Array:
        by_row = jnp.moveaxis(a.reshape(spans, rows, width, *a.shape[2:]), 0, 1)
        return whole(by_row.reshape(rows, -1, *a.shape[2:])[:, :time], plan)

    def one(inputs: tuple[Array, Array]) -> Report:
        h_nd, next_n = inputs
        logits_nv = model.project(h_nd[None], plan)[0]
        return Report(next_n, *reported(logits_nv, jnp.maximum(next_n, 0), is_token_v, MOST_LOGPROBS))

    return jax.tree.map(together, lax.map(one, plan.vary((apart(h_btd), apart(own_bt)))))
