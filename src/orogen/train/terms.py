"""The size of a loss before its terms cancel: the scale of its error where weights, or objectives, have both signs.

Letters: b batch, t time, d model, r rows (sequences).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.config.model import ModelConfig
from orogen.data.packing import Batch
from orogen.model.lm import LanguageModel
from orogen.parallel.plan import Plan
from orogen.train.task import ByName, Metric, Objective

ROWS = "rows of "  # prefixed to a metric's name, names its sums by row


def by_row(objective: Objective) -> Objective:
    """`objective`, which also measures each of its sums row by row: (r, …) under ROWS + name, with the counts of the
    whole batch. For a single device, which has all rows."""

    def counts(batch: Batch, depths: int, plan: Plan) -> ByName:
        found, rows = objective.counts(batch, depths, plan), len(batch.tokens_bt)
        return found | {
            ROWS + name: jnp.broadcast_to(count, (rows, *jnp.shape(count))) for name, count in found.items()
        }

    def sums(model: LanguageModel, hidden: list[Array], batch: Batch, plan: Plan) -> ByName:
        def of_row(row: tuple[list[Array], Batch]) -> ByName:
            hidden, batch = jax.tree.map(lambda x: x[None], row)
            return objective.sums(model, hidden, batch, plan)

        apart = jax.lax.map(of_row, (jax.lax.stop_gradient(hidden), batch))
        return objective.sums(model, hidden, batch, plan) | {ROWS + name: rows for name, rows in apart.items()}

    return dataclasses.replace(objective, counts=counts, sums=sums)


def without_rows(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics without those that `by_row` adds."""
    return {name: metric for name, metric in metrics.items() if not name.startswith(ROWS)}


def loss_size(loss: float, metrics: Mapping[str, Metric], objective: Objective, config: ModelConfig) -> float:
    """The sum of the magnitudes of the loss's terms, for an objective of `by_row`: each row's means times their shares,
    and the router losses, which are never negative. Exactly |loss| if no row's term is negative."""
    shares = objective.shares(config, objective.depths(config))
    routers = loss - sum(share * float(np.sum(metrics[name].mean)) for name, share in shares.items())
    rows = [share * _rows(metrics, name).ravel() for name, share in shares.items()]
    return float(_size(loss, np.concatenate([*rows, [max(routers, 0.0)]])))


def mean_sizes(metrics: Mapping[str, Metric]) -> dict[str, np.ndarray]:
    """By name, the sum of the magnitudes of what each row adds to a metric's mean, for an objective of `by_row`.
    Exactly |mean| if all have the same sign."""
    return {name: _size(metric.mean, _rows(metrics, name)) for name, metric in without_rows(metrics).items()}


def _rows(metrics: Mapping[str, Metric], name: str) -> np.ndarray:
    return np.asarray(metrics[ROWS + name].mean, np.float64)


def _size(total: np.ndarray | float, terms: np.ndarray) -> np.ndarray:
    """The sum of the magnitudes of `terms` (r, …), whose sum is `total`: |total| plus twice what cancels."""
    positive, negative = (np.where(sign * terms > 0, sign * terms, 0).sum(0) for sign in (1, -1))
    return np.abs(total) + 2 * np.minimum(positive, negative)
