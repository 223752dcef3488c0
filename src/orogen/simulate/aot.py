"""Traces and compiles parts of a training step on a plan, to read what they cost: collectives and matrix products.

A *unit* is one layer of a letter of the pattern, or the ends of the model (embedding, final norm, head and loss):
forward and backward pass, with its parameters' gradients summed. Nothing is allocated and nothing runs; compiling needs
as many devices as the plan, which may be simulated. Compile in float32: XLA:CPU carries bfloat16 collectives as
float32.

Letters: b batch, t time, d model.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.extend import core

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.data.packing import Batch
from orogen.layers.documents import Documents
from orogen.layers.embedding import Embedding, Head
from orogen.layers.norm import make_norm
from orogen.model.block import Stack
from orogen.model.heads import token_nats
from orogen.model.lm import build
from orogen.model.stages import Stages
from orogen.model.vocabulary import resized
from orogen.moe.layer import MoEStats
from orogen.parallel.mesh import fold_plan
from orogen.parallel.pipeline import branches_ts
from orogen.parallel.plan import Plan, make_plan, single_device_plan
from orogen.precision.policy import DTYPES, working_copy
from orogen.simulate.communication import unit_collectives
from orogen.simulate.hlo import Table, Traffic, add, hlo_collectives
from orogen.simulate.ledger import ENDS, FLOAT32, Collective, Workload, sent_bytes
from orogen.train.assemble import layout
from orogen.train.loss import batch_counts
from orogen.train.next_token import NEXT_TOKEN, NEXT_TOKENS, target_weights, targets
from orogen.train.step import BATCH_AXES, gradients

# JAX primitives that communicate, by the HLO operation that each becomes.
PRIMITIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
    "ragged_all_to_all": "ragged-all-to-all",
}
RAGGED = PRIMITIVES["ragged_all_to_all"]


class Unit(NamedTuple):
    """A part of the step: a function of abstract arguments, and where these and its results live."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    shardings: Any
    out_shardings: Any


def table_of(collectives: Iterable[Collective], config: PlanConfig, model: ModelConfig) -> Table:
    """The analytic records as a table over mesh axes, for comparison with a trace or a program."""
    folding, table = fold_plan(config, model), {}
    for record in collectives:
        axes = {name for axis in record.axes for name in folding.logical[axis]}
        key = record.operation, tuple(name for name, _ in folding.axes if name in axes)
        add(table, key, record.count, record.bytes)
    return table


def traced(unit: Unit, plan: Plan) -> Table:
    """The collectives of `unit` as written, from its jaxpr: those inside `Plan.run`."""
    return jaxpr_collectives(_jaxpr(unit), dict(plan.mesh.shape))


def compiled(unit: Unit, plan: Plan) -> Table:
    """The collectives of `unit` as XLA compiles it for the plan's devices."""
    function = jax.jit(unit.function, in_shardings=unit.shardings, out_shardings=unit.out_shardings)
    text = function.lower(*unit.arguments).compile().as_text()
    return hlo_collectives(text or "", dict(plan.mesh.shape))


def compare(model: ModelConfig, config: PlanConfig, work: Workload, letters: Iterable[str]) -> dict[str, Any]:
    """{unit: one row per operation over the same mesh axes, with analytic and compiled count and bytes}, in float32,
    for one microbatch; for a pipeline, on the devices of one stage."""
    config = dataclasses.replace(config, stage=1, microbatches=1)
    model, work, facts = without_mtp(model), work._replace(itemsize=FLOAT32), {}
    plan = make_plan(config, model)
    for letter in (*letters, ENDS):
        paper = table_of(unit_collectives(letter, model, config, work), config, model)
        program = compiled(unit_of(letter, model, plan, work), plan)
        none = Traffic(0, 0)
        facts[letter] = [
            {
                "operation": operation,
                "mesh_axes": list(axes),
                "paper": paper.get((operation, axes), none)._asdict(),
                "compiled": program.get((operation, axes), none)._asdict(),
            }
            for operation, axes in sorted(paper.keys() | program.keys())
        ]
    return facts


def compared_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `compare` for a person."""
    lines = ["compiled in float32: collectives and bytes per layer, analytic and compiled"]
    for unit, rows in facts.items():
        for row in rows:
            paper, program = (row[name] for name in ("paper", "compiled"))
            sizes = f"{paper['count']:>4} {paper['bytes']:>14,.0f}  {program['count']:>4} {program['bytes']:>14,.0f}"
            lines.append(f"{unit:5} {row['operation']:18} {' x '.join(row['mesh_axes']):28} {sizes}")
    return lines


# Units


def unit_of(letter: str, model: ModelConfig, plan: Plan, work: Workload, *, dtype: str = "float32") -> Unit:
    """The unit of a letter of the pattern, or of ENDS at the first depth, without the deeper ones."""
    model = without_mtp(model)
    return _ends(model, plan, work, dtype) if letter == ENDS else _layer(letter, model, plan, work, dtype)


def without_mtp(model: ModelConfig) -> ModelConfig:
    """The model that predicts the next token alone."""
    return dataclasses.replace(model, pattern=model.pattern.split("/")[0], mtp_depths=0)


def _layer(letter: str, model: ModelConfig, plan: Plan, work: Workload, dtype: str) -> Unit:
    graph, params, buffers = _abstract(lambda: Stack((letter,), model, nnx.Rngs(0)))

    def device_step(params, buffers, x_btd, cotangent_btd, docs):
        varied = plan.vary(params)

        def apply(params, x_btd):
            y_btd, stats = nnx.merge(graph, working_copy(params, dtype), buffers)(x_btd, docs, plan)
            found = jax.tree.leaves(stats, is_leaf=lambda s: isinstance(s, MoEStats))
            losses = [plan.total((s.losses.balance, s.losses.z)) for s in found]
            return y_btd, losses

        (y_btd, losses), back = jax.vjp(apply, varied, x_btd)
        grads, grad_x_btd = back((cotangent_btd, jax.tree.map(jnp.ones_like, losses)))
        return y_btd, grad_x_btd, plan.sum_gradients(plan.scatter_gradients(grads)), losses

    x_btd = jax.ShapeDtypeStruct((plan.config.data * work.rows, _length(plan, work), model.hidden_size), DTYPES[dtype])
    docs, own, residual, whole = _documents(plan, work), *_specs(plan)
    return _unit(
        device_step,
        plan,
        (params, buffers, x_btd, x_btd, docs),
        (plan.specs(params), plan.specs(buffers), residual, residual, own),
        (residual, residual, plan.stored_specs(params), whole),
    )


def _ends(model: ModelConfig, plan: Plan, work: Workload, dtype: str) -> Unit:
    graph, params, _ = _abstract(lambda: _Ends(model, nnx.Rngs(0)))
    params = jax.eval_shape(lambda p: resized(p, plan.config.vocab_rows(model.vocab_size)), params)

    def device_step(params, h_btd, cotangent_btd, batch):
        docs = Documents(batch.segments_bt, batch.positions_bt)
        counts = batch_counts(batch, NEXT_TOKEN, 0, plan)
        varied = plan.vary(params)

        def apply(params, h_btd):
            ends = nnx.merge(graph, working_copy(params, dtype))
            nats = token_nats(
                ends.norm(h_btd, plan), ends, targets(batch, 0, plan), target_weights(batch, 0, plan), plan
            )
            return ends.embedding(batch.tokens_bt, docs, plan), plan.total(nats)

        (x_btd, nats), back = jax.vjp(apply, varied, h_btd)
        grads, grad_h_btd = back((cotangent_btd, jnp.ones_like(nats)))
        return x_btd, grad_h_btd, plan.sum_gradients(plan.scatter_gradients(grads)), (counts, nats)

    h_btd = jax.ShapeDtypeStruct((plan.config.data * work.rows, _length(plan, work), model.hidden_size), DTYPES[dtype])
    docs, own, residual, whole = _documents(plan, work), *_specs(plan)
    weights_bt = jax.ShapeDtypeStruct(docs.segments_bt.shape, jnp.float32)
    batch = Batch(docs.segments_bt, docs.segments_bt, docs.positions_bt, weights_bt)
    return _unit(
        device_step,
        plan,
        (params, h_btd, h_btd, batch),
        (plan.specs(params), residual, residual, own),
        (residual, residual, plan.stored_specs(params), whole),
    )


class _Ends(nnx.Module):
    """The parts of a language model beside its layers."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        self.embedding = Embedding(model, rngs)
        self.norm = make_norm(model)
        self.head = None if model.tie_word_embeddings else Head(model, rngs)
        self.vocab_size = model.vocab_size

    def head_matrix(self, plan: Plan) -> Array:
        """As LanguageModel's."""
        return plan.weight(self.embedding.weight).T if self.head is None else plan.weight(self.head.weight)


def _unit(device_step: Callable, plan: Plan, arguments: tuple[Any, ...], inputs: Any, outputs: Any) -> Unit:
    """`device_step(params, ...) -> (_, _, grads, _)` with parameters and gradients in the layout between steps."""
    run = plan.run(device_step, inputs=inputs, outputs=outputs)
    params = arguments[0]
    stored = plan.shardings(params)

    def function(params, *others):
        return run(plan.working(params), *others)

    placed = jax.tree.map(lambda spec: jax.sharding.NamedSharding(plan.mesh, spec), (inputs[1:], outputs))
    first, second, _, last = placed[1]
    return Unit(function, arguments, (stored, *placed[0]), (first, second, stored, last))


def step_collectives(model: ModelConfig, plan: Plan, batch_size: int, length: int, *, dtype: str = "float32") -> Table:
    """The collectives of a whole step as written, except the gathers of sharded masters."""
    return jaxpr_collectives(_step_jaxpr(model, plan, batch_size, length, dtype), dict(plan.mesh.shape))


def _step_jaxpr(model: ModelConfig, plan: Plan, batch_size: int, length: int, dtype: str) -> core.Jaxpr:
    built = build(model, layout(model, plan, length), plan.config.vocab_rows(model.vocab_size))
    tokens_bt = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    batch = Batch(tokens_bt, tokens_bt, tokens_bt, jax.ShapeDtypeStruct(tokens_bt.shape, jnp.float32))
    step = gradients(built, NEXT_TOKENS, model, plan, dtype)
    return jax.make_jaxpr(step)(built.params, built.buffers, batch).jaxpr


def _abstract(make: Callable[[], nnx.Module]) -> tuple[Any, Any, Any]:
    graph, params, *others = nnx.split(jax.eval_shape(make), nnx.Param, ...)
    return graph, params, others[0]


def _length(plan: Plan, work: Workload) -> int:
    return plan.config.context * work.tokens


def _documents(plan: Plan, work: Workload) -> Documents:
    tokens_bt: Any = jax.ShapeDtypeStruct((plan.config.data * work.rows, _length(plan, work)), jnp.int32)
    return Documents(tokens_bt, tokens_bt)


def _specs(plan: Plan) -> tuple[Any, Any, Any]:
    """The specs of a batch's integers, of the residual stream, and of arrays that every device holds whole."""
    return plan.spec(*BATCH_AXES), plan.spec("batch", "tokens", None), plan.spec()


# Jaxprs


def _jaxpr(unit: Unit) -> core.Jaxpr:
    return jax.make_jaxpr(unit.function)(*unit.arguments).jaxpr


def jaxpr_collectives(jaxpr: core.Jaxpr, sizes: Mapping[str, int]) -> Table:
    """The collectives in `jaxpr`, each counted as often as the loops around it iterate. sizes: of the mesh axes."""
    table: Table = {}
    for turns, equation in _equations(jaxpr, lambda e: _sent(e, sizes)):
        operation = PRIMITIVES.get(equation.primitive.name)
        if operation is not None:
            key = operation, tuple(name for name in sizes if name in _named(equation))
            count = 1 if operation == RAGGED else len(equation.invars)
            add(table, key, turns * count, turns * _sent(equation, sizes))
    return table


def _sent(equation: core.JaxprEqn, sizes: Mapping[str, int]) -> float:
    operation = PRIMITIVES.get(equation.primitive.name)
    if operation is None:
        return 0
    sizes_of = [math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in _operands(equation)]
    # A ragged exchange sends no more than its result has room for.
    held = min(sizes_of) if operation == RAGGED else sum(sizes_of)
    return sent_bytes(operation, held, math.prod(sizes[name] for name in _named(equation)))


def _named(equation: core.JaxprEqn) -> tuple[str, ...]:
    named: Any = equation.params["axes" if "axes" in equation.params else "axis_name"]
    return (named,) if isinstance(named, str) else tuple(named)


def _operands(equation: core.JaxprEqn) -> Sequence[Any]:
    """The operands that are sent; of a ragged exchange also the one written to, not those that say what goes where."""
    return equation.invars[:2] if equation.primitive.name == "ragged_all_to_all" else equation.invars


def product_flops(jaxpr: core.Jaxpr) -> int:
    """Operations of the matrix products in `jaxpr`, a multiply-add as two, each counted as often as the loops around it
    iterate."""
    return sum(turns * _product(equation) for turns, equation in _equations(jaxpr, _product))


def _product(equation: core.JaxprEqn) -> int:
    if equation.primitive.name not in ("dot_general", "ragged_dot_general"):
        return 0
    left, right = (_shape(v) for v in equation.invars[:2])
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[i] for i in contracted)
    # Each row meets one group's matrix, whether rows are kept (r, m) or summed over (g, k, m).
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), _ = numbers.dot_dimension_numbers
    shared = {*contracted, *numbers.rhs_group_dimensions}
    return 2 * math.prod(left) * math.prod(size for i, size in enumerate(right) if i not in shared)


def _shape(variable: Any) -> tuple[int, ...]:
    """The shape of a jaxpr's variable; empty for none and for what is no array."""
    return getattr(getattr(variable, "aval", None), "shape", ())


def _equations(
    jaxpr: core.Jaxpr, weigh: Callable[[core.JaxprEqn], float], turns: int = 1
) -> Iterator[tuple[int, core.JaxprEqn]]:
    """(times it runs, equation) for every equation, inner jaxprs included; of a choice only the heaviest branch, and
    of a choice by platform the branch of accelerators if it weighs anything.

    Raises ValueError on a loop with an unknown number of iterations, if anything in it weighs something.
    """
    weight = lambda inner: sum(times * weigh(e) for times, e in _equations(inner, weigh))  # noqa: E731
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [_open(j) for j in _inner(equation)]
        yield turns, equation
        if name == "cond":
            # In a choice by platform the last branch is for all platforms but the named ones: for accelerators.
            by_platform = equation.params.get("branches_platforms") and weight(inner[-1])
            inner = [inner[-1] if by_platform else max(inner, key=weight)]
        if name == "while" and any(weight(j) for j in inner):
            raise ValueError(
                "a while loop that communicates or multiplies matrices; expected a scan: its turns are known"
            )
        for each in inner:
            yield from _equations(each, weigh, turns * (equation.params["length"] if name == "scan" else 1))


def _inner(equation: core.JaxprEqn) -> Iterator[Any]:
    if equation.primitive.name == "custom_vjp_call":
        yield equation.params["call_jaxpr"]
        return
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.Jaxpr | core.ClosedJaxpr):
                yield each


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def step_flops(model: ModelConfig, plan: Plan, batch_size: int, length: int) -> int:
    """Matrix-product operations of one device in one step of `plan`, its recomputation and padding included.

    Experts count every row that they have room for, as if routing filled all of them.
    """
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, grouped_matmul="ragged_dot"))
    jaxpr = _step_jaxpr(model, plan, batch_size, length, "float32")
    lies = layout(model, plan, length)
    return _stage_flops(jaxpr, plan, lies) if isinstance(lies, Stages) else product_flops(jaxpr)


def _stage_flops(jaxpr: core.Jaxpr, plan: Plan, stages: Stages) -> int:
    """The same for the average stage of a pipeline, which at each tick takes the branch that the schedule names."""
    schedule: Any = plan.schedule
    branch_ts = branches_ts(schedule.tables, stages.kind_vp, len(stages.kinds))
    choices = [e for turns, e in _equations(jaxpr, _product) if e.primitive.name == "cond" and turns == schedule.ticks]
    (choice,) = [e for e in choices if len(e.params["branches"]) == 1 + 2 * len(stages.kinds)]
    flops = np.array([product_flops(_open(branch)) for branch in choice.params["branches"]])
    others = product_flops(jaxpr) - schedule.ticks * int(flops.max())
    return others + int(flops[branch_ts].sum()) // schedule.stages


def flops_overhead(model: ModelConfig, config: PlanConfig, batch_size: int, length: int) -> float:
    """Operations of all the plan's devices over those of a single device without the plan, less one: what the plan
    computes twice or for padding. Both have the same microbatches and implementations."""
    plan = make_plan(config, model, abstract=True)
    alone = step_flops(model, single_device_plan(config, model), batch_size, length)
    return config.devices * step_flops(model, plan, batch_size, length) / alone - 1
