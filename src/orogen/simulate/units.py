"""Parts of a training step as functions of abstract arguments, to be traced or compiled on their own.

A *unit* is the forward and backward pass, gradient sums over devices included, of one layer of a pattern letter, or of
OUTER: embedding, final norm, head and loss.

Letters: b batch, t time, d model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from orogen.config.model import ModelConfig
from orogen.cost.ledger import OUTER, Workload
from orogen.cost.weights import changed
from orogen.data.packing import Batch
from orogen.layers.documents import Documents
from orogen.model.block import Stack
from orogen.model.heads import token_nats
from orogen.model.lm import LanguageModel
from orogen.model.vocabulary import resized
from orogen.moe.layer import MoEStats
from orogen.parallel import placement
from orogen.parallel.axes import TOKENS
from orogen.parallel.plan import Plan
from orogen.precision.policy import DTYPES, working_copy
from orogen.train.loss import batch_counts
from orogen.train.next_token import NEXT_TOKEN, target_weights, targets
from orogen.train.step import BATCH_AXES


class Unit(NamedTuple):
    """A part of the step: a function, its abstract arguments, and the shardings of arguments and results."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    shardings: Any
    out_shardings: Any


def unit_of(letter: str, model: ModelConfig, plan: Plan, work: Workload, *, dtype: str = "float32") -> Unit:
    """The unit of a letter of the pattern under the plan's own recipe, or of OUTER without the deeper predictions of
    MTP."""
    model, plan = without_mtp(model), plan.with_recipes(None)
    return _outer(model, plan, work, dtype) if letter == OUTER else _layer(letter, model, plan, work, dtype)


def without_mtp(model: ModelConfig) -> ModelConfig:
    """The model that predicts only the next token."""
    return dataclasses.replace(model, pattern=model.pattern.split("/")[0], mtp_depths=0)


def _layer(letter: str, model: ModelConfig, plan: Plan, work: Workload, dtype: str) -> Unit:
    graph, params, buffers = _abstract(lambda: Stack((letter,), model, nnx.Rngs(0)))

    def device_step(params, buffers, x_btd, cotangent_btd, docs):
        varied = plan.vary(params)

        def apply(params, x_btd):
            y_btd, stats = nnx.merge(graph, working_copy(params, dtype), buffers)(x_btd, docs, plan)
            found = jax.tree.leaves(stats, is_leaf=lambda s: isinstance(s, MoEStats))
            losses = [plan.total((s.losses.balance, s.losses.z)) for s in found if isinstance(s, MoEStats)]
            return y_btd, losses

        (y_btd, losses), back = jax.vjp(apply, varied, x_btd)
        grads, grad_x_btd = back((cotangent_btd, jax.tree.map(jnp.ones_like, losses)))
        return y_btd, grad_x_btd, _reduced(grads, plan), losses

    x_btd = _stream(plan, work, model, dtype)
    docs, own, residual, whole = _documents(plan, work), *_specs(plan)
    return _unit(
        device_step,
        plan,
        (params, buffers, x_btd, x_btd, docs),
        (plan.specs(params), plan.specs(buffers), residual, residual, own),
        (residual, residual, placement.stored_specs(params, plan), whole),
    )


def _outer(model: ModelConfig, plan: Plan, work: Workload, dtype: str) -> Unit:
    graph, params, _ = _abstract(lambda: _without_layers(model))
    params = jax.eval_shape(lambda p: resized(p, plan.config.vocab_rows(model.vocab_size)), params)

    def device_step(params, h_btd, cotangent_btd, batch):
        docs = Documents(batch.segments_bt, batch.positions_bt)
        counts = batch_counts(batch, NEXT_TOKEN, 0, plan)
        varied = plan.vary(params)

        def apply(params, h_btd):
            outer = nnx.merge(graph, working_copy(params, dtype))
            nats = token_nats(
                outer.norm(h_btd, plan), outer, targets(batch, 0, plan), target_weights(batch, 0, plan), plan
            )
            return outer.embedding(batch.tokens_bt, docs, plan), plan.total(nats)

        (x_btd, nats), back = jax.vjp(apply, varied, h_btd)
        grads, grad_h_btd = back((cotangent_btd, jnp.ones_like(nats)))
        return x_btd, grad_h_btd, _reduced(grads, plan), (counts, nats)

    h_btd = _stream(plan, work, model, dtype)
    docs, own, residual, whole = _documents(plan, work), *_specs(plan)
    weights_bt = jax.ShapeDtypeStruct(docs.segments_bt.shape, jnp.float32)
    batch = Batch(docs.segments_bt, docs.segments_bt, docs.positions_bt, weights_bt)
    return _unit(
        device_step,
        plan,
        (params, h_btd, h_btd, batch),
        (plan.specs(params), residual, residual, own),
        (residual, residual, placement.stored_specs(params, plan), whole),
    )


def _without_layers(model: ModelConfig) -> LanguageModel:
    """The model with an empty backbone."""
    found = LanguageModel(changed(model, pattern=model.layers.main[0]), nnx.Rngs(0))
    found.backbone = Stack((), model, nnx.Rngs(0))
    return found


def _unit(device_step: Callable, plan: Plan, arguments: tuple[Any, ...], inputs: Any, outputs: Any) -> Unit:
    """`device_step(params, ...) -> (_, _, grads, _)` with parameters and gradients sharded as between steps."""
    run = plan.run(device_step, inputs=inputs, outputs=outputs)
    params = arguments[0]
    stored = placement.shardings(params, plan)

    def function(params, *others):
        return run(placement.working(params, plan), *others)

    placed = jax.tree.map(lambda spec: jax.sharding.NamedSharding(plan.mesh, spec), (inputs[1:], outputs))
    first, second, _, last = placed[1]
    return Unit(function, arguments, (stored, *placed[0]), (first, second, stored, last))


def _abstract(make: Callable[[], nnx.Module]) -> tuple[Any, Any, Any]:
    graph, params, *others = nnx.split(jax.eval_shape(make), nnx.Param, ...)
    return graph, params, others[0]


def _length(plan: Plan, work: Workload) -> int:
    return plan.config.context * work.tokens


def _reduced(grads: Any, plan: Plan) -> Any:
    return placement.sum_gradients(placement.scatter_gradients(grads, plan), plan)


def _stream(plan: Plan, work: Workload, model: ModelConfig, dtype: str) -> Any:
    """The residual stream of all devices, split as TOKENS are. Where each rank of `tensor` holds all of it, the copies
    lie side by side along time: as one replicated array they would have to be proved equal."""
    sequences, time = plan.stream_shape(work.rows, work.tokens)
    shape = plan.config.data * sequences, plan.size(TOKENS[1]) * time, model.hidden_size
    return jax.ShapeDtypeStruct(shape, DTYPES[dtype])


def _documents(plan: Plan, work: Workload) -> Documents:
    tokens_bt: Any = jax.ShapeDtypeStruct((plan.config.data * work.rows, _length(plan, work)), jnp.int32)
    return Documents(tokens_bt, tokens_bt)


def _specs(plan: Plan) -> tuple[Any, Any, Any]:
    """The specs of a batch's integers, of the residual stream, and of replicated arrays."""
    return plan.spec(*BATCH_AXES), plan.spec(*TOKENS, None), plan.spec()
