"""How the operands of products are rounded: the recipes of `PrecisionConfig` as data, by layer, kind and role.

The sources of the operands' tables are named in `config/precision.py`.
"""

import dataclasses
import functools
import math

from orogen.config.checks import ConfigError, require
from orogen.config.kinds import kind_of
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.precision import KINDS, PLAIN, ROLES, PrecisionConfig

BLOCKS = {"fp8_tensorwise": 0, "fp8_blockwise": 128, "mxfp8": 32, "nvfp4": 16}
MOST_TOKENS = 2**24  # of a batch, where experts' rows are rounded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operand:
    """How one operand of a product is rounded.

    element: e4m3, e5m2 or e2m1. scale: `tensor` (one float32), `power` (a power of two per block) or `two_level` (E4M3
    per block and one float32). block: how many numbers along the contracted axis share a scale; square: as many along
    the other axis too. hadamard: size of the transform along the contracted axis, before the rounding; 0: none.
    search: two_level's block scales are those of least squared error instead of those of the largest magnitudes.
    """

    element: str
    scale: str
    block: int = 0
    square: bool = False
    stochastic: bool = False
    hadamard: int = 0
    four_over_six: bool = False
    search: bool = False

    @property
    def together(self) -> int:
        """How many neighbours along the contracted axis are rounded together."""
        return math.lcm(self.block or 1, self.hadamard or 1)


# The two operands of a product; None: it is computed in the compute dtype.
Pair = tuple[Operand, Operand] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Products:
    """The operands of a weight's three products: x and w of y = x w, dy and w of dx = dy wᵀ, x and dy of dw = xᵀ dy."""

    forward: Pair = None
    input_gradient: Pair = None
    weight_gradient: Pair = None

    @property
    def token_block(self) -> int:
        """How many neighbouring tokens are rounded together in the weight's gradient; 1 if none are."""
        return math.lcm(*(o.together for o in self.weight_gradient or ()))

    @property
    def block(self) -> int:
        """How many neighbouring features are rounded together; 1 if none are."""
        return math.lcm(*(o.together for o in (*(self.forward or ()), *(self.input_gradient or ()))))


@functools.cache
def products(name: str, precision: PrecisionConfig) -> Products:
    """The operands of the recipe `name`."""
    if name == PLAIN:
        return Products()
    block = (precision.block or BLOCKS[name]) if BLOCKS[name] else 0
    if name == "nvfp4":
        return _nvfp4(precision, block)
    if name == "fp8_tensorwise":
        forward, gradient = Operand(element="e4m3", scale="tensor"), Operand(element="e5m2", scale="tensor")
        weight = forward
    else:
        forward = gradient = Operand(element="e4m3", scale="power", block=block)
        weight = dataclasses.replace(forward, square=name == "fp8_blockwise")
    return Products(forward=(forward, weight), input_gradient=(gradient, weight), weight_gradient=(forward, gradient))


def _nvfp4(precision: PrecisionConfig, block: int) -> Products:
    def operand(what: str, role: str) -> Operand:
        return Operand(
            element="e2m1",
            scale="two_level",
            block=block,
            square=what == "weights" and precision.weight_blocks == "square",
            stochastic=what in precision.stochastic,
            hadamard=precision.hadamard if role in precision.hadamard_roles else 0,
            four_over_six=precision.four_over_six in (what, "all"),
        )

    read = {
        "forward": ("activations", "weights"),
        "input_gradient": ("gradients", "weights"),
        "weight_gradient": ("activations", "gradients"),
    }
    return Products(**{role: (operand(a, role), operand(b, role)) for role, (a, b) in read.items()})


def layer_products(
    precision: PrecisionConfig, model: ModelConfig, *, switched: bool = False
) -> tuple[tuple[tuple[str, Products], ...], ...]:
    """Of each layer of the pattern, then of each layer of the multi-token-prediction block: the products that round
    their operands, by kind. switched: after `switch_step`."""
    main, mtp = model.layers.main, model.layers.mtp
    inner = range(precision.first_layers, len(main) - precision.last_layers)
    found = [_of_letter(letter, model, precision, switched) if i in inner else () for i, letter in enumerate(main)]
    deeper = [_of_letter(letter, model, precision, switched) if precision.mtp else () for letter in mtp]
    if deeper and precision.mtp:  # the projection in front of the block follows the block's first layer
        deeper[0] += _rounded(("mtp_project",), precision, switched)
    return (*found, *deeper)


def weight_kinds(letter: str, model: ModelConfig) -> tuple[str, ...]:
    """The kinds of weight in a layer."""
    kinds = kind_of(letter).weights
    if letter == "E":
        kinds += ("latent_down", "latent_up") if model.moe_latent_size else ()
        kinds += ("shared_up", "shared_down") if model.moe_shared_expert_intermediate_size else ()
    return kinds


def _of_letter(
    letter: str, model: ModelConfig, precision: PrecisionConfig, switched: bool
) -> tuple[tuple[str, Products], ...]:
    return _rounded(weight_kinds(letter, model), precision, switched)


def _rounded(kinds: tuple[str, ...], precision: PrecisionConfig, switched: bool) -> tuple[tuple[str, Products], ...]:
    found = []
    for kind in kinds:
        names = dict.fromkeys(ROLES, precision.recipe)
        kept = set()
        for of, roles, recipe in precision.entries():
            names |= dict.fromkeys(roles, recipe) if kind in of else {}
            kept |= set(roles) if kind in of else set()
        if switched:
            changed = ROLES if precision.switch_roles == "all" else ("forward",)
            # What is kept in the compute dtype stays there.
            changed = [role for role in changed if not (role in kept and names[role] == PLAIN)]
            names |= dict.fromkeys(changed, precision.switch_to)
        chosen = Products(**{role: getattr(products(name, precision), role) for role, name in names.items()})
        found += [(kind, chosen)] if chosen != Products() else []
    return tuple(found)


def check_precision(
    precision: PrecisionConfig, model: ModelConfig, plan: PlanConfig, *, length: int | None, rows: int | None
) -> None:
    """Raises ConfigError if the recipe does not suit the model, or if the plan splits what is rounded together.

    length, rows: tokens per sequence and sequences per batch; None if the run has none.
    """
    if not precision.rounds:
        return
    expected = f"plain: PrecisionConfig.recipe is {precision.recipe!r}, which rounds operands itself"
    require(plan.linear == PLAIN, plan, "linear", expected)
    expected = "another implementation: with few rows it does not sort them by expert, as rounding needs"
    require(plan.grouped_matmul != "triton_small", plan, "grouped_matmul", expected)
    layers = len(model.layers.main)
    kept = precision.first_layers + precision.last_layers
    expected = f"fewer than {layers} first and last layers together, as many as the pattern has"
    require(kept < layers, precision, "last_layers", expected)
    present = {kind for letter in model.layers.main + model.layers.mtp for kind in weight_kinds(letter, model)}
    present |= {"mtp_project"} if model.layers.mtp else set()
    for kinds, _, _ in precision.entries():
        expected = f"kinds that the model has: {', '.join(kind for kind in KINDS if kind in present)}"
        require(bool(present.intersection(kinds)), precision, "keep", expected)
    every = [pair for s in (False, True) for layer in layer_products(precision, model, switched=s) for pair in layer]
    for kind, used in dict.fromkeys(every):
        _check_widths(kind, used, model, plan)
        _check_gradients(kind, used, model, plan)
        if length is not None and rows is not None:
            _check_tokens(kind, used, precision, plan, length)
            if kind.startswith("routed") and rows * length >= MOST_TOKENS:
                expected = f"fewer than {MOST_TOKENS} tokens in a batch, so that float32 holds their numbers"
                raise ConfigError(f"TrainConfig.batch_size is {rows}; expected {expected}")


def _check_widths(kind: str, used: Products, model: ModelConfig, plan: PlanConfig) -> None:
    """A block of features lies on one rank."""
    routed = kind.startswith("routed")
    field, ranks = ("expert_tensor", plan.expert_tensor) if routed else ("tensor", plan.tensor)
    for count, size in _split_columns(kind.split("_")[0], model):
        local = max(count // ranks, 1) * size  # ranks share what there is less of
        if ranks > 1 and local % used.block:
            raise ConfigError(
                f"PlanConfig.{field} is {ranks}, so that a rank has {local} of {kind}'s {count * size} columns; "
                f"expected a multiple of the {used.block} that the recipe rounds together"
            )


def _split_columns(group: str, model: ModelConfig) -> list[tuple[int, int]]:
    """The columns, or rows, of a group's weights that ranks split: a number of parts that stay whole, and their
    size."""
    heads, keys, head = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    found: list[tuple[int | None, int | None]] = []
    if group == "mamba":
        found += [(model.mamba_num_heads, model.mamba_head_dim), (model.n_groups, model.ssm_state_size)]
        found += [(model.mamba_intermediate_size, 1)]
    elif group == "attention":
        found += [(heads, head), (keys, head)]
        nope, rope = model.qk_nope_head_dim, model.qk_rope_head_dim
        found += [(heads, nope), (heads, model.v_head_dim), (heads, nope and rope and nope + rope)]
    else:
        hidden = {"dense": model.intermediate_size, "routed": model.moe_intermediate_size}
        found += [({**hidden, "shared": model.moe_shared_expert_intermediate_size}.get(group), 1)]
    return [(count, size) for count, size in found if count and size]


def _check_gradients(kind: str, used: Products, model: ModelConfig, plan: PlanConfig) -> None:
    """No rank of tensor rounds its part of a gradient that is the sum over ranks.

    That is the gradient of what several ranks compute alike from weights that they all hold: keys and values of a head,
    B and C of a group, latent vectors, and in front of the multi-token-prediction block a stream that all hold whole.
    """
    if not (used.input_gradient or used.weight_gradient):
        return
    letters = {*model.layers.main, *model.layers.mtp}
    alike = []
    if kind == "attention_in" and letters & set("*w"):
        alike.append((model.num_key_value_heads, "ModelConfig.num_key_value_heads"))
    if kind == "attention_in" and "+" in letters:
        alike.append((1, "as all ranks compute the latent vectors"))
    if kind == "mamba_in" and "M" in letters:
        alike.append((model.n_groups, "ModelConfig.n_groups"))
    if kind == "mtp_project" and plan.stream == "whole":
        alike.append((1, "as PlanConfig.stream is 'whole'"))
    for most, why in alike:
        expected = (
            f"at most {most}, {why}, since more ranks would each round a part of one gradient; or entries of "
            f"PrecisionConfig.keep with which {kind}.input_gradient and {kind}.weight_gradient are plain"
        )
        require(most is None or plan.tensor <= most, plan, "tensor", expected)


def _check_tokens(kind: str, used: Products, precision: PrecisionConfig, plan: PlanConfig, length: int) -> None:
    """A block of tokens lies on one rank and in one sequence, and so do the tokens whose rows of an expert are rounded
    together."""
    ranks = plan.context * plan.tensor
    part = length // (plan.context * plan.sequence_pieces(routed=True))
    if kind.startswith("routed"):
        expected = f"a divisor of the {part} neighbouring tokens that a rank of context and tensor routes"
        chunk = precision.expert_tokens
        fits = ranks == 1 if chunk is None else part % chunk == 0
        require(fits, precision, "expert_tokens", expected)
    # The latent projections and the one in front of the MTP block read the rank's own tokens, others those of all ranks
    # of tensor.
    elif ranks > 1 and part % used.token_block and (plan.context > 1 or kind.startswith(("latent", "mtp"))):
        raise ConfigError(
            f"TrainConfig.sequence_length is {length}, of which a rank holds {part} neighbouring tokens; expected a "
            f"multiple of the {used.token_block} that the recipe rounds together in gradients of {kind}"
        )
