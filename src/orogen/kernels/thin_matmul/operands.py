"""What a product of few rows takes. Letters: d width in, f width out, e groups, g groups of neighbouring rows."""

from typing import NamedTuple

from jax import Array


class Matrix(NamedTuple):
    """Weights (d, f), or (e, d, f) of e groups; in E4M3 with scales (…, g, f), one per column and d / g rows."""

    values: Array
    scale: Array | None = None

    @property
    def scale_rows(self) -> int:
        """Rows of the weights that share a scale; all if there are no scales."""
        return self.values.shape[-2] // (1 if self.scale is None else self.scale.shape[-2])
