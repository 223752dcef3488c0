"""The parameters of a model with fewer units, cut out of another's one at a time.

A unit that stays keeps its weights. Only the weights of norms change: an RMS norm over fewer channels would divide by
the root mean square of those left, so its weight is multiplied by sqrt(all / left). The result is that of the whole
model if the channels that are gone were zero; the epsilon alone then weighs more, by that ratio. A layer
norm gets the same factor, and is unchanged if the channels left have a mean of zero too.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from orogen.compress.choose import Kept
from orogen.compress.importance import Units
from orogen.compress.rewrite import LayerOf, Source
from orogen.config.kinds import kind_of, resolved
from orogen.config.model import ModelConfig
from orogen.convert.names import Path as Leaf

HIDDEN = "hidden"
# The units along each axis of a mixer's parameters; a row of config/kinds.py names one table. None: all stay.
Axes = Mapping[str, tuple[str | None, ...]]
MLP = {"up": (HIDDEN, "mlp"), "gate": (HIDDEN, "mlp"), "down": ("mlp", HIDDEN), "up_bias": ("mlp",),
       "gate_bias": ("mlp",), "down_bias": (HIDDEN,)}  # fmt: skip
ATTENTION = {
    "query": (HIDDEN, "queries"), "key": (HIDDEN, "keys"), "value": (HIDDEN, "keys"), "out": ("queries", HIDDEN),
    "query_bias": ("queries",), "key_bias": ("keys",), "value_bias": ("keys",), "out_bias": (HIDDEN,),
    "query_norm.weight": (None,), "query_norm.bias": (None,), "key_norm.weight": (None,), "key_norm.bias": (None,),
    "sinks": ("query_heads",),
}  # fmt: skip
LATENT = {
    "query": (HIDDEN, "queries"), "query_down": (HIDDEN, None), "query_down_bias": (None,),
    "query_norm.weight": (None,), "query_norm.bias": (None,), "query_up": (None, "queries"),
    "latent_down": (HIDDEN, None), "latent_down_bias": (None,), "latent_norm.weight": (None,),
    "latent_norm.bias": (None,), "key_rope": (HIDDEN, None), "key_rope_bias": (None,), "key_up": (None, "keys"),
    "value_up": (None, "values"), "out": ("values", HIDDEN), "out_bias": (HIDDEN,),
}  # fmt: skip
MAMBA2 = {
    "z": (HIDDEN, "inner"), "x": (HIDDEN, "inner"), "B": (HIDDEN, None), "C": (HIDDEN, None),
    "dt": (HIDDEN, "mamba_heads"), "z_bias": ("inner",), "x_bias": ("inner",), "B_bias": (None,), "C_bias": (None,),
    "dt_proj_bias": ("mamba_heads",), "conv_x.weight": ("inner", None), "conv_x.bias": ("inner",),
    "conv_B.weight": (None, None), "conv_B.bias": (None,), "conv_C.weight": (None, None), "conv_C.bias": (None,),
    "dt_bias": ("mamba_heads",), "A_log": ("mamba_heads",), "D": ("mamba_heads",), "norm.weight": ("inner",),
    "out": ("inner", HIDDEN), "out_bias": (HIDDEN,),
}  # fmt: skip
MAMBA1 = {
    "x": (HIDDEN, None), "z": (HIDDEN, None), "x_bias": (None,), "z_bias": (None,), "conv.weight": (None, None),
    "conv.bias": (None,), "dt_down": (None, None), "B": (None, None), "C": (None, None), "dt_up": (None, None),
    "dt_bias": (None,), "A_log": (None, None), "D": (None,), "out": (None, HIDDEN), "out_bias": (HIDDEN,),
}  # fmt: skip
EXPERTS = {
    "router.gate": (HIDDEN, "experts"), "router.gate_bias": ("experts",), "router.bias": ("experts",),
    "experts.up": ("experts", "expert_in", "expert_width"), "experts.gate": ("experts", "expert_in", "expert_width"),
    "experts.down": ("experts", "expert_width", "expert_out"), "experts.up_bias": ("experts", "expert_width"),
    "experts.gate_bias": ("experts", "expert_width"), "experts.down_bias": ("experts", "expert_out"),
    "latent_down": (HIDDEN, "latent_in"), "latent_down_bias": ("latent_in",), "latent_up": ("latent_out", HIDDEN),
    "latent_up_bias": (HIDDEN,), "shared_gate": (HIDDEN, None),
    **{f"shared.{name}": tuple("shared" if axis == "mlp" else axis for axis in axes) for name, axes in MLP.items()},
}  # fmt: skip
# The same for parameters outside the layers.
REST: dict[str, tuple[str | None, ...]] = {
    "embedding.weight": (None, HIDDEN), "embedding.positions": (None, HIDDEN), "head.weight": (HIDDEN, None),
    "norm.weight": (HIDDEN,), "norm.bias": (HIDDEN,), "mtp.project": ("two_hidden", HIDDEN),
    **{f"mtp.{norm}.{name}": (HIDDEN,) for norm in ("embedding_norm", "hidden_norm", "final_norm")
       for name in ("weight", "bias")},
}  # fmt: skip
SCALED = (HIDDEN, "inner")  # axes that a norm's mean is over


def units_of(letter: str) -> Axes:
    """The units along the axes of the parameters of a letter's mixer, which can be pruned."""
    return resolved(kind_of(letter).units)


class Pruned:
    """Makes the pruned model's parameters from those of the old one; see `rewrite`."""

    def __init__(self, source: Source, kept: Kept):
        self._source, self._kept = source, kept
        main, every = len(source.config.layers.main), range(len(source.homes))
        self._numbers = (*kept.layers, *every[main:])

    def layer(self, number: int) -> "Sliced":
        """The parameters of the layer that becomes the layer `number`."""
        old = self._numbers[number]
        layer = self._source.layer(old)
        return Sliced(layer, self._source.config, indices(self._source.config, self._kept, old, layer.letter))

    def rest(self, path: Leaf) -> np.ndarray:
        """A parameter outside the layers."""
        hidden, size = self._kept.hidden, self._source.config.hidden_size
        index = {} if hidden is None else {HIDDEN: hidden, "two_hidden": np.concatenate([hidden, hidden + size])}
        array = self._source.read(path)
        name = ".".join(map(str, path))
        left = taken(array, REST[name], index)
        return _scaled(left, len(array), self._source.config) if _is_norm(name) else left


class Sliced(Mapping[Leaf, np.ndarray]):
    """The parameters of one layer, cut on demand, so that one of them is in memory at a time."""

    def __init__(self, layer: LayerOf, config: ModelConfig, index: Units):
        self._layer, self._config, self._index = layer, config, index

    def __getitem__(self, leaf: Leaf) -> np.ndarray:
        array, name = self._layer[leaf], ".".join(map(str, leaf))
        inside = name.removeprefix("mixer.")
        axes = (HIDDEN,) if name.startswith("norm.") else units_of(self._layer.letter)[inside]
        left = taken(array, axes, self._index)
        if _is_norm(name) and axes[0] in SCALED:
            return _scaled(left, len(array), self._config if name.startswith("norm.") else None)
        return left

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self._layer.names)

    def __len__(self) -> int:
        return len(self._layer.names)


def indices(config: ModelConfig, kept: Kept, number: int, letter: str) -> Units:
    """The indices that stay along each axis of the parameters of an old layer; an axis that is missing stays whole."""
    units = dict(kept.units[number])
    found = {name: units[name] for name in ("mlp", "shared", "experts", "expert_width", "latent_in", "latent_out",
                                            "mamba_heads", "query_heads") if name in units}  # fmt: skip
    if kept.hidden is not None:
        found[HIDDEN] = kept.hidden
    if letter == "E":
        inward, outward = ("latent_in", "latent_out") if config.moe_latent_size else (HIDDEN, HIDDEN)
        found |= {name: found[axis] for name, axis in (("expert_in", inward), ("expert_out", outward)) if axis in found}
    if letter == "M" and units:
        heads = units.get("mamba_heads", np.arange(config.mamba_num_heads))
        found["inner"] = _of_heads(heads, config.mamba_head_dim, units.get("mamba_dims"))
    if letter in "*w" and units:
        found["queries"] = _of_heads(units["query_heads"], config.head_dim)
        if "key_heads" in units:
            found["keys"] = _of_heads(units["key_heads"], config.head_dim)
    if letter == "+" and units:
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        for name, size in (("queries", nope + rope), ("keys", nope), ("values", value)):
            found[name] = _of_heads(units["query_heads"], size)
    return found


def _of_heads(heads: np.ndarray, size: int, channels: np.ndarray | None = None) -> np.ndarray:
    """The columns of these heads of `size`, or of some channels of each."""
    return (heads[:, None] * size + (np.arange(size) if channels is None else channels)).reshape(-1)


def taken(array: np.ndarray, axes: tuple[str | None, ...], index: Mapping[str, np.ndarray]) -> np.ndarray:
    """The units along each axis of `array` that `index` names. Two-dimensional indices (e, f) choose other units for
    each entry of the first axis."""
    if "expert_width" in axes and "expert_width" in index:
        place = axes.index("expert_width")
        shape = [1] * array.ndim
        shape[0], shape[place] = index["expert_width"].shape
        array = np.take_along_axis(array, index["expert_width"].reshape(shape), axis=place)
    for place, axis in enumerate(axes):
        if axis is not None and axis != "expert_width" and axis in index:
            array = np.take(array, index[axis], axis=place)
    return array


def norm_factor(whole: int, left: int) -> float:
    """What the weight of a norm over `left` of `whole` channels is multiplied by. A float32, so that a mask that has it
    gives the same bits as a slice."""
    return float(np.float32((whole / left) ** 0.5))


def _is_norm(name: str) -> bool:
    """Whether it is the weight of a norm, on whatever axis."""
    return name.endswith("norm.weight")


def _scaled(weight_d: np.ndarray, whole: int, config: ModelConfig | None) -> np.ndarray:
    """The weight of a norm over fewer channels than `whole`. config: of the model, if it names this norm's form."""
    if len(weight_d) == whole:
        return weight_d
    offset = 1.0 if config is not None and config.norm == "layer_1p" else 0.0
    factor = norm_factor(whole, len(weight_d))
    return (weight_d.astype(np.float64) + offset) * factor - offset
