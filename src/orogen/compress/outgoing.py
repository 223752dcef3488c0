"""What pruning looks at in an open model's weights: whether all are finite, and how strongly each unit is read, the L2
norm of the weights that leave it.

Letters: f hidden, h heads, p Mamba head size, e experts, w latent width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orogen.checkpoint.leaves import dotted, leaves_of
from orogen.checkpoint.open import Opened
from orogen.compress.importance import Units, shapes
from orogen.config.checks import ConfigError
from orogen.convert.names import Path as Leaf
from orogen.model.homes import homes

# By score of units: the mixer's parameters that read them, the axes that are summed over, and a parameter that
# multiplies the units before. Scores that are missing are of outputs, or of what the residual stream holds.
READERS: dict[str, tuple[tuple[str, ...], tuple[int, ...], str | None]] = {
    "mlp": (("down",), (-1,), None), "shared": (("shared.down",), (-1,), None), "heads": (("out",), (-1,), None),
    "mamba": (("out",), (-1,), "norm.weight"), "expert_width": (("experts.down",), (-1,), None),
    "latent_in": (("experts.up", "experts.gate"), (-3, -1), None), "latent_out": (("latent_up",), (-1,), None),
}  # fmt: skip


def require_finite(opened: Opened) -> None:
    """Raises ConfigError with the name of the first parameter that has a number which is not finite."""
    leaves = {path: leaf[...] for path, leaf in leaves_of(opened.params, opened.buffers).items()}
    look = lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)  # noqa: E731
    for path, whole in jax.device_get(jax.jit(look, out_shardings=opened.plan.sharding())(leaves)).items():
        if not whole:
            raise ConfigError(f"{dotted(path)} has a number that is not finite; expected finite weights")


def outgoing(opened: Opened) -> list[Units]:
    """By layer, along the pattern, the norms of the weights that leave the units of each name in READERS, float64, in
    the shapes of the scores. Those of a head are taken over all its channels."""
    every, (_, shaped) = homes(opened.config), shapes(opened.config)
    named = {home.path: [name for name in units if name in READERS] for home, units in zip(every, shaped, strict=True)}

    def squares(params: Any) -> dict[Leaf, dict[str, jax.Array]]:
        flat = leaves_of(params)
        return {path: {name: _squares(flat, path, name) for name in names} for path, names in named.items()}

    found = jax.device_get(jax.jit(squares, out_shardings=opened.plan.sharding())(opened.params))
    return [
        {name: _norms(found[home.path][name][home.index], units[name]) for name in named[home.path]}
        for home, units in zip(every, shaped, strict=True)
    ]


def _squares(flat: dict[Leaf, Any], path: Leaf, name: str) -> jax.Array:
    """Σ of the squares of the weights that leave the units, behind the axes of repeated layers."""
    readers, summed, factor = READERS[name]
    leaf = lambda reader: (*path, "mixer", *reader.split("."))  # noqa: E731
    present = [flat[leaf(reader)][...].astype(jnp.float32) for reader in readers if leaf(reader) in flat]
    if factor is not None:
        present = [weight * flat[leaf(factor)][...].astype(jnp.float32)[..., None] for weight in present]
    return sum((jnp.sum(jnp.square(weight), axis=summed) for weight in present), start=jnp.zeros(()))


def _norms(squares: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.sqrt(np.asarray(squares, np.float64).reshape(*shape, -1).sum(-1))
