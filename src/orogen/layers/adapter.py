"""Low-rank adapters: a frozen weight and the two factors that are trained beside it (LoRA, arXiv:2106.09685).

Letters: d width in, f width out, r rank.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from orogen.config.lora import LoraConfig
from orogen.config.products import product_of
from orogen.layers.parameter import parameter

WEIGHT, FACTORS = "weight", ("lora_a", "lora_b")


class Adapted(nnx.Module):
    """A weight (…, d, f) with factors A (…, d, r) and B (…, r, f), in place of the weight alone.

    The factors are float32 between steps and have the weight's logical axes; the axis of the rank is never split.
    """

    def __init__(self, weight: nnx.Param, lora: LoraConfig, rngs: nnx.Rngs):
        *lead, inputs, outputs = weight.get_value().shape
        *stacked, into, out = weight.get_metadata()["axes"]
        self.scale, self.weight = lora.scale, weight
        drawn = jax.random.uniform(rngs.params(), (*lead, inputs, lora.rank), minval=-1, maxval=1) * inputs**-0.5
        self.lora_a = parameter(drawn, (*stacked, into, None), float32=True)
        self.lora_b = parameter(jnp.zeros((*lead, lora.rank, outputs)), (*stacked, None, out), float32=True)


# A weight as the functions of `linear.py` take it.
Weight = nnx.Param | Adapted


def base_of(weight: Weight) -> nnx.Param:
    """The weight without its factors."""
    return weight.weight if isinstance(weight, Adapted) else weight


def adapt(mixer: nnx.Module, letter: str, lora: LoraConfig, rngs: nnx.Rngs) -> None:
    """Gives the mixer's weights of the chosen kinds their factors."""
    for module, below in _modules(mixer):
        for name, value in list(vars(module).items()):
            product = product_of(letter, ("mixer", *below, name)) if isinstance(value, nnx.Param) else None
            if product is not None and product[0] in lora.kinds:
                setattr(module, name, Adapted(value, lora, rngs))


def _modules(mixer: nnx.Module) -> list[tuple[nnx.Module, tuple[str, ...]]]:
    """The mixer and its own modules, each with its path."""
    inside = [(value, (name,)) for name, value in vars(mixer).items() if isinstance(value, nnx.Module)]
    return [(mixer, ()), *inside]


def is_factor(path: tuple[Any, ...]) -> bool:
    """Whether the parameter at this path of a model's state is an adapter's factor."""
    return path[-1] in FACTORS


def apart(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The parameters without the factors, and the factors."""
    flat = nnx.to_flat_state(params)
    split = ([(path, leaf) for path, leaf in flat if is_factor(path) == chosen] for chosen in (False, True))
    weights, factors = map(nnx.from_flat_state, split)
    return weights, factors


def without_adapters(params: nnx.State) -> nnx.State:
    """The parameters with adapters that add nothing: their factors B are zero. All other arrays are shared, not
    copied."""

    def off(path: tuple[Any, ...], leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(jnp.zeros_like(leaf.get_value())) if path[-1] == FACTORS[1] else leaf

    return nnx.from_flat_state([(path, off(path, leaf)) for path, leaf in nnx.to_flat_state(params)])


def merged(weights: nnx.State, factors: nnx.State, scale: float) -> nnx.State:
    """The parameters of the model without adapters, whose weights are W + scale · A B, summed in float32. weights,
    factors: as `apart` gives them."""
    of_weights: Any = dict(nnx.to_flat_state(factors))
    found = {}
    for path, leaf in nnx.to_flat_state(weights):
        pair = [of_weights.get((*path[:-1], name)) for name in FACTORS]
        if path[-1] != WEIGHT or pair[0] is None:
            found[path] = leaf
            continue
        a, b = (factor.get_value().astype(jnp.float32) for factor in pair)
        added = scale * jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
        value = leaf.get_value()
        found[path[:-1]] = leaf.replace((value.astype(jnp.float32) + added).astype(value.dtype))
    return nnx.from_flat_state(list(found.items()))
