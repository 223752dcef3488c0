"""Parameters that a model holds in 8 bits, as a quantised checkpoint stores them."""

import math
from typing import Any

import jax
import numpy as np

from orogen.checkpoint.tensors import HuggingFaceTensors
from orogen.config.checks import ConfigError, require
from orogen.config.dtype import BYTES
from orogen.convert import names
from orogen.parallel.plan import Plan
from orogen.precision.scaled import Scaled
from orogen.precision.stored import E4M3, FP8, spread_scale


class Held:
    """The parameters of a checkpoint that can be held in 8 bits, and their arrays.

    These are the weights of products (`layers/linear.py` decodes them) of which every part is stored in FP8. Others,
    such as a parameter of repeated layers of which one is not quantised, are decoded. Raises ConfigError if there are
    none.
    """

    def __init__(self, tensors: HuggingFaceTensors):
        self._tensors = tensors
        self.paths = {path for path in tensors.pieces if self._can(path)}
        if not self.paths:
            raise ConfigError(
                f"EngineConfig.weights is 'fp8'; expected 'decoded': {tensors.folder} has no weights of products in FP8"
            )

    def _can(self, path: names.Path) -> bool:
        if "mixer" not in path or "router" in path:
            return False
        parts = [self._tensors.parts.get(name) for name, _ in self._tensors.pieces[path]]
        return all(part is not None and part.scheme.kind in FP8 for part in parts)

    def share(self, dtype: str) -> float:
        """The bytes of all parameters with some in 8 bits, relative to those with all in `dtype`. Scales are not
        counted: they are few."""
        shapes = names.leaf_shapes(self._tensors.table)
        sizes = {True: 0, False: 0}
        for path, shape in shapes.items():
            sizes[path in self.paths] += math.prod(shape)
        whole = BYTES[dtype] * (sizes[True] + sizes[False])
        return (sizes[True] + BYTES[dtype] * sizes[False]) / whole

    def array(self, path: names.Path, sharding: Any, plan: Plan) -> Scaled | None:
        """The parameter in 8 bits in this sharding, None if it is not held so. Raises ConfigError for a plan that
        gathers weights."""
        if path not in self.paths:
            return None
        require(plan.config.fsdp == "none", plan.config, "fsdp", "'none' where weights are held in FP8")
        shape = names.leaf_shapes(self._tensors.table)[path]
        pieces = shape[-2] // sharding.shard_shape(shape)[-2]
        groups = math.lcm(pieces, *(self._groups(name, shape[-2]) for name, _ in self._tensors.pieces[path]))
        if shape[-2] % groups:
            return None
        values = np.empty(shape, E4M3)
        scale = np.empty((*shape[:-2], groups, shape[-1]), np.float32)
        for name, piece in self._tensors.pieces[path]:
            stored, turned = self._tensors.quantised(name), self._tensors.parts[name].turned
            assert stored is not None
            for target, array in ((values, stored.values), (scale, spread_scale(stored))):
                file = array.swapaxes(-1, -2) if turned else array
                part = piece.take(np.broadcast_to(file, self._tensors.table[name].shape))
                target[piece.index] = part if target is values else part[..., :: shape[-2] // groups, :]
        put = lambda array: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])  # noqa: E731
        return Scaled(put(values), put(scale))

    def _groups(self, name: str, rows: int) -> int:
        """The number of groups into which the scales of a tensor divide its inputs; more than `rows` if blocks do not
        divide them."""
        part = self._tensors.parts[name]
        if part.scheme.kind != "fp8_block":
            return 1
        size = part.scheme.block[1]
        return rows // size if rows % size == 0 else 2 * rows
