"""Runs a pipeline's schedule inside the plan's `shard_map`: one loop over ticks, in which each stage follows its table.

Forward and backward passes are explicit. A forward pass stores the residuals of its gradient in a slot of the stash,
from which the backward pass of that microbatch reads them. So only as many microbatches are held as the schedule has in
flight, and nothing is recomputed beyond the model's own remat policy. There is one exception: residuals that depend on
the parameters alone (slices, gathered weights) or on the batch alone (masks) are recomputed.

Letters: b batch, t time, d model, k slots, n elements.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.interpreters import partial_eval

from orogen.parallel.dependence import BATCH, BOTH, PARAMETERS, dependence
from orogen.parallel.plan import Plan
from orogen.parallel.schedule import BACKWARD, FORWARD, Schedule, Tables
from orogen.parallel.stash import Kept, Stash, get, put
from orogen.parallel.varying import vary, vary_like


class Program(NamedTuple):
    """What one kind of segment computes, on one device's arrays. chunk, microbatch: int32 (), this device's at a tick.

    take: (params, chunk) -> the segment's own parameters. forward: (own parameters, x, chunk, microbatch) -> y, its
    share of the loss, and a report. give: (gradients so far, gradients of the own parameters, chunk) -> their sum.
    note: (reports so far, report, chunk, microbatch) -> the reports including this one.
    """

    take: Callable[[Any, Array], Any]
    forward: Callable[[Any, Array, Array, Array], tuple[Array, Array, Any]]
    give: Callable[[Any, Any, Array], Any]
    note: Callable[[Any, Any, Array, Array], Any]


class Result(NamedTuple):
    """loss: summed over stages; grads: in the form in which `Program.give` adds them; reports: of this stage's
    chunks."""

    loss: Array
    grads: Any
    reports: Any


class _Now(NamedTuple):
    """A stage's entries in `schedule.Tables` at a tick; branch: an index into the branches of `run`."""

    branch: Array
    microbatch: Array
    chunk: Array
    stash: Array
    forward_inbox: Array
    backward_inbox: Array
    forward_lands: Array
    backward_lands: Array


class _State(NamedTuple):
    """What a stage carries from tick to tick: its buffers (k, …), its stash and its sums so far."""

    forward_inbox: Array
    backward_inbox: Array
    stash: tuple[Array, ...]
    loss: Array
    grads: Any
    reports: Any


class _Traced(NamedTuple):
    """A program's forward pass and its gradient, as jaxprs of (params, x, chunk, microbatch).

    forward returns y, loss, the report and the residuals to be stashed, of types `kept`; recompute returns the other
    residuals; `order` picks residual i of the gradient from the stashed ones followed by the recomputed ones.
    """

    forward: jex.ClosedJaxpr
    report: Any
    recompute: jex.ClosedJaxpr
    kept: tuple[Any, ...]
    order: tuple[int, ...]
    gradient: Any


class _Branch(NamedTuple):
    """What the forward and backward branch of a program need. place: where its residuals lie in the stash."""

    program: Program
    traced: _Traced
    place: tuple[Kept, ...]


def run(
    schedule: Schedule,
    programs: Sequence[Program],
    program_vp: np.ndarray,
    *,
    params: Any,
    x: Array,
    grads: Any,
    reports: Any,
    plan: Plan,
) -> Result:
    """Runs the passes of one training step: every microbatch through every chunk of every stage.

    program_vp: which of `programs` chunk v of stage p runs. x: zeros of the shape that stages send each other.
    grads, reports: zeros to add to; with grads None the schedule has forward passes only, and nothing is stashed.
    params and grads are marked as varying over the whole mesh.
    """
    stage = plan.rules["stage"]
    nothing = vary(jnp.zeros((), jnp.int32), stage)
    x = plan.vary(x)
    traced = [_trace(p, params, x, plan, nothing=nothing, gradient=grads is not None) for p in programs]
    stash = Stash()
    compiled = [_Branch(p, passed, stash.add(passed.kept)) for p, passed in zip(programs, traced, strict=True)]
    for program, passed in zip(programs, traced, strict=True):
        reports = _as_noted(program, passed, reports, nothing)
    state = _State(
        forward_inbox=_slots(x, max(schedule.forward_slots)),
        backward_inbox=_slots(x, max(schedule.backward_slots)),
        stash=stash.empty(max(schedule.stash_slots)),
        loss=vary(jnp.zeros(()), stage),
        grads=grads,
        reports=reports,
    )
    branches = [lambda now, state: (x, state)]
    branches += [functools.partial(_forward, branch, params) for branch in compiled]
    if grads is not None:
        branches += [functools.partial(_backward, branch, (params, x)) for branch in compiled]

    def tick(state: _State, now: _Now) -> tuple[_State, None]:
        sent, state = lax.switch(now.branch, branches, now, state)
        inboxes = {}
        for name, lands, toward in (
            ("forward_inbox", now.forward_lands, 1),
            ("backward_inbox", now.backward_lands, -1),
        ):
            inboxes[name] = _put(getattr(state, name), plan.pass_on(sent, "stage", toward), lands)
        return state._replace(**inboxes), None

    ticks = _of_stage(schedule.tables, branches_ts(schedule.tables, program_vp, len(programs)), plan)
    state, _ = lax.scan(tick, state, ticks)
    return Result(lax.psum(state.loss, stage), state.grads, state.reports)


def branches_ts(tables: Tables, program_vp: np.ndarray, count: int) -> np.ndarray:
    """(ticks, stages) int: the branch of the loop that a stage takes. 0 idles, 1 to `count` are the forward passes of
    the programs, the next `count` their backward passes."""
    program_ts = program_vp[tables.chunk, np.arange(tables.chunk.shape[1])]
    first = {FORWARD: 1, BACKWARD: 1 + count}
    return np.select([tables.operation == o for o in first], [program_ts + start for start in first.values()], 0)


def _of_stage(tables: Tables, branch_ts: np.ndarray, plan: Plan) -> _Now:
    """(ticks,) arrays: this stage's columns of the tables."""
    fields = {name: getattr(tables, name) for name in _Now._fields if name != "branch"} | {"branch": branch_ts}
    index = plan.index("stage")
    return _Now(**{name: jnp.take(jnp.asarray(table, jnp.int32), index, axis=1) for name, table in fields.items()})


def _forward(branch: _Branch, params: Any, now: _Now, state: _State) -> tuple[Array, _State]:
    """The array to send to the next segment, and the state after a forward pass."""
    program, traced, place = branch
    x = _get(state.forward_inbox, now.forward_inbox)
    values = jex.jaxpr_as_fun(traced.forward)(*jax.tree.leaves((params, x, now.chunk, now.microbatch)))
    y, loss, *rest = values
    count = traced.report.num_leaves
    report = jax.tree.unflatten(traced.report, rest[:count])
    stash = put(state.stash, place, now.stash, rest[count:])
    reports = program.note(state.reports, report, now.chunk, now.microbatch)
    return y, state._replace(stash=stash, loss=state.loss + loss, reports=reports)


def _backward(branch: _Branch, operands: tuple[Any, Array], now: _Now, state: _State) -> tuple[Array, _State]:
    """The gradient to send to the previous segment, and the state after a backward pass."""
    program, traced, place = branch
    params, x = operands
    residuals = get(state.stash, place, now.stash)
    residuals += jex.jaxpr_as_fun(traced.recompute)(*jax.tree.leaves((params, x, now.chunk, now.microbatch)))
    gradient = jax.tree.unflatten(traced.gradient, [residuals[i] for i in traced.order])
    dy = _get(state.backward_inbox, now.backward_inbox)
    grads, dx = gradient((dy, vary_like(jnp.ones(()), state.loss)))
    return dx, state._replace(grads=program.give(state.grads, grads, now.chunk))


def _trace(program: Program, params: Any, x: Array, plan: Plan, *, nothing: Array, gradient: bool) -> _Traced:
    """The program's passes as jaxprs; without `gradient`, nothing is stashed. nothing: an int32 () of the varying type
    of chunk and microbatch."""
    seen: dict[str, Any] = {}

    def forward(params: Any, x: Array, chunk: Array, microbatch: Array) -> Any:
        def split(pieces: Any, x: Array) -> Any:
            y, loss, report = program.forward(pieces, x, chunk, microbatch)
            return (plan.vary(y), vary(loss, plan.rules["stage"])), report

        pieces = program.take(params, chunk)
        if not gradient:
            (y, loss), report = split(pieces, x)
            return y, loss, report, []
        (y, loss), pull, report = jax.vjp(split, pieces, x, has_aux=True)
        residuals, seen["gradient"] = jax.tree.flatten(pull)
        return y, loss, report, residuals

    closed, shapes = jax.make_jaxpr(forward, return_shape=True)(params, x, nothing, nothing)
    report = jax.tree.structure(shapes[2])
    results, residuals = closed.jaxpr.outvars[: 2 + report.num_leaves], closed.jaxpr.outvars[2 + report.num_leaves :]
    inputs = [PARAMETERS] * len(jax.tree.leaves(params)) + [BOTH, 0, BATCH]
    flags = dependence(closed.jaxpr, inputs, consts=BATCH)[len(results) :]
    # What does not vary over devices is a constant, even if it comes from an operation that `dependence` cannot look
    # through.
    flags = [f if v.aval.mat.varying else 0 for f, v in zip(flags, residuals, strict=True)]
    # One value may be the residual of many operations.
    stashed = list(dict.fromkeys(v for v, f in zip(residuals, flags, strict=True) if f == BOTH))
    place = {variable: index for index, variable in enumerate(stashed)}
    recomputed = [variable for variable, f in zip(residuals, flags, strict=True) if f != BOTH]
    recomputed_at = iter(range(len(stashed), len(stashed) + len(recomputed)))
    return _Traced(
        forward=_with_outputs(closed, [*results, *stashed]),
        report=report,
        recompute=_with_outputs(closed, recomputed),
        kept=tuple(variable.aval for variable in stashed),
        order=tuple(place[v] if f == BOTH else next(recomputed_at) for v, f in zip(residuals, flags, strict=True)),
        gradient=seen.get("gradient"),
    )


def _with_outputs(closed: jex.ClosedJaxpr, outputs: list[Any]) -> jex.ClosedJaxpr:
    """`closed` with other outputs, and without the equations that they do not need."""
    jaxpr = closed.jaxpr.replace(outvars=outputs, debug_info=closed.jaxpr.debug_info.with_unknown_names())
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(outputs), instantiate=True)
    return jex.ClosedJaxpr(jaxpr, closed.consts)


def _as_noted(program: Program, traced: _Traced, reports: Any, nothing: Array) -> Any:
    """`reports`, marked as varying over the mesh axes over which they vary after `program.note`, as a loop's carry must
    be."""
    avals = [v.aval for v in traced.forward.jaxpr.outvars[2 : 2 + traced.report.num_leaves]]
    report = jax.tree.unflatten(traced.report, [vary(jnp.zeros(a.shape, a.dtype), a.mat.varying) for a in avals])
    noted = jax.make_jaxpr(program.note)(reports, report, nothing, nothing).jaxpr.outvars
    leaves, tree = jax.tree.flatten(reports)
    return jax.tree.unflatten(tree, [vary(x, v.aval.mat.varying) for x, v in zip(leaves, noted, strict=True)])


def _slots(x: Array, count: int) -> Array:
    """A buffer of `count` slots, at least one."""
    return jnp.zeros((max(count, 1), *x.shape), x.dtype) + jnp.zeros_like(x)


def _get(buffer: Array, slot: Array) -> Array:
    return lax.dynamic_index_in_dim(buffer, jnp.minimum(slot, len(buffer) - 1), keepdims=False)


def _put(buffer: Array, value: Array, slot: Array) -> Array:
    """`buffer` with `value` in the slot, if there is such a slot."""
    place = jnp.minimum(slot, len(buffer) - 1)
    kept = jnp.where(slot < len(buffer), value, _get(buffer, slot))
    return lax.dynamic_update_index_in_dim(buffer, kept, place, 0)
