"""What the rounding of operands reads beside them: random words, the tokens' numbers, and the layer that it is in."""

from typing import NamedTuple

import numpy as np
from jax import Array

# The extra of a batch that holds the number of each token in the global batch; and the name, among parameters, of the
# zeros whose gradient counts what rounding loses.
NUMBER, PROBES = "number", "probes"


class Rounding(NamedTuple):
    """On one device, of one step.

    key: uint32, of the run's seed and the step. tokens: of the global batch; chunk: see
    `PrecisionConfig.expert_tokens`. layer_l: the numbers of the layers to come. number_bt: int32, the number of each
    token of this data and context rank in the global batch, row by row; None until a part of the batch is known.
    probe_l: zeros (l, …) for each of the layers to come, whose gradient is what `precision.counts` counts or
    `precision.calibration` measures; None: nothing is. maxima: of all layers, the largest magnitudes (layers, kinds,
    calls) of products' inputs, on which their static scales depend.
    """

    key: Array
    tokens: int
    chunk: int
    layer_l: Array
    number_bt: Array | None = None
    probe_l: Array | None = None
    maxima: np.ndarray | None = None

    def of_layers(self, start: int, stop: int | None) -> "Rounding":
        """The layers from `start` to `stop` of those to come."""
        probe = None if self.probe_l is None else self.probe_l[start:stop]
        return self._replace(layer_l=self.layer_l[start:stop], probe_l=probe)

    @property
    def each(self) -> tuple[Array, Array | None]:
        """What differs from layer to layer."""
        return self.layer_l, self.probe_l
