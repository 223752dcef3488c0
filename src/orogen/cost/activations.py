"""What a layer keeps for its backward pass, by name: the residuals of its `jax.vjp` on one device, read from the trace.

Letters: b batch, t time, d model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.extend import core

from orogen.config.model import ModelConfig
from orogen.cost.ledger import Workload
from orogen.layers.documents import Documents
from orogen.model.block import Stack
from orogen.moe.layer import MoEStats
from orogen.parallel.axes import STREAM
from orogen.parallel.plan import Plan
from orogen.precision.policy import DTYPES, working_copy

# Names for arrays without one: computed from activations, from documents alone, or from weights alone.
UNNAMED, DOCUMENTS, WEIGHTS = "unnamed", "documents", "weights"
# Operations whose result has the bytes of their operand; XLA allocates no second array for them.
SAME = ("reshape", "reduce_precision", "pvary", "pcast", "squeeze", "expand_dims", "copy", "copy_p", "device_put")


class Kept(NamedTuple):
    """An array that a layer keeps: its name, or UNNAMED, DOCUMENTS or WEIGHTS; the operation that made it; its bytes;
    and whether it lies in the host's memory."""

    name: str
    operation: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    host: bool


def kept_by_layer(letter: str, model: ModelConfig, plan: Plan, work: Workload, *, dtype: str) -> list[Kept]:
    """The arrays that one device keeps for one layer, with the plan's own recipe, and one microbatch, each once.

    Nothing is allocated. The weights' working copies and the documents, which a device holds once for all layers, are
    not among them. WEIGHTS are computed from weights: gathered copies of those that FSDP shards, or casts.
    """
    graph, params, buffers = _split(letter, model)
    plan = plan.with_recipes(None)
    params = jax.eval_shape(lambda p: working_copy(p, dtype), params)

    def residuals(params, buffers, x_btd, docs):
        def apply(params, x_btd):
            y_btd, stats = nnx.merge(graph, params, buffers)(x_btd, docs, plan)
            found = jax.tree.leaves(stats, is_leaf=lambda s: isinstance(s, MoEStats))
            return y_btd, [plan.total((s.losses.balance, s.losses.z)) for s in found if isinstance(s, MoEStats)]

        back = jax.vjp(apply, plan.vary(params), x_btd)[1]
        return [leaf.reshape(1, 1, -1) for leaf in jax.tree.leaves(back)]

    batch, length = plan.config.data * work.rows, plan.config.context * work.tokens
    x_btd = jax.ShapeDtypeStruct((batch, length, model.hidden_size), DTYPES[dtype])
    docs_bt: Any = jax.ShapeDtypeStruct((batch, length), "int32")
    arguments = (params, buffers, x_btd, Documents(docs_bt, docs_bt))
    specs = plan.specs(params), plan.specs(buffers), plan.spec(*STREAM, None), plan.spec("batch", "context")
    run = plan.run(residuals, inputs=specs, outputs=plan.spec("batch", "context", "tensor"))
    counts = [len(jax.tree.leaves(argument)) for argument in arguments]
    kinds = [kind for kind, n in zip((WEIGHTS, WEIGHTS, "input", DOCUMENTS), counts, strict=True) for _ in range(n)]
    return list(_kept(*_shard_body(jax.make_jaxpr(run)(*arguments).jaxpr, kinds)))


def bytes_by_name(kept: Sequence[Kept]) -> dict[str, int]:
    """Bytes of each name, largest first; WEIGHTS, which are not activations, come last."""
    total: dict[str, int] = {}
    for array in kept:
        total[array.name] = total.get(array.name, 0) + array.bytes
    return dict(sorted(total.items(), key=lambda item: (item[0] == WEIGHTS, -item[1])))


def activation_bytes(kept: Sequence[Kept]) -> int:
    """Bytes of the arrays that are computed from activations or documents."""
    return sum(array.bytes for array in kept if array.name != WEIGHTS)


def _split(letter: str, model: ModelConfig) -> tuple[Any, Any, Any]:
    graph, params, *others = nnx.split(jax.eval_shape(lambda: Stack((letter,), model, nnx.Rngs(0))), nnx.Param, ...)
    return graph, params, others[0]


def _shard_body(jaxpr: core.Jaxpr, kinds: Sequence[str]) -> tuple[core.Jaxpr, list[str]]:
    """The body of the one shard_map, and the kinds of its arguments; constants may precede them."""
    (equation,) = (e for e in jaxpr.eqns if e.primitive.name == "shard_map")
    body: Any = equation.params["jaxpr"]
    kinds_of = dict(zip(jaxpr.invars, kinds, strict=True))
    return body, [kinds_of.get(v, WEIGHTS) if isinstance(v, core.Var) else WEIGHTS for v in equation.invars]


class _Origin(NamedTuple):
    """Where an array comes from: the outer jaxpr's variable that holds it, its name if any, and the operation."""

    variable: Any
    name: str | None
    operation: str


def _kept(jaxpr: core.Jaxpr, kinds: Sequence[str]) -> Iterator[Kept]:
    kinds_of = _kinds(jaxpr, kinds)
    makers = {v: e for e in jaxpr.eqns for v in e.outvars}
    seen = set()
    for output in jaxpr.outvars:
        origin = _origin(output, makers, jaxpr)
        if not isinstance(origin.variable, core.Var) or origin.variable in seen:
            continue
        seen.add(origin.variable)
        kind = kinds_of.get(origin.variable, WEIGHTS)
        argument = origin.variable in jaxpr.invars
        if argument and kind != "input":
            continue
        aval: Any = output.aval
        name = origin.name or {"input": "input" if argument else UNNAMED}.get(kind, kind)
        shape = getattr(origin.variable.aval, "shape", ())
        size = math.prod(aval.shape) * aval.dtype.itemsize
        yield Kept(name, origin.operation, shape, str(aval.dtype), size, aval.memory_space.name == "Host")


def _kinds(jaxpr: core.Jaxpr, kinds: Sequence[str]) -> dict[Any, str]:
    """What each variable is computed from: the input if any operand is, else documents if any is, else weights."""
    order = ("input", DOCUMENTS, WEIGHTS)
    found = dict(zip(jaxpr.invars, kinds, strict=True)) | dict.fromkeys(jaxpr.constvars, DOCUMENTS)
    for equation in jaxpr.eqns:
        inputs = {found.get(v, WEIGHTS) for v in equation.invars if isinstance(v, core.Var)}
        kind = next((k for k in order if k in inputs), WEIGHTS)
        found |= dict.fromkeys(equation.outvars, kind)
    return found


def _origin(variable: Any, makers: Mapping[Any, core.JaxprEqn], jaxpr: core.Jaxpr) -> _Origin:
    """Follows `variable` back through operations that only pass it on, to a variable of `jaxpr`."""
    equation = makers.get(variable) if isinstance(variable, core.Var) else None
    if equation is None:
        return _Origin(variable, None, "argument")
    operation = equation.primitive.name
    if operation == "name":
        return _Origin(variable, equation.params["name"], operation)
    if operation in SAME:
        return _origin(equation.invars[0], makers, jaxpr)
    body = _body(equation)
    if body is None:
        return _Origin(variable, None, operation)
    inner = _origin(body.outvars[equation.outvars.index(variable)], {v: e for e in body.eqns for v in e.outvars}, body)
    if inner.variable in body.invars and operation != "scan":
        return _origin(equation.invars[body.invars.index(inner.variable)], makers, jaxpr)
    return _Origin(variable, inner.name, inner.operation)


def _body(equation: core.JaxprEqn) -> core.Jaxpr | None:
    """The jaxpr that an operation runs on its own operands, if it runs one. That of a kernel writes to references, and
    has no results."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        found: Any = equation.params.get(key)
        body = found.jaxpr if isinstance(found, core.ClosedJaxpr) else found
        if body is not None and len(body.outvars) == len(equation.outvars):
            return body
    return None
