"""The number formats of a run's steps: the plan of a step, and the inputs that rounding needs from a batch.

Letters: b batch, t time.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from orogen.config.model import ModelConfig
from orogen.config.precision import PrecisionConfig
from orogen.config.recipe import Recipe
from orogen.config.rounded import layer_products
from orogen.data.packing import Batch
from orogen.model.by_letter import plain
from orogen.parallel.context import zigzag
from orogen.parallel.plan import Plan
from orogen.parallel.rounding_state import NUMBER, PROBES


def in_formats(plan: Plan, precision: PrecisionConfig, model: ModelConfig, *, switched: bool = False) -> Plan:
    """The plan whose layers round operands as `precision` specifies; the plan itself if no layer rounds. switched:
    whether the step follows `switch_to`. Raises ValueError if the plan has no recipes per layer."""
    rounded = layer_products(precision, model, switched=switched)
    if not any(rounded):
        return plan
    if plan.recipes is None:
        raise ValueError(
            f"PrecisionConfig.recipe {precision.recipe!r} for a plan without recipes; expected one per layer"
        )
    recipes = tuple(dataclasses.replace(r, rounded=p) for r, p in zip(plan.recipes, rounded, strict=True))
    return dataclasses.replace(plan, recipes=recipes, recipe=Recipe(), expert_tokens=precision.expert_tokens)


def is_switched(precision: PrecisionConfig, step: int) -> bool:
    """Whether this step, counted from 1, follows `switch_to`."""
    return precision.switch_step is not None and step >= precision.switch_step


def counting(params: nnx.State) -> tuple[nnx.State, Array | None]:
    """The model's parameters; and the zeros whose gradient counts what rounding loses, None if they are not among the
    parameters."""
    if PROBES not in params:
        return params, None
    parts = plain(params)
    return nnx.State({name: part for name, part in parts.items() if name != PROBES}), parts[PROBES][...]


def with_numbers(batch: Batch, plan: Plan) -> Batch:
    """The global batch, whose tokens are in the order of the context ranks; if the plan rounds, with each token's index
    in row-major order as the extra NUMBER."""
    if not plan.rounds:
        return batch
    rows, length = batch.tokens_bt.shape
    number_t = zigzag(length, plan.size("context")).astype(np.int32)
    number_bt = jnp.arange(rows, dtype=jnp.int32)[:, None] * length + jnp.asarray(number_t)
    return batch._replace(extras={**batch.extras, NUMBER: number_bt})
