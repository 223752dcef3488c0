"""Recipes: the format of each product with a weight, layer by layer. They are data; `orogen.precision` computes."""

import dataclasses

from orogen.config.checks import require, require_choice
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.quantize import Measured
from orogen.config.rounded import Products

# Formats of a product's operands: the compute dtype, or 8 bits with one scale per tensor.
PLAIN, FP8 = "plain", "fp8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Formats:
    """The formats of a weight's three products: y = x w, dx = dy wᵀ and dw = xᵀ dy."""

    forward: str = PLAIN
    input_gradient: str = PLAIN
    weight_gradient: str = PLAIN

    def __post_init__(self) -> None:
        for role in dataclasses.fields(self):
            require_choice(self, role.name, (PLAIN, FP8))

    @property
    def of_input(self) -> tuple[str, str]:
        """The formats in which products read x."""
        return self.forward, self.weight_gradient

    @property
    def of_weight(self) -> tuple[str, str]:
        """The formats in which products read w."""
        return self.forward, self.input_gradient

    @property
    def of_gradient(self) -> tuple[str, str]:
        """The formats in which products read dy."""
        return self.input_gradient, self.weight_gradient

    def names(self) -> set[str]:
        """The formats in use."""
        return {*self.of_input, *self.of_gradient}


IN_PLAIN = Formats()
IN_FP8 = Formats(forward=FP8, input_gradient=FP8, weight_gradient=FP8)


# Of the keys and of the values of a layer.
Scales = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """What a layer keeps of earlier tokens in fewer bits.

    key_values: the scales of keys and values in FP8, None: they are in the compute dtype. Latent attention keeps
    vectors that both are computed from, with the first. random_states: whether the states of an SSM that are not
    float32 are rounded at random, or else to the nearest.
    """

    key_values: Scales | None = None
    random_states: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The formats of one layer's products, by kind of weight: `linear` matrices, the `grouped` ones of routed experts,
    and the `head`, which is outside the layers. The last two are implemented in the compute dtype only.

    rounded: by kind of weight (`config/precision.py`), products whose operands are rounded first, on any device.
    measured: by kind of weight, products of a model that is being quantised.
    stored: keys, values and states.
    """

    linear: Formats = IN_PLAIN
    grouped: Formats = IN_PLAIN
    head: Formats = IN_PLAIN
    rounded: tuple[tuple[str, Products], ...] = ()
    measured: tuple[tuple[str, Measured], ...] = ()
    stored: Stored = Stored()

    def __post_init__(self) -> None:
        for kind in ("grouped", "head"):
            expected = f"{IN_PLAIN}: no other product of this kind is implemented"
            require(getattr(self, kind) == IN_PLAIN, self, kind, expected)

    def names(self) -> set[str]:
        """The formats in use, other than those of `rounded`."""
        return self.linear.names() | self.grouped.names() | self.head.names()

    def products(self, kind: str) -> Products | None:
        """How the products with weights of this kind round their operands; None if none does."""
        return dict(self.rounded).get(kind)

    def measures(self, kind: str | None) -> Measured | None:
        """What products with weights of this kind measure; None if nothing."""
        return None if kind is None else dict(self.measured).get(kind)


# By the names of `PlanConfig.linear`.
RECIPES = {PLAIN: Recipe(), FP8: Recipe(linear=IN_FP8)}


def layer_recipes(config: PlanConfig, model: ModelConfig) -> tuple[Recipe, ...]:
    """The recipe of each layer of the pattern, then of each layer of the multi-token-prediction block. The first layer,
    the last and the block use the compute dtype."""
    inner, outer = RECIPES[config.linear], RECIPES[PLAIN]
    last = len(model.layers.main) - 1
    main = (outer if index in (0, last) else inner for index in range(last + 1))
    return *main, *(outer for _ in model.layers.mtp)
