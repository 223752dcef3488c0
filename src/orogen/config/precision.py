"""The formats in which a run multiplies: a recipe by name, and what it omits. `config/rounded.py` makes recipes."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_not_negative, require_positive

PLAIN = "plain"
RECIPE_NAMES = (PLAIN, "fp8_tensorwise", "fp8_blockwise", "mxfp8", "nvfp4")
# The kinds of weight of a layer, in groups by what they do.
GROUPS = {
    "dense": ("dense_up", "dense_down"),
    "shared": ("shared_up", "shared_down"),
    "routed": ("routed_up", "routed_down"),
    "latent": ("latent_down", "latent_up"),
    "mamba": ("mamba_in", "mamba_out"),
    "attention": ("attention_in", "attention_out"),
    "mtp": ("mtp_project",),
}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)
ROLES = ("forward", "input_gradient", "weight_gradient")
HEAD = "head"  # no kind of weight, but has a message of its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """The formats in which products with weights are computed. Any device computes the same numbers: operands are
    rounded as the recipe defines, and multiplied in float32 (`orogen.precision`). Training and its held-out loss follow
    the recipe; a trained model is used in the compute dtype.

    recipe: fp8_tensorwise (E4M3 forward, E5M2 gradients, one current scale per tensor; Nemotron-H, arXiv:2504.03624),
    fp8_blockwise (E4M3, 128 x 128 weights and 1 x 128 activations and gradients; Nano 2, arXiv:2508.14444), mxfp8
    (E4M3, 1 x 32, scales are powers of two; arXiv:2506.08027), nvfp4 (E2M1, scales E4M3 by 1 x 16, weights by 16 x 16,
    and one float32 per tensor; Hadamard transform and stochastic rounding as below; arXiv:2509.25149). A tensor of
    activations or gradients is one sequence, for routed experts the rows of one expert and expert_tokens tokens, so
    that scales depend neither on the plan nor on the number of microbatches.
    keep: entries 'KIND:RECIPE' or 'KIND.ROLE:RECIPE'; a later entry wins. KIND: dense, shared, routed, latent, mamba,
    attention, or their parts such as mamba_out and routed_down, or mtp_project; ROLE: forward, input_gradient or
    weight_gradient.
    switch_step: the late change of recipe, such as Super's return to higher precision. switch_roles: with forward, the
    gradients' products keep the first recipe.
    """

    recipe: Annotated[str, "plain, fp8_tensorwise, fp8_blockwise, mxfp8 or nvfp4"] = PLAIN
    first_layers: Annotated[int, "so many first layers of the pattern compute in the compute dtype"] = 0
    last_layers: Annotated[int, "so many last layers of the pattern compute in the compute dtype"] = 0
    mtp: Annotated[bool, "whether the multi-token-prediction block follows the recipe too"] = False
    keep: Annotated[tuple[str, ...], "kinds of weight with another recipe: 'KIND:RECIPE' or 'KIND.ROLE:RECIPE'"] = ()
    switch_step: Annotated[int | None, "the first step that is computed by switch_to; None: none is"] = None
    switch_to: Annotated[
        str, "the recipe from switch_step on: plain, fp8_tensorwise, fp8_blockwise, mxfp8 or nvfp4"
    ] = PLAIN
    switch_roles: Annotated[str, "which products change at switch_step: all or forward"] = "all"
    block: Annotated[int | None, "numbers that share a block scale; None: 128, 32 or 16 as the recipe defines"] = None
    expert_tokens: Annotated[
        int | None, "consecutive tokens of a sequence whose rows of one expert are rounded together; None: all"
    ] = None
    # of nvfp4
    weight_blocks: Annotated[str, "nvfp4's blocks of weights: square (16 x 16) or rows (1 x 16)"] = "square"
    hadamard: Annotated[int, "nvfp4's size of the Hadamard transform, a power of two; 0: none"] = 16
    hadamard_roles: Annotated[tuple[str, ...], "products whose operands nvfp4 transforms"] = ("weight_gradient",)
    stochastic: Annotated[tuple[str, ...], "what nvfp4 rounds at random: gradients, weights, activations"] = (
        "gradients",
    )
    four_over_six: Annotated[
        str, "where nvfp4 picks 4 or 6 as each block's largest number, by error: none, weights, activations or all"
    ] = "none"
    # what is recorded
    health_every: Annotated[int, "steps between counts of lost and saturated numbers, by layer; 0: none"] = 0

    def __post_init__(self) -> None:
        check_types(self)
        expected = "fp8_tensorwise, whose scales are current: delayed scales overflow silently when values grow"
        for field in ("recipe", "switch_to"):
            require("delayed" not in getattr(self, field), self, field, expected)
            require_choice(self, field, RECIPE_NAMES)
        require_not_negative(self, "first_layers", "last_layers", "hadamard", "health_every")
        require_positive(self, "switch_step", "block", "expert_tokens")
        require_choice(self, "switch_roles", ("all", "forward"))
        require_choice(self, "weight_blocks", ("square", "rows"))
        require_choice(self, "four_over_six", ("none", "weights", "activations", "all"))
        for field, choices in (
            ("hadamard_roles", ROLES),
            ("stochastic", ("gradients", "weights", "activations")),
        ):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # gin may give a list
            known = all(name in choices for name in getattr(self, field))
            require(known, self, field, f"some of {', '.join(choices)}")
        power = self.hadamard & (self.hadamard - 1) == 0 and self.hadamard != 1 and self.hadamard <= 128
        require(power, self, "hadamard", "0, or a power of two from 2 to 128")
        object.__setattr__(self, "keep", tuple(self.keep))
        for entry in self.keep:
            self._check_entry(entry)

    def _check_entry(self, entry: str) -> None:
        place, _, recipe = entry.partition(":")
        kind, _, role = place.partition(".")
        require(kind != HEAD or recipe == PLAIN, self, "keep", "no head: it is computed in the compute dtype")
        known = kind in KINDS or kind in GROUPS
        require(known, self, "keep", f"entries KIND:RECIPE whose kind is one of {', '.join((*GROUPS, *KINDS))}")
        require(not role or role in ROLES, self, "keep", f"a role that is one of {', '.join(ROLES)}")
        require(recipe in RECIPE_NAMES, self, "keep", f"a recipe that is one of {', '.join(RECIPE_NAMES)}")

    def entries(self) -> list[tuple[tuple[str, ...], tuple[str, ...], str]]:
        """Each of `keep` as kinds, roles and a recipe."""
        found = []
        for entry in self.keep:
            place, _, recipe = entry.partition(":")
            kind, _, role = place.partition(".")
            found.append((GROUPS.get(kind, (kind,)), (role,) if role else ROLES, recipe))
        return found

    @property
    def recipes(self) -> set[str]:
        """The names of all recipes that some step may follow."""
        switched = {self.switch_to} if self.switch_step is not None else set()
        return {self.recipe, *(recipe for _, _, recipe in self.entries())} | switched

    @property
    def rounds(self) -> bool:
        """Whether any step rounds the operands of its products."""
        return self.recipes != {PLAIN}
