"""The inputs of rounding besides the operands: random words, the tokens' indices, and the number of the layer."""

from typing import NamedTuple

import numpy as np
from jax import Array

# The extra of a batch that holds each token's index in the global batch; and the name, among parameters, of the zeros
# whose gradient counts what rounding loses.
NUMBER, PROBES = "number", "probes"


class Rounding(NamedTuple):
    """The state of one step on one device.

    key: uint32, of the run's seed and the step. tokens: their number in the global batch; chunk: see
    `PrecisionConfig.expert_tokens`. layer_l: the numbers of the layers that follow. number_bt: int32, the index in the
    global batch of each token of this data and context rank; None until a part of the batch is known. probe_l: zeros
    (l, …) for each of these layers, whose gradient is what `precision.counts` counts or `precision.calibration`
    measures; None if nothing is. maxima: for all layers, the largest magnitudes (layers, kinds, calls) of products'
    inputs, from which static scales are computed.
    """

    key: Array
    tokens: int
    chunk: int
    layer_l: Array
    number_bt: Array | None = None
    probe_l: Array | None = None
    maxima: np.ndarray | None = None

    def of_layers(self, start: int, stop: int | None) -> "Rounding":
        """The state for the layers from `start` to `stop` of those that follow."""
        probe = None if self.probe_l is None else self.probe_l[start:stop]
        return self._replace(layer_l=self.layer_l[start:stop], probe_l=probe)

    @property
    def each(self) -> tuple[Array, Array | None]:
        """What differs from layer to layer."""
        return self.layer_l, self.probe_l
