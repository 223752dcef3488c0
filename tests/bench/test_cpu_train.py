"""The CPU training benchmark: what it reports, whom it refuses, and that the peer is the same model."""

import pytest

from orogen.bench.cpu_train import CONFIGS, bench, compare
from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.model import ModelConfig

TINY = {
    "pattern": "M-*E", "vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "intermediate_size": 24, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2,
    "ssm_state_size": 8, "chunk_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 20,
}  # fmt: skip


def test_it_reports_throughput_and_spread():
    facts = compare(ModelConfig(**TINY), peer=None, steps=2, threads=2, batch_size=1, sequence_length=16)
    ours = facts["orogen"]
    assert ours["steps"] == 2
    assert ours["tokens_per_second"] == pytest.approx(16 / ours["median"], rel=1e-2)
    assert ours["quartiles"][0] <= ours["median"] <= ours["quartiles"][1]


def test_an_unknown_model_is_refused():
    with pytest.raises(ConfigError, match="--models has 'large'; expected some of dense, moe"):
        bench(["dense", "large"], peer=None, steps=1)


def test_the_models_have_the_published_number_of_parameters():
    from orogen.model.count import count

    sizes = {name: count(load([CONFIGS / f"bench_{name}.gin"])[0].model)["total"] for name in ("dense", "moe")}
    assert {name: round(size / 1e6, 1) for name, size in sizes.items()} == {"dense": 37.2, "moe": 52.9}


@pytest.mark.peer
def test_the_peer_is_the_same_model_and_takes_its_turns():
    facts = compare(ModelConfig(**TINY), peer="torch", steps=2, threads=2, batch_size=1, sequence_length=16)
    # transformers counts the router's correction biases as a buffer, as we do.
    assert facts["torch"]["parameters"] == facts["orogen"]["parameters"]
    assert facts["torch"]["steps"] == facts["orogen"]["steps"] == 2
    assert facts["ratio"]["median"] > 0
