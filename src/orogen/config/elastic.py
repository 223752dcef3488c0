"""The submodels that an elastic model holds, and how they are trained together."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_not_negative, require_positive

COSTS = ("parameters", "active", "gib")
# Fields that are choices of ModelConfig's fields of the same names, and of the number of layers.
SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "mamba_num_heads", "mamba_head_dim", "n_routed_experts",
    "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size", "num_layers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """One model that holds smaller ones (Nemotron Elastic, arXiv:2511.16664; Flextron, arXiv:2406.10260).

    A submodel has the first units of each kind, so the student's units must be sorted by importance, as `orogen prune`
    leaves them if it is given the model's own sizes. Each step trains the submodel of one budget; a
    router learns its sizes by Gumbel-softmax. budgets: as shares of the whole model's cost; the last is 1.0, the model
    itself. cost: parameters in all, those that one token uses, or GiB in 16 bits with the keys, values and states of a
    text of `context` tokens. A budget has a loss of its own: budget_weight x |expected cost / budget - 1|, 0 within
    `tolerance`.
    The temperature starts at `temperature` and is multiplied by temperature_decay in each step; the router's logits
    are multiplied by a factor that rises from 1 to `sharpness` over the run, so that its choices become certain.
    """

    budgets: Annotated[tuple[float, ...], "shares of the whole model's cost, rising, the last 1.0"]
    cost: Annotated[str, "what budgets limit: parameters, active or gib"] = "parameters"
    context: Annotated[int, "tokens of the text whose keys, values and states count with cost = gib"] = 8192
    hidden_size: Annotated[tuple[int, ...], "smaller values of ModelConfig.hidden_size"] = ()
    intermediate_size: Annotated[tuple[int, ...], "smaller values of ModelConfig.intermediate_size"] = ()
    num_attention_heads: Annotated[tuple[int, ...], "smaller values of ModelConfig.num_attention_heads"] = ()
    mamba_num_heads: Annotated[tuple[int, ...], "smaller values of ModelConfig.mamba_num_heads"] = ()
    mamba_head_dim: Annotated[tuple[int, ...], "smaller values of ModelConfig.mamba_head_dim"] = ()
    n_routed_experts: Annotated[tuple[int, ...], "smaller values of ModelConfig.n_routed_experts"] = ()
    moe_intermediate_size: Annotated[tuple[int, ...], "smaller values of ModelConfig.moe_intermediate_size"] = ()
    moe_shared_expert_intermediate_size: Annotated[
        tuple[int, ...], "smaller values of ModelConfig.moe_shared_expert_intermediate_size"
    ] = ()
    moe_latent_size: Annotated[tuple[int, ...], "smaller values of ModelConfig.moe_latent_size"] = ()
    num_layers: Annotated[tuple[int, ...], "smaller numbers of layers, of all kinds together"] = ()
    removal: Annotated[tuple[int, ...], "numbers of layers in the order in which num_layers removes them"] = ()
    weights: Annotated[tuple[float, ...], "how often each budget is trained, as shares; empty: all equally"] = ()
    later_weights: Annotated[tuple[float, ...], "the same after later_after steps; empty: no change"] = ()
    later_after: Annotated[int, "steps after which later_weights hold"] = 0
    budget_weight: Annotated[float, "weight of the loss that holds a submodel to its budget"] = 1.0
    tolerance: Annotated[float, "relative distance from the budget below which that loss is 0"] = 0.05
    router_learning_rate: Annotated[float, "Adam's, of the router"] = 1e-3
    temperature: Annotated[float, "first temperature of the Gumbel-softmax"] = 1.0
    temperature_decay: Annotated[float, "factor of the temperature from step to step"] = 0.9999
    sharpness: Annotated[float, "factor of the router's logits at the end of the run; 1: none"] = 10.0

    def __post_init__(self) -> None:
        check_types(self)
        for field in ("budgets", "weights", "later_weights", "removal", *SIZES):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # gin may give a list
        rising = all(a < b for a, b in zip((0.0, *self.budgets), self.budgets, strict=False))
        expected = "at least two shares, rising from above 0 to 1.0, the whole model"
        require(len(self.budgets) > 1 and rising and self.budgets[-1] == 1, self, "budgets", expected)
        require_choice(self, "cost", COSTS)
        require_positive(self, "context", "temperature", "temperature_decay", "router_learning_rate")
        require(self.temperature_decay <= 1, self, "temperature_decay", "at most 1")
        require(self.sharpness >= 1, self, "sharpness", "at least 1")
        require_not_negative(self, "budget_weight", "tolerance", "later_after")
        require(bool(self.sizes), self, "hidden_size", "smaller sizes here, or in another field of a size")
        for field in self.sizes:
            values = getattr(self, field)
            require(min(values) > 0 and len(set(values)) == len(values), self, field, "different numbers above 0")
        for field in ("weights", "later_weights"):
            values = getattr(self, field)
            fits = len(values) == len(self.budgets) and min(values) >= 0 and sum(values) > 0 if values else True
            require(fits, self, field, f"{len(self.budgets)} shares, one for each budget")
        expected = "above 0 with later_weights, and 0 without"
        require((self.later_after > 0) == bool(self.later_weights), self, "later_after", expected)
        require(
            bool(self.removal) == bool(self.num_layers), self, "removal", "layers with num_layers, and none without"
        )

    @property
    def sizes(self) -> tuple[str, ...]:
        """The fields of sizes that have choices."""
        return tuple(field for field in SIZES if getattr(self, field))
