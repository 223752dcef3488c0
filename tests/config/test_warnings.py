"""Warnings about models whose fields are legal."""

from orogen.config.model import ModelConfig


def test_a_single_renormalised_expert_gives_a_warning():
    """Its weight is always 1; without renormalisation it is the router's score."""
    sizes = {"vocab_size": 7, "hidden_size": 6, "n_routed_experts": 5, "moe_intermediate_size": 3}
    warn = lambda k=1, pattern="E", **fields: ModelConfig(  # noqa: E731
        pattern=pattern, num_experts_per_tok=k, **sizes, **fields
    ).warnings()
    (line,) = warn(norm_topk_prob=True)
    assert "num_experts_per_tok=1 with norm_topk_prob=True" in line and "no gradient" in line
    assert "router_score='softmax_topk'" in warn(norm_topk_prob=False, router_score="softmax_topk")[0]
    assert warn(norm_topk_prob=False) == warn(k=2, norm_topk_prob=True) == []
