"""Sums over the documents of packed rows, the same under every plan: log-probabilities of answers, their lengths.

A loss that is not a sum over tokens, as one of whole answers or of pairs of them, needs such sums before it does
anything that is not linear. They are equal on all ranks that share a row, so they count once in a task's sums.

Letters: b batch (rows), t time of this rank, n documents of a row.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.data.packing import Batch
from orogen.model.heads import log_likelihoods
from orogen.model.lm import LanguageModel
from orogen.parallel.context import parts
from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like
from orogen.train.next_token import target_weights, targets


def most_documents(batch: Batch, plan: Plan) -> int:
    """How many documents of two tokens or more a row has room for."""
    return batch.tokens_bt.shape[1] * plan.size("context") // 2


@jax.named_scope("document_sums")
def document_sums(x_bt: Array, segments_bt: Array, plan: Plan, *, count: int) -> Array:
    """(b, n) float32: the sum of x over each of the first `count` documents of a row, 0 for documents that it lacks.

    x_bt: (b, t) of this device's rows and context rank, equal on the ranks of tensor. segments_bt: ids 1, 2, … along
    the whole row, as `layers.documents.numbered` gives them. The order of additions is fixed, on GPUs too: a scan
    within each of the rank's parts of the row, in which a document is one run, then the sum over parts and ranks.
    """
    x_pt, id_pt = (parts(a, plan) for a in (x_bt.astype(jnp.float32), segments_bt))
    change_pt = id_pt[:, 1:] != id_pt[:, :-1]
    first_pt, last_pt = (jnp.pad(change_pt, ((0, 0), pad), constant_values=True) for pad in ((1, 0), (0, 1)))
    _, sums_pt = lax.associative_scan(_then, (first_pt, x_pt), axis=1)
    # Each document ends at most once in a part, so that at most two numbers, and zeros, are added in any order.
    slot_pt = jnp.where(last_pt & (id_pt > 0), id_pt - 1, count)
    zeros_pn = vary_like(jnp.zeros((len(x_pt), count), jnp.float32), sums_pt)
    found_pn = jax.vmap(lambda zeros_n, slot_t, sums_t: zeros_n.at[slot_t].add(sums_t, mode="drop"))(
        zeros_pn, slot_pt, sums_pt
    )
    return plan.sum(found_pn.reshape(len(x_bt), -1, count).sum(1), "context")


def _then(before: tuple[Array, Array], after: tuple[Array, Array]) -> tuple[Array, Array]:
    """Sums of two neighbouring stretches of tokens, each from its last document's beginning or its own."""
    (begun, total), (begins, more) = before, after
    return begun | begins, jnp.where(begins, more, total + more)


def learned(batch: Batch, plan: Plan) -> Array:
    """(b, t) bool: whether the next token is one that the batch gives a weight."""
    return target_weights(batch, 0, plan) > 0


def answer_log_probs(h_btd: Array, model: LanguageModel, batch: Batch, plan: Plan, *, count: int) -> Array:
    """(b, n) float32: the log-probability of each document's learned tokens, given those before.

    h_btd: the backbone's final hidden states, as an objective gets them.
    """
    found_bt = log_likelihoods(h_btd, model, targets(batch, 0, plan), plan)
    said_bt = jnp.where(learned(batch, plan), found_bt, 0)
    return document_sums(said_bt, batch.segments_bt, plan, count=count)


def answer_lengths(batch: Batch, plan: Plan, *, count: int) -> Array:
    """(b, n) float32: the number of each document's learned tokens."""
    return document_sums(learned(batch, plan), batch.segments_bt, plan, count=count)
