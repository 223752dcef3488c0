"""How a dense model becomes a mixture of experts."""

import dataclasses
from typing import Annotated

from orogen.config.checks import check_types, require, require_choice, require_not_negative, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """Dense MLPs into experts (arXiv:2410.07524).

    An MLP is split into `granularity` shards, and each shard has `expansion` copies: expansion x granularity experts.
    virtual_groups: the router's columns of one copy's shards begin equal, so that a token's top_k experts, a multiple
    of granularity, are whole copies. scale: makes the new layer's output as large as the old one's. both puts it on
    both matrices: cube roots with squared ReLU (section 4.2), square roots with ReLU, and with a gated MLP square roots
    on all but the gate, which is exact where Megatron's cube roots are not. output puts all of it on the second matrix,
    which is exact with every activation. shared: shards that process every token, as one shared expert; they contribute
    shared / (shared + top_k) of the output.
    """

    expansion: Annotated[int, "copies of each MLP"]
    granularity: Annotated[int, "shards that one copy is split into"] = 1
    top_k: Annotated[int, "experts per token"]
    shared: Annotated[int, "shards in the shared expert, a multiple of granularity; 0: no shared expert"] = 0
    layers: Annotated[tuple[int, ...], "numbers of the dense layers, counted along the pattern; empty: all"] = ()
    router_score: Annotated[str, "as ModelConfig.router_score: softmax, softmax_topk or sigmoid"] = "softmax"
    norm_topk_prob: Annotated[bool, "as ModelConfig.norm_topk_prob"] = False
    router_correction_bias: Annotated[bool, "as ModelConfig.router_correction_bias"] = False
    router_aux_loss_coef: Annotated[float, "as ModelConfig.router_aux_loss_coef"] = 1e-2
    virtual_groups: Annotated[bool, "whether the shards of one copy begin with equal router weights"] = True
    scale: Annotated[str, "both matrices, the output matrix alone (output), or none"] = "both"
    seed: Annotated[int, "seeds the routers"] = 0

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "layers", tuple(self.layers))
        require_positive(self, "expansion", "granularity", "top_k")
        require_not_negative(self, "shared", "router_aux_loss_coef")
        require(self.top_k <= self.experts, self, "top_k", f"at most expansion x granularity = {self.experts}")
        whole = self.top_k % self.granularity == 0
        expected = f"a multiple of granularity = {self.granularity}: with virtual groups, tokens go to whole copies"
        require(whole or not self.virtual_groups, self, "top_k", expected)
        expected = f"a multiple of granularity = {self.granularity}"
        require(self.shared % self.granularity == 0, self, "shared", expected)
        require(len(set(self.layers)) == len(self.layers), self, "layers", "different numbers")
        require_choice(self, "router_score", ("softmax", "softmax_topk", "sigmoid"))
        sums_to_one = self.router_score == "softmax_topk" or self.norm_topk_prob
        expected = "True with sigmoid scores: their sum is not known before"
        require(sums_to_one or self.router_score == "softmax", self, "norm_topk_prob", expected)
        expected = "False with softmax_topk scores, which add up to one anyway"
        require(not self.norm_topk_prob or self.router_score != "softmax_topk", self, "norm_topk_prob", expected)
        require_choice(self, "scale", ("both", "output", "none"))
        require(0 <= self.seed < 2**31, self, "seed", "an integer from 0 to 2**31 - 1")

    @property
    def experts(self) -> int:
        """The number of routed experts."""
        return self.expansion * self.granularity
