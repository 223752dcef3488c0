"""Loss and gradient of a model that every device runs from its first layer to its last.

Letters: m microbatches, b batch, t time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from orogen.data.packing import Batch
from orogen.model.lm import LanguageModel
from orogen.parallel import placement
from orogen.parallel.target import platform
from orogen.parallel.varying import vary_like
from orogen.precision.policy import working_copy
from orogen.train.formats import counting
from orogen.train.loss import Assigned, Counts, Sums, assignments, loss_share
from orogen.train.task import Computation


class WholePass:
    """Runs a whole model over a batch (m, b, t), on one device of a plan, inside `Plan.run`; the counterpart of
    `Pipeline`.

    replay: choices (m, …) to use in place of the routers' own. record: whether every token's choice is reported.
    assigned: the assignments of all microbatches, as the method `assigned` returns them. carried: the states that each
    microbatch continues, as `carry.parts` gives them; None: every sequence starts afresh.
    """

    def __init__(
        self, graph: nnx.GraphDef, computation: Computation, batch: Batch, counts: Counts, buffers: Any, *,
        replay: Any = None, record: bool = False, assigned: Assigned | None = None, carried: Any = None,
    ):  # fmt: skip
        self.graph = graph
        self.objective, self.config, self.plan, self.dtype = computation
        self.counts, self.buffers, self.record, self.known = counts, buffers, record, assigned
        self.inputs = batch, replay, carried
        self.parts = len(batch.tokens_bt)

    def gradients(self, params: Any) -> tuple[Array, Any, Sums]:
        """Loss, gradients and Sums of this device, summed over microbatches; gradients are scattered if `fsdp` is
        `gradients`."""
        scattered = self.plan.config.fsdp == "gradients"

        def gradient(*arguments):
            result, grads = jax.value_and_grad(self._share, has_aux=True)(*arguments)
            return result, placement.scatter_gradients(grads, self.plan) if scattered else grads

        # Parameters are marked varying here, so gradients sum over this device's tokens alone. They are summed over
        # devices once per step or, if a device keeps only the shard that it stores, once per microbatch.
        varied = self.plan.vary(params)
        if self.parts == 1:
            (loss, sums), grads = gradient(varied, *jax.tree.map(lambda x: x[0], self.inputs))
            return loss, grads, sums._replace(**jax.tree.map(lambda x: x[None], _of_each(sums)))
        # On XLA:CPU, no collective may run concurrently with a loop that contains some (parallel/runtime.py), and it
        # removes barriers before it schedules a program. So several CPU devices run microbatches in turn.
        in_turn = platform() == "cpu" and self.plan.config.devices > 1
        interleave = 1 if in_turn else self.plan.config.overlapping
        (loss, sums, grads), of_each = _accumulated(gradient, varied, self.inputs, interleave=interleave)
        return loss, grads, sums._replace(**of_each)

    def metrics(self, params: Any) -> Any:
        """The objective's sums, by forward passes alone."""
        return self._summed(lambda *inputs: self._share(params, *inputs)[1].metrics)

    def assigned(self, params: Any) -> Assigned:
        """The assignments per expert of each use of an MoE layer, by forward passes alone."""
        deeper = self.objective.deeper
        params, _ = counting(params)

        def assigned_by(part, replay, carried):
            plan = self.plan.on_tokens(part.extras)
            return assignments(self._model(params), part, plan, deeper=deeper, replay=replay, carried=carried)

        return self._summed(assigned_by)

    def _share(self, params: Any, part: Batch, replay: Any, carried: Any) -> tuple[Array, Sums]:
        params, probe_l = counting(params)
        loss, sums = loss_share(
            self._model(params), part, self.counts, objective=self.objective, config=self.config,
            plan=self.plan.on_tokens(part.extras, probe_l), replay=replay, assigned=self.known, carried=carried,
        )  # fmt: skip
        return loss, sums if self.record else sums._replace(choices=())

    def _model(self, params: Any) -> LanguageModel:
        return nnx.merge(self.graph, working_copy(params, self.dtype), self.buffers)

    def _summed(self, function: Callable) -> Any:
        """The sum of the function's results over microbatches."""
        first, rest = (jax.tree.map(lambda x, i=i: x[i], self.inputs) for i in (0, slice(1, None)))
        if self.parts == 1:
            return function(*first)
        add = lambda total, part: (jax.tree.map(jnp.add, total, function(*part)), None)  # noqa: E731
        return lax.scan(add, function(*first), rest)[0]


def _of_each(sums: Sums) -> dict[str, Any]:
    """What is kept per microbatch instead of summed."""
    return {"choices": sums.choices, "carried": sums.carried}


def _accumulated(gradient: Callable, varied: Any, inputs: Any, *, interleave: int) -> tuple[Any, dict[str, Any]]:
    """Loss, Sums and gradients, float32, summed over microbatches; and what is kept of each microbatch. interleave:
    microbatches per iteration of the loop."""
    gradient = jax.jit(gradient)  # so that finding the shapes of its results takes no second trace

    def split(*arguments):
        (loss, sums), grads = gradient(*arguments)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return (loss, sums._replace(choices=(), carried=None), grads), _of_each(sums)

    def body(total, part):
        added, of_each = split(varied, *part)
        return jax.tree.map(jnp.add, total, added), of_each

    first = jax.tree.map(lambda x: x[0], inputs)
    made, _ = jax.eval_shape(split, varied, *first)
    # The loop starts from zeros, not from the first microbatch's sums, so the model is compiled only once.
    zeros = jax.tree.map(lambda x: vary_like(jnp.zeros(x.shape, x.dtype), x), made)
    return lax.scan(body, zeros, inputs, unroll=interleave)
