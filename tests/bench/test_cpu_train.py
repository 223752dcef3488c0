"""The CPU training benchmark on models small enough to compile in seconds; no test checks speed."""

import dataclasses
import importlib.util
import json

import pytest

from orogen.bench import cpu_train, peers
from orogen.config.checks import ConfigError
from orogen.config.load import load

SHAPE = {"batch_size": 2, "sequence_length": 24}


def tiny(name):
    """The benchmark's model, shrunk in every size."""
    sizes = {
        "pattern": "M-*" if name == "dense" else "ME*", "vocab_size": 48, "hidden_size": 32, "num_attention_heads": 4,
        "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 16, "chunk_size": 8,
    }  # fmt: skip
    experts = {"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40}
    sizes |= {"intermediate_size": 56} if name == "dense" else experts
    return dataclasses.replace(load([cpu_train.CONFIGS / f"bench_{name}.gin"])[0].model, **sizes)


@pytest.mark.parametrize("name", cpu_train.MODELS)
def test_facts_without_a_peer(name):
    model = tiny(name)
    facts = json.loads(json.dumps(cpu_train.compare(model, peer=None, steps=3, threads=2, **SHAPE)))
    ours = facts["orogen"]
    assert facts["pattern"] == model.pattern and set(facts) == {"pattern", "batch_size", "sequence_length", "orogen"}
    assert ours["steps"] == 3 and ours["threads"] == 2 and ours["tokens_per_second"] > 0
    assert ours["best"] <= ours["quartiles"][0] <= ours["median"] <= ours["quartiles"][1]


def test_ratio_is_of_neighbouring_steps():
    ours = [peers.Seconds(1.0, 2.0), peers.Seconds(2.0, 2.0), peers.Seconds(4.0, 2.0)]
    theirs = [peers.Seconds(3.0, 1.0), peers.Seconds(2.0, 4.0), peers.Seconds(8.0, 5.0)]
    assert cpu_train._ratio(ours, theirs, "wall") == {"median": 2.0, "quartiles": [1.5, 2.5]}
    assert cpu_train._ratio(ours, theirs, "cpu") == {"median": 2.0, "quartiles": [1.25, 2.25]}


def test_tokens_per_second_of_the_median_step_by_hand():
    samples = [peers.Seconds(wall, wall / 4) for wall in (8.0, 0.5, 1.0, 2.0, 4.0)]
    assert cpu_train._summary(samples, 96) == {
        "tokens_per_second": 48.0, "median": 2.0, "quartiles": [1.0, 4.0], "best": 0.5, "cpu": 0.5, "steps": 5,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), [("dense", 37_178_352), ("moe", 52_927_472)])
def test_models_have_their_documented_sizes(name, parameters):
    from orogen.model.count import count

    model = load([cpu_train.CONFIGS / f"bench_{name}.gin"])[0].model
    # The peer's count lacks the correction bias, which is a buffer there too.
    biases = model.layers.main.count("E") * (model.n_routed_experts or 0)
    assert count(model)["total"] - biases == parameters


def test_unknown_names_and_too_many_threads_are_refused():
    with pytest.raises(ConfigError, match=r"--models has 'sparse'; expected some of dense, moe"):
        cpu_train.bench(["sparse"], peer=None, steps=1)
    with pytest.raises(ConfigError, match=r"--peer is 'numpy'; expected one of torch"):
        cpu_train.bench(["dense"], peer="numpy", steps=1)
    with pytest.raises(ConfigError, match=r"runs 100000 threads; expected at least as many processors"):
        cpu_train.bench(["dense"], peer=None, steps=1, threads=100_000)


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"torch and transformers not installed; expected the extra `peer`"):
        cpu_train.bench(["dense"], peer="torch", steps=1)


@pytest.mark.peer
@pytest.mark.parametrize("name", cpu_train.MODELS)
def test_peer_trains_the_same_model(name):
    facts = json.loads(json.dumps(cpu_train.compare(tiny(name), peer="torch", steps=2, threads=2, **SHAPE)))
    assert facts["torch"]["parameters"] == facts["orogen"]["parameters"]
    assert facts["torch"]["threads"] == facts["orogen"]["threads"] == 2
    assert facts["torch"]["steps"] == facts["orogen"]["steps"] == 2
    assert facts["ratio"]["median"] > 0 and facts["cpu_ratio"]["median"] > 0


@pytest.mark.peer
def test_a_peer_that_fails_says_so():
    with pytest.raises(RuntimeError, match="the process of orogen.bench.peers ended with status 1"):
        peers.Peer(tiny("dense"), batch_size=0, sequence_length=-1, threads=2)
