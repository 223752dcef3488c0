"""What of a model is pruned, and by which scores."""

import dataclasses
from typing import Annotated

from orogen.config.checks import ABSENT, check_types, require, require_choice, require_positive
from orogen.config.dtype import COMPUTE
from orogen.config.kinds import LAYERS

# Fields that are the new sizes of ModelConfig's fields of the same names.
WIDTHS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "mamba_num_heads",
    "mamba_head_dim", "n_routed_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size",
)  # fmt: skip
DEPTHS = ("num_layers", "layers", "pattern", "remove_layers")  # fields that say which layers stay, at most one of them
WIDTH_SCORES = ("activations", "contributions", "random", "order")
DEPTH_SCORES = ("hidden_mse", "logit_mse", "logit_kl", "cosine", "random")
EXPERT_SCORES = ("output", "count", "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Which sizes a pruned model has, and how the units that stay are chosen (Minitron, arXiv:2407.14679; for Mamba
    arXiv:2504.11409).

    A size that is not given stays. The scores are measured on `rows` packed rows of the training split of DataConfig,
    those of layers on the first `depth_rows` of them.
    depth_scores: what leaving a layer out does to the final hidden states (hidden_mse, divided by their mean square)
    or to the logits (logit_mse, logit_kl), for each layer a pass; cosine is 1 - the mean cosine of the residual stream
    before and after the layer, and costs no pass of its own. iterative: the layer with the lowest score is removed,
    then the scores of the others are measured again without it.
    scored_sizes: each dense MLP with fewer hidden units is scored as the model without a layer is (replace-one scores
    of MiniPuzzle, arXiv:2504.03624).
    width_scores: activations are Minitron's, with 0 for units whose outgoing weights are all 0; contributions are these
    times the norm of a unit's outgoing weights (Puzzle, arXiv:2411.19146), except for channels of the residual stream
    and experts, which are as before; order keeps the first units, such as those of a submodel of an elastic model.
    expert_scores: the mean norm of an expert's weighted output over its tokens, or its share of tokens or weights.
    """

    hidden_size: Annotated[int, "channels of the residual stream that stay"] = ABSENT
    intermediate_size: Annotated[int, "hidden units of each dense MLP that stay"] = ABSENT
    num_attention_heads: Annotated[int, "query heads that stay, equally many of each key head"] = ABSENT
    num_key_value_heads: Annotated[int, "key heads that stay, with their query heads"] = ABSENT
    mamba_num_heads: Annotated[int, "Mamba-2 heads that stay, equally many of each group"] = ABSENT
    mamba_head_dim: Annotated[int, "channels of a Mamba-2 head that stay, the same ones in all heads of a layer"] = (
        ABSENT
    )
    n_routed_experts: Annotated[int, "routed experts that stay, equally many of each of n_group groups"] = ABSENT
    moe_intermediate_size: Annotated[int, "hidden units of each routed expert that stay"] = ABSENT
    moe_shared_expert_intermediate_size: Annotated[int, "hidden units of each shared expert that stay"] = ABSENT
    moe_latent_size: Annotated[int, "channels of the latent that stay"] = ABSENT
    num_layers: Annotated[int, "layers that stay, of all kinds together"] = ABSENT
    layers: Annotated[dict[str, int], "layers that stay, by letter; of the letters not named all stay"] = ABSENT
    pattern: Annotated[str, "the layers that stay, as a pattern without | and /"] = ABSENT
    remove_layers: Annotated[tuple[int, ...], "numbers of the layers to remove, counted along the pattern from 0"] = ()
    width_scores: Annotated[str, "activations, contributions, random or order"] = "activations"
    depth_scores: Annotated[str, "hidden_mse, logit_mse, logit_kl, cosine or random"] = "hidden_mse"
    iterative: Annotated[bool, "whether layers are removed one at a time, with new scores for each"] = False
    expert_scores: Annotated[str, "output, count or weight"] = "output"
    scored_sizes: Annotated[
        tuple[int, ...], "sizes of intermediate_size to which each dense MLP alone is narrowed, for SearchConfig.scores"
    ] = ()
    rows: Annotated[int, "rows of text that units are scored on"] = 1024
    depth_rows: Annotated[int, "rows of text that layers are scored on"] = 128
    batch_size: Annotated[int, "rows per pass"] = 8
    sequence_length: Annotated[int, "tokens per row"] = 4096
    seed: Annotated[int, "seeds random scores"] = 0
    compute_dtype: Annotated[str, "dtype of the passes: float32 or bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("remove_layers", "scored_sizes"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        require_positive(self, *WIDTHS, "num_layers", "rows", "depth_rows", "batch_size", "sequence_length")
        require(self.sequence_length > 1, self, "sequence_length", "at least 2")
        require_choice(self, "width_scores", WIDTH_SCORES)
        require_choice(self, "depth_scores", DEPTH_SCORES)
        require_choice(self, "expert_scores", EXPERT_SCORES)
        require_choice(self, "compute_dtype", COMPUTE)
        require(0 <= self.seed < 2**31, self, "seed", "an integer from 0 to 2**31 - 1")
        self._check_depth()

    @property
    def chooses_layers(self) -> bool:
        """Whether scores decide which layers stay."""
        return self.num_layers is not None or self.layers is not None or self.pattern is not None

    @property
    def widths(self) -> dict[str, int]:
        """The sizes that are given, by field."""
        return {field: getattr(self, field) for field in WIDTHS if getattr(self, field) is not None}

    def _check_depth(self) -> None:
        given = [field for field in DEPTHS if getattr(self, field) not in (None, ())]
        if len(given) > 1:
            require(False, self, given[1], f"nothing beside PruneConfig.{given[0]}: one of {', '.join(DEPTHS)}")
        for letter, count in (self.layers or {}).items():
            require(letter in LAYERS and count >= 0, self, "layers", f"numbers from 0 by letters, {', '.join(LAYERS)}")
        letters = self.pattern or ""
        require(set(letters) <= set(LAYERS), self, "pattern", f"letters of layers, {', '.join(LAYERS)}")
        require(self.pattern != "", self, "pattern", "at least one layer")
        different = len(set(self.remove_layers)) == len(self.remove_layers)
        require(
            different and all(n >= 0 for n in self.remove_layers), self, "remove_layers", "different numbers from 0"
        )
        repeats = self.chooses_layers and self.depth_scores not in ("cosine", "random")
        sizes = self.scored_sizes
        valid = all(size > 0 for size in sizes) and len(set(sizes)) == len(sizes)
        require(valid, self, "scored_sizes", "different sizes above 0")
        require(repeats or not sizes, self, "scored_sizes", "(): no layers are scored by passes without them")
        within = self.depth_rows <= self.rows or not repeats
        require(within, self, "depth_rows", f"at most rows = {self.rows}: they are the first of these")
        expected = "False: only scores of passes without a layer, which choose layers, change with what is removed"
        require(repeats or not self.iterative, self, "iterative", expected)
        require(bool(given or self.widths), self, "hidden_size", "a size here, or another field that removes something")
