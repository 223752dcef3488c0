"""Log-probabilities of the tokens of packed batches under given weights, on any plan, for the host.

Letters: b batch, t time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from orogen.config.run import RunConfig
from orogen.data.packing import Batch
from orogen.model.heads import log_likelihoods
from orogen.model.lm import Built, LanguageModel
from orogen.parallel.context import later
from orogen.parallel.plan import Plan
from orogen.train.heldout import at_work, heldout_plan, measure
from orogen.train.loss import ROUTING
from orogen.train.step import batch_to_devices
from orogen.train.task import ByName, Objective

LIKELIHOOD, ROW, PLACE = "likelihood", "row", "place"


class Likelihoods:
    """What the training forward says of each next token. The programs are those of the held-out loss, so pipelines,
    context and ZeRO are included; experts drop nothing."""

    def __init__(self, config: RunConfig, built: Built) -> None:
        self._config, self._built, self.plan = config, built, heldout_plan(config)
        self._programs: dict[tuple[int, int], Callable[..., Any]] = {}

    def of(self, params: Any, buffers: Any, batch: Batch) -> np.ndarray:
        """(b, t) float32: the log-probability of token t + 1, given its document so far; 0 at the end of a row.
        params: as they are stored between steps. Of the batch's extras, only ROUTING is read."""
        shape = batch.tokens_bt.shape
        row_bt, place_bt = np.indices(shape, np.int32)
        replayed = {name: array for name, array in batch.extras.items() if name == ROUTING}
        asked = batch._replace(extras={ROW: row_bt, PLACE: place_bt, **replayed})
        found = self._program(shape)(at_work(params, self.plan), buffers, batch_to_devices(asked, self.plan))
        return np.asarray(jax.device_get(found[LIKELIHOOD].sum), np.float32)

    def _program(self, shape: tuple[int, int]) -> Callable[..., Any]:
        if shape not in self._programs:
            self._programs[shape] = measure(
                self._built, _by_place(shape), self._config.model, self.plan, self._config.train.compute_dtype
            )
        return self._programs[shape]


def _by_place(shape: tuple[int, int]) -> Objective:
    """The log-probabilities of a global batch of this shape, each at its own place, where other devices have zeros."""

    def counts(batch: Batch, depths: int, plan: Plan) -> ByName:
        there_bt = (batch.segments_bt != 0).astype(jnp.float32)
        return {LIKELIHOOD: _spread(there_bt, batch, shape)}

    def sums(model: LanguageModel, hidden: list[Array], batch: Batch, plan: Plan) -> ByName:
        found_bt = log_likelihoods(hidden[0], model, later(batch.tokens_bt, 1, plan), plan)
        return {LIKELIHOOD: _spread(jnp.where(batch.segments_bt != 0, found_bt, 0), batch, shape)}

    return Objective(counts=counts, sums=sums, shares=lambda config, depths: {LIKELIHOOD: 1.0}, deeper=False)


def _spread(x_bt: Array, batch: Batch, shape: tuple[int, int]) -> Array:
    flat = batch.extras[ROW] * shape[1] + batch.extras[PLACE]
    return jax.ops.segment_sum(x_bt.ravel(), flat.ravel(), shape[0] * shape[1]).reshape(shape)
