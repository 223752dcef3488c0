"""What rounding costs a step: the numbers that it loses, by operand and layer, and how far it turns the gradient.

A separate program measures this on sampled steps, so that the other steps cost nothing more.
Letters: l layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from orogen.config.precision import KINDS
from orogen.config.run import RunConfig
from orogen.data.packing import Batch
from orogen.model.by_letter import plain as plain_tree
from orogen.model.layout import Whole
from orogen.model.lm import Built
from orogen.parallel import placement
from orogen.parallel.plan import Plan
from orogen.parallel.rounding_state import PROBES
from orogen.precision.counts import COUNTS, NAMES, probe_shape
from orogen.precision.policy import working_copy
from orogen.train import carry
from orogen.train.state import TrainState
from orogen.train.step import gradients, replay_of
from orogen.train.task import Objective


def make_measure(
    built: Built, objective: Objective, config: RunConfig, plan: Plan, plain: Plan, *, frozen: Any = None
) -> Callable[..., dict[str, Array]]:
    """The jitted function (state, batch[, frozen]) -> counters, float32 (l, kinds, operands, counters), and per layer
    (l,): the cosine between its gradient and that under the plan `plain`, whose products round nothing, and the shares
    of elements that are zero in both.

    Both gradients are computed with the same choices of experts. Vectors do not count: their products are not rounded.
    """
    model, dtype, carried = config.model, config.train.compute_dtype, carry.abstract(config.train, built)
    layers = Whole(model.layers.main, model.layers.mtp)
    count = len(layers.main + layers.mtp)
    probe = nnx.Param(jax.ShapeDtypeStruct(probe_shape(count), jnp.float32), axes=(None,) * 4, float32=True)
    probed = built._replace(params=nnx.State({**plain_tree(built.params), PROBES: probe}))
    settings: Any = {"carried": carried, "frozen": frozen, "seed": config.train.seed}
    rounded = gradients(probed, objective, model, plan, dtype, record=True, **settings)
    exact = gradients(built, objective, model, plain, dtype, replaying=True, **settings)

    def measure(state: TrainState, batch: Batch, frozen: Any = None) -> dict[str, Array]:
        params = placement.working(working_copy(state.params, dtype), plan)
        zeros = probe.replace(jnp.zeros(probe_shape(count)))
        with_probe = nnx.State({**plain_tree(params), PROBES: zeros})
        rest = state.buffers, batch
        at = {"step": state.step, "frozen": frozen}
        _, grads, _, sums = rounded(with_probe, *rest, None, state.carried, **at)
        _, expected, _, _ = exact(params, *rest, replay_of(sums.choices), state.carried, **at)
        counts: Any = grads[PROBES]
        own = nnx.State({name: part for name, part in plain_tree(grads).items() if name != PROBES})
        pair = [built.whole(side) for side in (own, expected)]
        compared = [_compared(*(layers.layer(side, number) for side in pair)) for number in range(count)]
        by_layer = jax.tree.map(lambda *values: jnp.stack(values), *compared)
        return {"counts": counts[...], **by_layer._asdict()}

    return jax.jit(measure, out_shardings=plan.sharding(), compiler_options=plan.compiler_options)


class _Compared(NamedTuple):
    """Two gradients of a layer's matrices: the cosine between them, and the share of zeros in each."""

    cosine: Array
    zeros: Array
    plain_zeros: Array


def _compared(grads: nnx.State, expected: nnx.State) -> _Compared:
    pairs = [
        (a.astype(jnp.float32), b.astype(jnp.float32))
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True)
        if a.ndim > 1
    ]
    total = lambda f: sum((jnp.sum(f(a, b)) for a, b in pairs), start=jnp.zeros(()))  # noqa: E731
    size = max(sum(a.size for a, _ in pairs), 1)
    norms = jnp.sqrt(total(lambda a, _: a * a)) * jnp.sqrt(total(lambda _, b: b * b))
    cosine = jnp.where(norms > 0, total(lambda a, b: a * b) / jnp.where(norms > 0, norms, 1), 0)
    return _Compared(cosine, total(lambda a, _: a == 0) / size, total(lambda _, b: b == 0) / size)


def described(measured: dict[str, Any]) -> dict[str, Any]:
    """The entries of a step's record, from what `make_measure` measured, on the host; `report.metrics` lists the
    keys."""
    counts = {name: np.asarray(measured["counts"][..., i], np.float64) for i, name in enumerate(COUNTS)}
    shares: dict[str, dict[str, dict[str, float]]]
    shares = {name: {} for name in ("zeros", "flushed", "saturated", "nonfinite")}
    scales: dict[str, dict[str, float | None]] = {}
    for layer, kind, operand in np.argwhere(counts["numbers"] > 0):
        at, name = (layer, kind, operand), f"{KINDS[kind]}.{NAMES[operand]}"
        for what, found in shares.items():
            found.setdefault(name, {})[str(layer)] = float(counts[what][at] / counts["numbers"][at])
        blocks = counts["blocks"][at]
        scales.setdefault(name, {})[str(layer)] = float(counts["log2_scale"][at] / blocks) if blocks else None
    flushed = [share for layers in shares["flushed"].values() for share in layers.values()]
    cosine_l = np.asarray(measured["cosine"], np.float64)
    return {
        **{f"rounding_{what}": found for what, found in shares.items()},
        "rounding_log2_scale": scales,
        "most_flushed": max(flushed, default=0.0),
        "least_cosine": float(cosine_l.min()),
        "gradient_cosine": cosine_l.tolist(),
        "gradient_zeros": np.asarray(measured["zeros"], np.float64).tolist(),
        "plain_gradient_zeros": np.asarray(measured["plain_zeros"], np.float64).tolist(),
    }
