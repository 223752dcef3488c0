"""A parameter of a model: its shape, the axes it is split along, its dtype."""

from typing import NamedTuple

from orogen.config.model import ModelConfig


class Weight(NamedTuple):
    """A parameter: shape, the logical axis of each dimension, and whether it is float32 in any compute dtype."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    float32: bool = False


def vector(size: int, axis: str | None) -> Weight:
    """A vector, float32 in any compute dtype."""
    return Weight((size,), (axis,), float32=True)


def norm(model: ModelConfig, size: int | None = None) -> tuple[Weight, ...]:
    """The scale of a norm, and for a LayerNorm its shift."""
    return (vector(size or model.hidden_size, "norm"),) * (1 if model.norm.startswith("rms") else 2)
