"""The functions through which every weight is read for a product: `linear` for a matrix, `grouped` for experts, and
`head_matrix`.

The current layer's recipe (`Plan.recipe`) names the formats, by the kind of the weight (`config/precision.py`); a
product without a kind follows `PlanConfig.linear` alone. Arguments that several functions share: kind, of the weight;
call, the number of the product among those of its kind in the layer, as `config/kinds.py` lists them. Products that no
recipe changes have functions of their own. Weights that are held in 8 bits (`precision/scaled.py`) are decoded here.

Letters: b batch, t time, n tokens (b · t), d width in, f width out, e experts, r rows sorted by expert, v vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from orogen.config.precision import GROUPS, KINDS
from orogen.config.quantize import Measured
from orogen.config.recipe import FP8, IN_PLAIN, PLAIN
from orogen.config.rounded import Products
from orogen.kernels.grouped_matmul import grouped_matmul
from orogen.kernels.grouped_matmul.operands import RowGroups
from orogen.layers.adapter import Adapted, Weight, base_of
from orogen.layers.multiply import flat, multiply, multiply_float32
from orogen.layers.thin import thin_grouped, thin_products
from orogen.parallel.axes import SHARDED
from orogen.parallel.plan import Plan
from orogen.parallel.rounding_state import Rounding
from orogen.precision.calibration import Site, measured_products
from orogen.precision.emulated import How, Offsets, rounded_products
from orogen.precision.expert_rows import GroupedHow, RowOffsets, RowOrder, expert_rows, rounded_grouped
from orogen.precision.fp8 import fp8_matmul
from orogen.precision.scaled import weight_for

# For each choice of formats, the product of rows with their expert's matrix.
GROUPED = {IN_PLAIN: grouped_matmul}


def linear(x_btd: Array, weight: Weight, plan: Plan, kind: str | None = None, *, call: int = 0) -> Array:
    """x w (b, t, f) in x's dtype, in the formats of the recipe."""
    return linears(x_btd, (weight,), plan, kind, call=call)[0]


def linears(
    x_btd: Array, weights: Sequence[Weight], plan: Plan, kind: str | None = None, *, call: int = 0
) -> tuple[Array, ...]:
    """x w (b, t, f) for each of several weights that a model could equally store as one matrix: a format with one scale
    per tensor gives them a common scale."""
    products = _linears(x_btd, [base_of(weight) for weight in weights], plan, kind, call)
    return tuple(_adapted(y, x_btd, weight, plan) for y, weight in zip(products, weights, strict=True))


def linears_and_plain(
    x_btd: Array, weights: Sequence[Weight], narrow: Weight, plan: Plan, kind: str | None = None, *, call: int
) -> tuple[Array, ...]:
    """`linears` of weights, then `linear_plain` of a narrow one, whose call is given. One product if all are plain."""
    if not _is_plain(plan, kind):
        return *linears(x_btd, weights, plan, kind), linear_plain(x_btd, narrow, plan, kind, call=call)
    every = (*weights, narrow)
    products = _products(x_btd, [plan.weight(base_of(weight)) for weight in every], plan)
    return tuple(_adapted(y, x_btd, weight, plan) for y, weight in zip(products, every, strict=True))


def _is_plain(plan: Plan, kind: str | None) -> bool:
    """Whether the recipe neither measures nor changes products of this kind."""
    recipe = plan.recipe
    changed = kind is not None and recipe.products(kind) is not None
    return recipe.linear == IN_PLAIN and recipe.measures(kind) is None and not changed


def _products(x_btd: Array, weights: Sequence[Any], plan: Plan) -> tuple[Array, ...]:
    """x w in the compute dtype, for weights some of which may be in 8 bits."""
    thin = thin_products(x_btd, weights, plan)
    return tuple(multiply(x_btd, weight_for(x_btd, weight)) for weight in weights) if thin is None else thin


def _adapted(
    y_btf: Array, x_btd: Array, weight: Weight, plan: Plan, product: Callable[..., Array] | None = None
) -> Array:
    """The product y with a weight, plus the product with its low-rank factors if it has any, in the compute dtype.
    product: multiplies rows by a matrix; None: `multiply`."""
    if not isinstance(weight, Adapted):
        return y_btf
    product = product or multiply
    a_dr, b_rf = (plan.weight(factor).astype(x_btd.dtype) for factor in (weight.lora_a, weight.lora_b))
    return y_btf + (weight.scale * product(product(x_btd, a_dr), b_rf)).astype(y_btf.dtype)


def _linears(x_btd: Array, weights: Sequence[nnx.Param], plan: Plan, kind: str | None, call: int) -> tuple[Array, ...]:
    formats, given = plan.recipe.linear, [plan.weight(w) for w in weights]
    if _is_plain(plan, kind):
        return _products(x_btd, given, plan)
    weights_df = [weight_for(x_btd, w) for w in given]
    if (measured := plan.recipe.measures(kind)) is not None:
        return _measured(x_btd, weights_df, _site(weights[0], measured, plan, (kind, call)))
    if kind is not None and (products := plan.recipe.products(kind)) is not None:
        how, probe = _how(products, plan, kind, call)
        return rounded_products(x_btd, weights_df, how, _offsets(x_btd, weights, plan), probe)
    if unknown := formats.names() - {PLAIN, FP8}:
        raise ValueError(f"a recipe names the format {sorted(unknown)[0]!r}; expected {PLAIN} or {FP8}")
    parts_nf = fp8_matmul(flat(x_btd), weights_df, formats=formats, quantize=plan.config.quantize)
    return tuple(y_nf.reshape(*x_btd.shape[:-1], -1) for y_nf in parts_nf)


def linear_plain(x_btd: Array, weight: Weight, plan: Plan, kind: str | None = None, *, call: int = 0) -> Array:
    """x w (b, t, f) in the compute dtype, whatever the recipe: for results that are too narrow to gain from another
    format, or that are exponentiated into decays. kind: only that of a weight which quantised checkpoints store with
    others of the kind."""
    base = base_of(weight)
    given = plan.weight(base)
    if (measured := plan.recipe.measures(kind)) is not None:
        return _measured(x_btd, (weight_for(x_btd, given),), _site(base, measured, plan, (kind, call)))[0]
    return _adapted(_products(x_btd, (given,), plan)[0], x_btd, weight, plan)


def linear_float32(x_btd: Array, weight: nnx.Param, plan: Plan) -> Array:
    """x w (b, t, f) in float32, whatever the recipe; see `multiply_float32`."""
    return multiply_float32(x_btd, plan.weight(weight))


def empty_columns(weight: nnx.Param, plan: Plan) -> Array:
    """(f,) which outputs of a weight (d, f) have weights of 0 only."""
    return jnp.all(plan.weight(weight) == 0, axis=0)


def empty_first_row(weight: nnx.Param, plan: Plan) -> Array:
    """() whether the first input of a weight (d, f) has weights of 0 only."""
    return jnp.all(plan.weight(weight)[0] == 0)


def grouped(
    x_rd: Array,
    weight: Weight,
    group_sizes: Array | RowGroups | int,
    plan: Plan,
    kind: str | None = None,
    *,
    call: int = 0,
    rows: tuple[RowOrder, int] | None = None,
) -> Array:
    """x w_e (r, f) for the rows of each expert e, in the formats of the recipe. group_sizes: see `grouped_matmul`;
    rows: the result of `rows_of_experts`, required if the recipe rounds rows, which must then be sorted by expert:
    otherwise raises ValueError."""
    y_rf = _grouped(x_rd, base_of(weight), group_sizes, plan, product=(kind, call), rows=rows)

    def with_experts(x_rd: Array, w_edf: Array) -> Array:
        return grouped_matmul(x_rd, w_edf, group_sizes, implementation=plan.config.grouped_matmul)

    return _adapted(y_rf, x_rd, weight, plan, with_experts)


def _grouped(
    x_rd: Array, weight: nnx.Param, group_sizes: Array | RowGroups | int, plan: Plan, *,
    product: tuple[str | None, int], rows: tuple[RowOrder, int] | None,
) -> Array:  # fmt: skip
    kind, call = product
    given, implementation = plan.weight(weight), plan.config.grouped_matmul
    plain = kind is None or plan.recipe.products(kind) is None
    if plan.recipe.measures(kind) is None and plain and plan.recipe.grouped == IN_PLAIN:
        if (y_rf := thin_grouped(x_rd, given, group_sizes, plan)) is not None:
            return y_rf
    weight_edf = weight_for(x_rd, given)
    if (measured := plan.recipe.measures(kind)) is not None:
        return _measured_rows(x_rd, weight_edf, group_sizes, _site(weight, measured, plan, (kind, call)))
    products = None if kind is None else plan.recipe.products(kind)
    if kind is None or products is None:
        return GROUPED[plan.recipe.grouped](x_rd, weight_edf, group_sizes, implementation=implementation)
    if rows is None or isinstance(group_sizes, RowGroups):
        raise ValueError(f"{kind}: rows that name their experts cannot be rounded; expected rows sorted by expert")
    how, probe = _how(products, plan, kind, call)
    at = _rounding(plan)
    in_axis, out_axis = weight.get_metadata()["axes"][-2:]
    first = (plan.index("expert") * weight_edf.shape[0], _first(in_axis, weight_edf.shape[1], plan))
    offsets = RowOffsets(at.key, at.layer_l[0], *map(_word, (*first, _first(out_axis, weight_edf.shape[2], plan))))
    grouped_how = GroupedHow(how, rows[1], implementation)
    settings: Any = {"rows": rows[0], "how": grouped_how, "offsets": offsets, "probe": probe}
    return rounded_grouped(x_rd, weight_edf, group_sizes, **settings)


def _measured(x_btd: Array, weights_df: Sequence[Array], site: Site) -> tuple[Array, ...]:
    """`linears` of a model that is being quantised, with its measurements."""

    def product(x_btd: Array, weights_df: Sequence[Array]) -> tuple[Array, ...]:
        return tuple(multiply(x_btd, w_df) for w_df in weights_df)

    return measured_products(x_btd, weights_df, product, site)


def _measured_rows(x_rd: Array, weight_edf: Array, group_sizes: Array | RowGroups | int, site: Site) -> Array:
    """`grouped` of a model that is being quantised, with its measurements. Candidate formats are scored where the
    experts' outputs are combined (`moe/layer.py`)."""
    if isinstance(group_sizes, RowGroups):
        raise ValueError("rows that name their experts cannot be measured; expected rows sorted by expert")
    plan = site.plan
    product = GROUPED[plan.recipe.grouped]
    held = True if isinstance(group_sizes, int) else (jnp.arange(len(x_rd)) < jnp.sum(group_sizes))[:, None]

    def rows(x_rd: Array, weights_edf: Sequence[Array]) -> tuple[Array, ...]:
        return (product(x_rd, weights_edf[0], group_sizes, implementation=plan.config.grouped_matmul),)

    alone = site._replace(measured=dataclasses.replace(site.measured, candidates=()))
    return measured_products(x_rd, (weight_edf,), rows, alone, counted=held)[0]


def _site(weight: nnx.Param, measured: Measured, plan: Plan, product: tuple[str | None, int]) -> Site:
    """Which product is measured: its kind and call, and the logical axes that split the weight's inputs and outputs."""
    kind, call = product
    assert kind is not None, "only weights of a kind are measured"
    inputs, outputs = (axis if axis not in (None, *SHARDED) and plan.rules[axis] else None for axis in _axes(weight))
    return Site(measured, plan, KINDS.index(kind), call, inputs, outputs)


def _axes(weight: nnx.Param) -> Sequence[str | None]:
    return weight.get_metadata()["axes"][-2:]


def rounds_experts(plan: Plan) -> bool:
    """Whether the recipe rounds the rows of experts."""
    return any(plan.recipe.products(kind) is not None for kind in GROUPS["routed"])


def token_numbers(x_btd: Array, plan: Plan) -> Array:
    """(b, t) int32: the index of each token of x in the global batch; x may be one tensor rank's share of the
    tokens."""
    number_bt = _rounding(plan).number_bt
    assert number_bt is not None, "a part of the batch is known where layers run"
    return number_bt if number_bt.shape[1] == x_btd.shape[1] else plan.piece(number_bt, "tensor", dim=1)


def rows_of_experts(number_r: Array, group_sizes: Any, plan: Plan, *, experts: int) -> tuple[RowOrder, int]:
    """Which rows, of tokens with these indices in the global batch, are rounded together, and how many rows there are
    with each group filled up; see `precision.expert_rows`."""
    at = _rounding(plan)
    units = [p.token_block for kind in GROUPS["routed"] if (p := plan.recipe.products(kind)) is not None]
    settings = {"tokens": at.tokens, "chunk": at.chunk, "unit": math.lcm(*units)}
    return expert_rows(number_r, group_sizes, experts=experts, **settings)


def _how(products: Products, plan: Plan, kind: str, call: int) -> tuple[How, Array | None]:
    """What a rounded product does, and the zeros whose gradient is its counters; None if nothing is counted."""
    probe_l, number = _rounding(plan).probe_l, KINDS.index(kind)
    without_arrays = dataclasses.replace(plan, rounding=None)
    how = How(products, without_arrays, 8 * number + call, probe_l is not None)
    return how, None if probe_l is None else probe_l[0, number]


def _offsets(x_btd: Array, weights: Sequence[nnx.Param], plan: Plan) -> Offsets:
    """Where operands lie in the whole arrays, by which stochastic rounding draws the same bits under every plan."""
    at, axes = _rounding(plan), [weight.get_metadata()["axes"] for weight in weights]
    shapes = [weight.get_value().shape for weight in weights]
    column_i = tuple(_word(_first(out, shape[1], plan)) for (_, out), shape in zip(axes, shapes, strict=True))
    row = _word(_first(axes[0][0], shapes[0][0], plan))
    return Offsets(at.key, at.layer_l[0], token_numbers(x_btd, plan), row, column_i)


def _first(axis: str | None, size: int, plan: Plan) -> Array | int:
    """The index in the whole weight of the first of this rank's `size` rows or columns."""
    return 0 if axis is None or axis in SHARDED else plan.index(axis) * size


def _word(number: Array | int) -> Array:
    return jnp.asarray(number, jnp.uint32)


def _rounding(plan: Plan) -> Rounding:
    if plan.rounding is None:
        raise ValueError("a recipe rounds operands outside a training step; expected Plan.in_step")
    return plan.rounding


def head_matrix(embedding: nnx.Param, head: nnx.Param | None, plan: Plan) -> Array:
    """The head (d, v of this rank) for the product in the cross-entropy; without a head, the transposed embedding.
    Always in the compute dtype: no recipe has another format for it."""
    return plan.weight(embedding).T if head is None else plan.weight(head)


def add_bias(x_btf: Array, bias: nnx.Param | None) -> Array:
    """x + bias in x's dtype; x itself if there is no bias."""
    return x_btf if bias is None else x_btf + bias[...].astype(x_btf.dtype)
