"""The collectives and matrix products of a training step, and of parts of it: as traced, and as XLA compiles them for a
plan.

Nothing is allocated and nothing runs. Compiling needs as many devices as the plan has; they may be simulated. Compile
in float32: XLA:CPU carries bfloat16 collectives as float32.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.cost.assemble import layout
from orogen.cost.communication import unit_collectives
from orogen.cost.ledger import FLOAT32, OUTER, Collective, Workload
from orogen.data.packing import Batch
from orogen.model.lm import build
from orogen.model.stages import Stages
from orogen.parallel.legal import fold_plan
from orogen.parallel.pipeline import branches_ts
from orogen.parallel.plan import Plan, make_plan, single_device_plan
from orogen.precision.policy import working_copy
from orogen.simulate.hlo import Table, Traffic, add, hlo_collectives
from orogen.simulate.jaxprs import equations, jaxpr_collectives, opened, product, product_flops
from orogen.simulate.units import Unit, unit_of, without_mtp
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.step import gradients


def table_of(collectives: Iterable[Collective], config: PlanConfig, model: ModelConfig) -> Table:
    """The analytic records as a table by mesh axes, to compare with a trace or a compiled program."""
    folding, table = fold_plan(config, model), {}
    for record in collectives:
        axes = {name for axis in record.axes for name in folding.logical[axis]}
        key = record.operation, tuple(name for name, _ in folding.axes if name in axes)
        add(table, key, record.count, record.bytes)
    return table


def traced(unit: Unit, plan: Plan) -> Table:
    """The collectives of `unit` as traced, from its jaxpr: those inside `Plan.run`."""
    return jaxpr_collectives(jax.make_jaxpr(unit.function)(*unit.arguments).jaxpr, dict(plan.mesh.shape))


def compiled(unit: Unit, plan: Plan) -> Table:
    """The collectives of `unit` as XLA compiles it for the plan's devices."""
    function = jax.jit(unit.function, in_shardings=unit.shardings, out_shardings=unit.out_shardings)
    text = function.lower(*unit.arguments).compile().as_text()
    return hlo_collectives(text or "", dict(plan.mesh.shape))


def compare(model: ModelConfig, config: PlanConfig, work: Workload, letters: Iterable[str]) -> dict[str, Any]:
    """{unit: one record per operation and mesh axes, with analytic and compiled counts and bytes}, in float32, for one
    microbatch; for a pipeline, on the devices of one stage."""
    config = dataclasses.replace(config, stage=1, microbatches=1)
    model, work, facts = without_mtp(model), work._replace(itemsize=FLOAT32), {}
    plan = make_plan(config, model)
    for letter in (*letters, OUTER):
        analytic = table_of(unit_collectives(letter, model, config, work), config, model)
        program = compiled(unit_of(letter, model, plan, work), plan)
        none = Traffic(0, 0)
        facts[letter] = [
            {
                "operation": operation,
                "mesh_axes": list(axes),
                "analytic": analytic.get((operation, axes), none)._asdict(),
                "compiled": program.get((operation, axes), none)._asdict(),
            }
            for operation, axes in sorted(analytic.keys() | program.keys())
        ]
    return facts


def compared_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `compare` as lines of text."""
    lines = ["compiled in float32: collectives and bytes per layer, analytic and compiled"]
    for unit, records in facts.items():
        for record in records:
            analytic, program = (record[name] for name in ("analytic", "compiled"))
            sizes = (
                f"{analytic['count']:>4} {analytic['bytes']:>14,.0f}  {program['count']:>4} {program['bytes']:>14,.0f}"
            )
            lines.append(f"{unit:5} {record['operation']:18} {' x '.join(record['mesh_axes']):28} {sizes}")
    return lines


def step_collectives(model: ModelConfig, plan: Plan, batch_size: int, length: int, *, dtype: str = "float32") -> Table:
    """The collectives of a whole step as traced, except the all-gathers of sharded master parameters."""
    return jaxpr_collectives(_step_jaxpr(model, plan, batch_size, length, dtype), dict(plan.mesh.shape))


def _step_jaxpr(model: ModelConfig, plan: Plan, batch_size: int, length: int, dtype: str) -> core.Jaxpr:
    built = build(model, layout(model, plan, length), plan.config.vocab_rows(model.vocab_size))
    tokens_bt = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
    batch = Batch(tokens_bt, tokens_bt, tokens_bt, jax.ShapeDtypeStruct(tokens_bt.shape, jnp.float32))
    step = gradients(built, NEXT_TOKENS, model, plan, dtype)
    params = jax.eval_shape(lambda params: working_copy(params, dtype), built.params)
    return jax.make_jaxpr(step)(params, built.buffers, batch).jaxpr


def step_flops(model: ModelConfig, plan: Plan, batch_size: int, length: int) -> int:
    """FLOPs of one device's matrix products in one step of `plan`, recomputation and padding included.

    Experts count every row that their buffers have room for, as if routing filled them.
    """
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, grouped_matmul="ragged_dot"))
    jaxpr = _step_jaxpr(model, plan, batch_size, length, "float32")
    lies = layout(model, plan, length)
    return _stage_flops(jaxpr, plan, lies) if isinstance(lies, Stages) else product_flops(jaxpr)


def _stage_flops(jaxpr: core.Jaxpr, plan: Plan, stages: Stages) -> int:
    """The same, averaged over a pipeline's stages. At each tick a stage takes the branch that the schedule names."""
    schedule: Any = plan.schedule
    kinds = stages.kinds(plan.recipes)
    branch_ts = branches_ts(schedule.tables, stages.kind_vp(plan.recipes), len(kinds))
    choices = [e for times, e in equations(jaxpr, product) if e.primitive.name == "cond" and times == schedule.ticks]
    (choice,) = [e for e in choices if len(e.params["branches"]) == 1 + 2 * len(kinds)]
    flops = np.array([product_flops(opened(branch)) for branch in choice.params["branches"]])
    others = product_flops(jaxpr) - schedule.ticks * int(flops.max())
    return others + int(flops[branch_ts].sum()) // schedule.stages


def flops_overhead(model: ModelConfig, config: PlanConfig, batch_size: int, length: int) -> float:
    """FLOPs of all the plan's devices over those of a single device, less one: the share that the plan duplicates or
    spends on padding. Both use the same microbatches and implementations."""
    plan = make_plan(config, model, abstract=True)
    alone = step_flops(model, single_device_plan(config, model), batch_size, length)
    return config.devices * step_flops(model, plan, batch_size, length) / alone - 1
