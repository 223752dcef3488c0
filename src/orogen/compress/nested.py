"""Submodels of a model whose units are in the order of their importance, as masks of its parameters.

A submodel has the first units of each kind, and the layers that are left when the least important are removed. Its mask
multiplies the parameters of absent units by 0, and the weights of norms by the factor of a slice
(`slices.norm_factor`). A plan with `nested` reads such parameters as the submodel's: norms leave absent channels out of
their means, and no token is routed to an absent expert. Whatever else an absent unit adds to a sum is exactly zero.

Letters: c choices of a size, u units, l layers.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from orogen.checkpoint.leaves import dotted, leaves_of
from orogen.compress.choose import choose
from orogen.compress.importance import order_scores
from orogen.compress.rewrite import homes
from orogen.compress.slices import HIDDEN, REST, SCALED, indices, norm_factor, units_of
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.prune import PruneConfig

LAYERS, HIDDEN_SIZE = "num_layers", "hidden_size"
# The last parts of the names of parameters that write what units have computed. A mask's gradient is taken there alone:
# elsewhere it would count a unit once more for each parameter. With a latent, what experts write there is read by
# latent_up, which counts its units.
WRITE = ("down", "out", "latent_up")
# By name of an axis, the masks (c, u) of the size that it depends on.
Masks = dict[str, np.ndarray]
# By size, which of its choices is taken (c): 1 for one and 0 for the others.
Picks = Mapping[str, Any]


class Nesting:
    """The submodels of a model. choices: the values of each size, the largest being the model's own. removal: the
    numbers of the layers in the order in which they are removed."""

    def __init__(self, config: ModelConfig, choices: Mapping[str, Sequence[int]], removal: Sequence[int] = ()):
        self.config, self.choices, self.removal = config, dict(choices), tuple(removal)
        self._homes = homes(config)
        self._latent = bool(config.moe_latent_size)

    @functools.cached_property
    def _of_letter(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """`_masks` by letter. Computed on first use, since the choices must be checked first."""
        return {letter: self._masks(letter) for letter in dict.fromkeys(home.letter for home in self._homes)}

    def settings(self, sizes: Mapping[str, int]) -> PruneConfig:
        """The settings by which `orogen prune` cuts out the submodel of these sizes."""
        widths: Any = {field: size for field, size in sizes.items() if field != LAYERS}
        widths = widths or {HIDDEN_SIZE: self.config.hidden_size}  # layers alone, all of which may stay
        return PruneConfig(**widths, remove_layers=self.removed(sizes.get(LAYERS)), width_scores="order")

    def removed(self, layers: int | None) -> tuple[int, ...]:
        """The numbers of the layers that a submodel of so many layers lacks."""
        main = len(self.config.layers.main)
        return tuple(sorted(self.removal[: main - (main if layers is None else layers)]))

    def picks(self, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        """The picks of a submodel with these sizes, which are among the choices; missing ones are the model's own."""
        chosen = {field: sizes.get(field, max(choices)) for field, choices in self.choices.items()}
        return {field: (np.array(self.choices[field]) == size).astype(np.float32) for field, size in chosen.items()}

    def check(self, params: nnx.State) -> None:
        """Raises ConfigError if the whole model has zeros where they say that something is absent (`Plan.nested`)."""

        def empty(params: nnx.State) -> dict[str, Array]:
            found = {}
            for path, leaf in leaves_of(params).items():
                name, value = dotted(path), leaf.get_value()
                if name.endswith("norm.weight") and (self.config.norm == "rms" or name.endswith("mixer.norm.weight")):
                    found[name] = jnp.any(value == 0)
                elif name.endswith("router.gate"):  # an expert's column, and a layer's first row
                    found[name] = jnp.any(jnp.all(value == 0, -2)) | jnp.any(jnp.all(value[..., 0, :] == 0, -1))
            return found

        for name, is_empty in jax.jit(empty)(params).items():
            if is_empty:
                raise ConfigError(
                    f"the student's {name} has zeros that mean absent units to an elastic model; expected none"
                )

    def masked(self, params: nnx.State, picks: Picks) -> nnx.State:
        """The parameters of the picked submodel: those of the whole model, times masks."""
        held = {home.path: home.letter for home in self._homes}
        depth = sorted({len(path) for path in held})

        def of(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
            keys = tuple(getattr(key, "key", key) for key in path)
            home = next((keys[:size] for size in depth if keys[:size] in held), None)
            if home is None:
                name, letter = ".".join(map(str, keys)), self._homes[0].letter
                mask = self._mask(name, REST[name], self._of_letter[letter], picks)
            else:
                letter, inside = held[home], ".".join(map(str, keys[len(home) :]))
                name = inside.removeprefix("mixer.")
                axes = (HIDDEN,) if inside.startswith("norm.") else units_of(letter)[name]
                mask = self._mask(inside, axes, self._of_letter[letter], picks)
                if LAYERS in picks and home[0] == "backbone" and not inside.startswith("norm."):
                    mask = self._of_present(name, axes, self._present(home, len(axes), picks), mask)
            return variable.replace(variable.get_value() * mask)

        return jax.tree_util.tree_map_with_path(of, params, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def present_experts(self, picks: Picks) -> list[Array]:
        """For each load in `loss.Sums`, which experts the submodel has (…, e): none in a removed layer. Leading axes
        are those of a module's repetitions; they are missing if all repetitions have the same experts."""
        masks = self._of_letter.get("E", {}).get("experts", {})
        present_e = jnp.ones(self.config.n_routed_experts or 0)
        for field, mask_ce in masks.items():
            present_e = jnp.matmul(picks[field], mask_ce, precision="highest")
        paths = sorted({home.path for home in self._homes if home.letter == "E"})
        removable = [LAYERS in picks and path[0] == "backbone" for path in paths]
        return [
            self._present(path, 1, picks) * present_e if removed else present_e
            for path, removed in zip(paths, removable, strict=True)
        ]

    def _mask(
        self, name: str, axes: tuple[str | None, ...], masks: Mapping[str, Mapping[str, np.ndarray]], picks: Picks
    ) -> Array:
        """What a parameter is multiplied by, broadcast over the axes that have no choice."""
        writes = name.rpartition(".")[2] in WRITE or name.startswith(("embedding.", "mtp.project"))
        product: Any = jnp.ones((1,) * len(axes))
        for place, axis in enumerate(axes):
            for field, mask_cu in masks.get(axis or "", {}).items():
                mask_u = jnp.matmul(picks[field], mask_cu, precision="highest")
                learns = writes and (axis != "expert_out" or not self._latent)
                shape = [1] * len(axes)
                shape[place] = mask_u.size
                product = product * (mask_u if learns else lax.stop_gradient(mask_u)).reshape(shape)
        if name.endswith("norm.weight") and axes[0] in SCALED:
            product = product * self._factor(masks.get(axes[0], {}), picks)
        return product

    def _of_present(self, name: str, axes: tuple[str | None, ...], present: Array, mask: Array) -> Array:
        """The mask of a parameter of a removable layer: of what it writes to the stream, exactly once, and of the first
        row of a router's gate, which tells the router (`Router.present`). The other rows still route tokens."""
        if name == "router.gate":
            first_d1 = (np.arange(self.config.hidden_size) == 0)[:, None]
            return jnp.where(first_d1, lax.stop_gradient(present), 1) * mask
        return present * mask if axes[-1] == HIDDEN or (axes[-1] == "expert_out" and not self._latent) else mask

    def _factor(self, masks: Mapping[str, np.ndarray], picks: Picks) -> Array:
        """The factor of the weight of a norm over these channels."""
        fields = list(masks)
        shares = [mask_cu.mean(1) for mask_cu in masks.values()]
        whole = max((mask_cu.shape[1] for mask_cu in masks.values()), default=1)
        left = functools.reduce(np.multiply.outer, shares, np.ones(()))
        table = np.vectorize(lambda share: norm_factor(whole, round(share * whole)), otypes=[np.float32])(left)
        for field in fields:
            table = jnp.tensordot(lax.stop_gradient(picks[field]), table, axes=1, precision="highest")
        return jnp.asarray(table)

    def _present(self, home: tuple[Any, ...], axes: int, picks: Picks) -> Array:
        """Whether the layers of a module are present, with the axes of their repetitions in front of a parameter's."""
        main = len(self.config.layers.main)
        numbers = {h.index: number for number, h in enumerate(self._homes[:main]) if h.path == home}
        present_cl = np.ones((len(self.choices[LAYERS]), main), np.float32)
        for row, layers in enumerate(self.choices[LAYERS]):
            present_cl[row, list(self.removed(layers))] = 0
        index = np.array([numbers[key] for key in sorted(numbers)])
        stacked = tuple(np.max(list(numbers), axis=0) + 1) if next(iter(numbers)) else ()
        present_l = jnp.matmul(picks[LAYERS], present_cl, precision="highest")
        return present_l[index].reshape(*stacked, *(1,) * axes)

    def _masks(self, letter: str) -> dict[str, dict[str, np.ndarray]]:
        """By axis of the parameters of layers of a letter, and by size, the masks (c, u) of its choices."""
        number = next(n for n, home in enumerate(self._homes) if home.letter == letter)
        scores, everything = order_scores(self.config), tuple(range(len(self.config.layers.main)))
        found: dict[str, dict[str, np.ndarray]] = {}
        for field, choices in self.choices.items():
            if field == LAYERS:
                continue
            kept = [
                indices(
                    self.config, choose(self.config, self.settings({field: size}), scores, everything), number, letter
                )
                for size in choices
            ]
            for axis in kept[0]:
                index = [one[axis][0] if one[axis].ndim > 1 else one[axis] for one in kept]
                mask_cu = np.zeros((len(choices), max(map(len, index))), np.float32)
                for row, units in enumerate(index):
                    mask_cu[row, units] = 1
                found.setdefault(axis, {})[field] = mask_cu
        if HIDDEN in found:
            found["two_hidden"] = {field: np.tile(mask_cu, 2) for field, mask_cu in found[HIDDEN].items()}
        return found
