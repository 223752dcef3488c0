"""What a product of a model that is quantised measures: its input's largest magnitude, and how much the loss would
notice the errors of its output.

Both leave the backward pass as the gradient of an array of zeros, as counters do (`counts.py`). A maximum is taken over
all devices first. The sensitivity of a product y = x w to a target is Σ (g ⊙ Δy)² over all tokens and outputs, where g
is the gradient of the loss and Δy the error of y if input and weight are rounded as the target says; each product is
clipped to ±10^10. Source: AutoQuantize of NVIDIA/Model-Optimizer, `_get_auto_quantize_score`.

Letters: f candidates.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from orogen.config.precision import KINDS
from orogen.config.quantize import Measured, Target
from orogen.parallel.plan import Plan
from orogen.precision.emulated import finite_or_infinite
from orogen.precision.rounding import encode, magnitude

CALLS = 4  # most products of one kind in a layer
CLIP = 1e10  # of gradient times error
# From the input and the weights to the outputs, one for each weight.
Product = Callable[[Array, Sequence[Array]], Sequence[Array]]


class Site(NamedTuple):
    """Of a product: what it measures, on which plan; the number of its kind, and of the product among those of its kind
    in the layer; the axis over which its weights' inputs are split, None: each rank has all; and that of the
    outputs."""

    measured: Measured
    plan: Plan
    kind: int
    call: int
    inputs: str | None
    outputs: str | None


class Where(NamedTuple):
    """What does not depend on numbers. plan: without arrays; partial: an axis over whose ranks outputs are partial
    sums."""

    plan: Plan
    partial: str | None


def probe_shape(layers: int, candidates: int) -> tuple[int, ...]:
    """Of the zeros whose gradient is, for each product, the largest magnitude and then the candidates' scores."""
    return layers, len(KINDS), CALLS, 1 + candidates


def measured_products(
    x: Array, weights: Sequence[Array], product: Product, site: Site, *, counted: Array | bool = True
) -> tuple[Array, ...]:
    """The outputs of x (…, d) for each weight (…, d, f), computed and measured as `site` says. counted: which rows of
    x there are."""
    measured, plan = site.measured, site.plan
    rounding = plan.rounding
    if rounding is None:
        raise ValueError("a recipe measures products outside a pass over a batch; expected Plan.in_step")
    if measured.applied is not None:
        x = _rounded_input(x, measured.applied, site)
        weights = rounded_weights(weights, measured.applied, site) if measured.weights else weights
    ys = tuple(product(x, weights))
    if rounding.probe_l is None:
        return ys
    probe = rounding.probe_l[0, site.kind, site.call]
    x = jax.lax.stop_gradient(x)  # nothing below is differentiated, and maxima over ranks have no derivative
    seen = jnp.where(counted, magnitude(x), 0)
    found = plan.agreed(finite_or_infinite(jnp.max(seen, initial=0)))
    errors = []
    for target in measured.candidates:
        both = _rounded_input(x, target, site), rounded_weights(weights, target, site)
        rounded = jax.lax.stop_gradient(tuple(product(*both)))
        errors.append(_errors(rounded, ys, site.inputs, plan))
    return _probed(_where(plan, site.inputs), ys, probe, found, errors)


def with_scores(outcome: Callable[[Plan], Array], targets: Sequence[Target], kinds: Sequence[str], plan: Plan) -> Array:
    """outcome(plan), which is also scored with the products of these kinds rounded as each target says; the scores are
    those of the first kind. For outputs of several products that are quantised together."""
    y = outcome(plan)
    rounding = plan.rounding
    if not targets or rounding is None or rounding.probe_l is None:
        return y
    probe, errors = rounding.probe_l[0, KINDS.index(kinds[0]), 0], []
    for target in targets:
        applied = tuple((kind, Measured(applied=target, weights=True)) for kind in kinds)
        other = jax.lax.stop_gradient(outcome(_measuring(plan, applied)))
        errors.append(_errors((other,), (y,), None, plan))
    found: Any = _probed(_where(plan, None), (y,), probe, jnp.zeros(()), errors)
    return found[0]


def _measuring(plan: Plan, measured: tuple[tuple[str, Measured], ...]) -> Plan:
    """The plan of the same layer, whose products measure nothing but do this, by kind."""
    rounding = plan.rounding and plan.rounding._replace(probe_l=None)
    return dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, measured=measured), rounding=rounding)


def _where(plan: Plan, partial: str | None) -> Where:
    return Where(dataclasses.replace(plan, rounding=None), partial)


def _errors(rounded: Sequence[Array], ys: Sequence[Array], partial: str | None, plan: Plan) -> tuple[Array, ...]:
    differences = (a.astype(jnp.float32) - b.astype(jnp.float32) for a, b in zip(rounded, ys, strict=True))
    return jax.lax.stop_gradient(tuple(d if partial is None else plan.sum(d, partial) for d in differences))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _probed(where: Where, ys: tuple[Array, ...], probe: Array, largest: Array, errors: Any) -> Any:
    return ys


def _forward(where, ys, probe, largest, errors):
    return ys, (probe, largest, errors)


def _backward(where, kept, grads):
    probe, largest, errors = kept
    # Ranks with partial sums have the same gradient and the same errors.
    once = 1.0 if where.partial is None else where.plan.index(where.partial) == 0
    scores = []
    for error in errors:
        squares = (
            jnp.square(jnp.clip(g.astype(jnp.float32) * e, -CLIP, CLIP)) for g, e in zip(grads, error, strict=True)
        )
        scores.append(where.plan.total(sum((jnp.sum(s) for s in squares), start=jnp.zeros(())) * once))
    nothing = [jnp.zeros(())] * (len(probe) - 1 - len(scores))
    return grads, jnp.stack([largest, *scores, *nothing]), None, None


_probed.defvjp(_forward, _backward)


def _input_largest(site: Site) -> Array | None:
    """The calibrated magnitude of this product's input, a scalar."""
    rounding = site.plan.rounding
    if rounding is None or rounding.maxima is None:
        return None
    return jnp.asarray(rounding.maxima)[rounding.layer_l[0], site.kind, site.call]


def _rounded_input(x: Array, target: Target, site: Site) -> Array:
    """With the calibrated scale; with fp8_channel, with each token's own."""
    if target.format == "plain" or not target.inputs:
        return x
    if target.format == "fp8_channel":
        largest = _over_ranks(jnp.max(magnitude(x), -1, keepdims=True), (site.inputs,), site.plan)
    elif (known := _input_largest(site)) is not None:
        largest = known.reshape([1] * x.ndim)
    else:
        raise ValueError(f"inputs in {target.format} without calibrated magnitudes; expected Plan.maxima")
    blocks = (*[1] * (x.ndim - 1), target.input.block or 1)
    found = encode(x.astype(jnp.float32), target.input, blocks, largest)
    return (found.value * found.scale).astype(x.dtype)


def rounded_weights(weights: Sequence[Array], target: Target, site: Site) -> tuple[Array, ...]:
    """The weights (…, d, f) as the target stores them, decoded. They share the scale of their tensor; with fp8_channel,
    of each output."""
    if target.format == "plain":
        return tuple(weights)
    sizes = [magnitude(w) for w in weights]
    if target.format == "fp8_channel":
        largest = [_over_ranks(jnp.max(a, -2, keepdims=True), (site.inputs,), site.plan) for a in sizes]
    else:
        axes = (site.inputs, site.outputs)
        each = [_over_ranks(jnp.max(a, (-2, -1), keepdims=True), axes, site.plan) for a in sizes]
        largest = [functools.reduce(jnp.maximum, each)] * len(weights)
    found = []
    for w, most in zip(weights, largest, strict=True):
        blocks = (*[1] * (w.ndim - 2), target.weight.block or 1, 1)
        encoded = encode(w.astype(jnp.float32), target.weight, blocks, most)
        found.append((encoded.value * encoded.scale).astype(w.dtype))
    return tuple(found)


def _over_ranks(largest: Array, axes: Sequence[str | None], plan: Plan) -> Array:
    largest = finite_or_infinite(largest)
    for axis in axes:
        largest = largest if axis is None else plan.max(largest, axis)
    return largest
