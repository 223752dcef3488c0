"""How far a plan may be from one device, and what `verify` reports. Letters: l layers, e experts."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from orogen.config.model import ModelConfig
from orogen.config.plan import PLAINEST, PlanConfig
from orogen.config.reads import plan_read
from orogen.config.rounded import Operand, layer_products
from orogen.config.run import RunConfig
from orogen.moe.layer import Choice
from orogen.precision.policy import DTYPES
from orogen.precision.rounding import FORMATS
from orogen.train.task import Metric

# Relative tolerances in float32. A gradient leaf sums up to a few thousand products in another order.
LOSS, GRADIENT, PARAMETER = 1e-5, 1e-4, 1e-6
# A token's own top-k, and its drops, may differ from the replayed ones only where the margin is below this.
MARGIN = 1e-5
# A leaf this small beside the whole gradient is zero up to rounding; its error is relative to the whole.
NEGLIGIBLE = 1e-7
# Roundings per layer that reach a result, forward and backward: operands, products, norms, activations and sums.
ROUNDINGS = 16
# The largest relative tolerance of a loss or gradient: a gradient that is zero, or twice as large, has an error of 1.
NOISE = 0.5
# The factor by which an update's error may exceed its gradients': Muon's iterations magnify small singular values.
UPDATED = {"adamw": 2, "muon": 20}


class Verdict(NamedTuple):
    """Relative errors of a plan against one device; None for what was not compared.

    loss_error: the largest over all batches. max_gradient_error: of the worst gradient or, for steps, of the worst
    first moment. max_parameter_error: of the worst parameter: after one update by each optimizer from equal gradients,
    relative to the parameter; for steps, relative to its change.
    load_error: the largest difference in an expert's load, in dropped tokens, in a router bias after the update and in
    counters; these are counts and signs, so it is 0 or the plan is wrong.
    flips: tokens whose own choice of experts or drops differed from the replayed one; flip_margin: the largest margin
    of such a choice. zero_leaves: parameters whose gradient is zero up to rounding.
    overflow_rows: assignments that did not fit into a buffer; their contribution is missing, so the plan does not pass.
    tolerances: the bound of each error, by the error's name. shared: implementations that both sides use, as
    field=name; the check says nothing about them.
    """

    loss_error: float
    max_gradient_error: float | None
    worst_leaf: str | None
    max_parameter_error: float | None
    load_error: float
    flips: int
    flip_margin: float
    zero_leaves: list[str]
    dropped_tokens: int
    overflow_rows: int
    what: str
    dtype: str
    tolerances: dict[str, float]
    shared: list[str]

    @property
    def passed(self) -> bool:
        """Whether every error is within its tolerance."""
        errors = {name: getattr(self, name) for name in self.tolerances}
        inside = all(error is None or error <= self.tolerances[name] for name, error in errors.items())
        return inside and self.load_error == 0 and self.overflow_rows == 0


def conditions(what: str, config: RunConfig, reference: PlanConfig) -> dict[str, Any]:
    """The fields of a Verdict that say what was compared and how close it must be. config: the plan's side."""
    dtype = config.train.compute_dtype
    return {
        "what": what,
        "dtype": dtype,
        "tolerances": tolerances(what, config),
        "shared": shared(config.plan, reference, config.model),
    }


def tolerances(what: str, config: RunConfig) -> dict[str, float]:
    """The bound of each error of a `Verdict`, for a plan that computes in `TrainConfig.compute_dtype`, against float32.

    Below float32, n independent roundings by at most u each add up to a relative error of u · sqrt(n); there are
    ROUNDINGS per layer. Source: Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019.
    The result is at most NOISE: with 8 or 4 bits it would pass 1, the error of a gradient that is zero, and hide every
    fault. Few roundings of emulated formats differ, those next to a midpoint: both sides round alike.
    """
    noise = min(unit_roundoff(config) * math.sqrt(ROUNDINGS * depth(config.model)), NOISE)
    exact = config.train.compute_dtype == "float32" and config.plan.linear == "plain" and not config.precision.rounds
    loss, gradient, margin = (LOSS, GRADIENT, MARGIN) if exact else (noise, noise, noise)
    # Updates from equal gradients are float32 whatever the compute dtype.
    parameter = PARAMETER if what == "gradients" else gradient * UPDATED[config.optimizer.name]
    return {
        "loss_error": loss,
        "max_gradient_error": gradient,
        "max_parameter_error": parameter,
        "flip_margin": margin,
    }


def unit_roundoff(config: RunConfig) -> float:
    """The largest relative error of one rounding among the plan's formats."""
    formats = [DTYPES[config.train.compute_dtype]]
    formats += [jnp.float8_e4m3fn, jnp.float8_e5m2] * (config.plan.linear == "fp8")
    # Numbers next to a midpoint are rounded up on one side and down on the other.
    rounded = [2.0 ** -(FORMATS[operand.element].fraction + 1) for operand in _operands(config)]
    return max([*(float(jnp.finfo(f).eps) / 2 for f in formats), *rounded])


def _operands(config: RunConfig) -> list[Operand]:
    """Every kind of operand that the run's products round."""
    layers = layer_products(config.precision, config.model)
    used = {products for layer in layers for _, products in layer}
    pairs = (pair for p in used for pair in (p.forward, p.input_gradient, p.weight_gradient))
    return [operand for pair in pairs for operand in pair or ()]


def depth(model: ModelConfig) -> int:
    """Layers between a token and the deepest loss, embedding and head among them."""
    return len(model.layers.main) + model.mtp_depths * (len(model.layers.mtp) + 1) + 2


def shared(config: PlanConfig, reference: PlanConfig, model: ModelConfig) -> list[str]:
    """The implementations of the model's operations that plan and reference share, as field=name."""
    used = (field for field in PLAINEST if plan_read(model, config, field))
    same = (field for field in used if getattr(config, field) == getattr(reference, field))
    return [f"{field}={getattr(config, field)}" for field in same]


class LeafErrors(NamedTuple):
    """The relative error of each leaf (difference norm over leaf norm), and the indices of the leaves that are zero in
    the reference, up to rounding; their errors are relative to the norm of all leaves."""

    relative: np.ndarray
    zero: list[int]


def leaf_errors(reference: Any, other: Any) -> LeafErrors:
    """The errors of a tree's leaves against a reference."""
    pairs = list(zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True))
    norms = np.array([np.linalg.norm(np.asarray(a, np.float64)) for a, _ in pairs])
    whole = np.linalg.norm(norms)
    zero = norms <= NEGLIGIBLE * whole
    differences = np.array([np.linalg.norm(np.asarray(a, np.float64) - b) for a, b in pairs])
    relative = differences / np.maximum(np.where(zero, whole, norms), np.finfo(float).tiny)
    return LeafErrors(relative, np.flatnonzero(zero).tolist())


def flips(choices: Any) -> tuple[int, float]:
    """The number of tokens replayed against their own choice, and the largest margin among them."""
    found = jax.tree.leaves(choices, is_leaf=lambda x: isinstance(x, Choice))
    count = sum(int(c.flipped.sum()) for c in found)
    return count, largest(c.margin[c.flipped].max() for c in found if c.flipped.any())


def metric_error(reference: Mapping[str, Metric], other: Mapping[str, Metric]) -> float:
    """The largest error of a metric's sum, relative to the sum or, where signs cancel most of it, to the count; and of
    a count, relative to itself."""
    errors = []
    for name, (total, count) in reference.items():
        size = np.maximum(np.abs(total), np.abs(count)) + np.finfo(float).tiny
        errors += [np.max(np.abs(other[name].sum - total) / size), np.max(np.abs(other[name].count - count) / size)]
    return largest(errors)


def largest_difference(reference: Any, other: Any) -> float:
    """The largest difference between corresponding numbers of two trees."""
    pairs = zip(jax.tree.leaves(reference), jax.tree.leaves(other), strict=True)
    return largest(np.abs(np.asarray(a) - b).max(initial=0) for a, b in pairs)


def largest(values: Iterable[Any]) -> float:
    """The largest value; 0 if there are none; NaN if one is NaN, which Python's max may miss."""
    return float(np.max([0.0, *values]))
