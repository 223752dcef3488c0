"""The search: what it ranks is legal and fits, it finds what brute force finds, and its winner is a gin file."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest
from tests.helpers import hybrid, run_config

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.cluster import HARDWARE, SOFTWARE, ClusterConfig
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.config.run import RunConfig
from orogen.parallel.legal import fold_plan
from orogen.simulate.hardware import machine
from orogen.simulate.predict import predict
from orogen.simulate.search import candidates, explain, nearest_feasible, plan_text, search

CLUSTER = ClusterConfig(hardware="h100")
CONFIG = run_config(hybrid(), batch_size=16, sequence_length=48, compute_dtype="bfloat16")


def test_every_candidate_is_legal_and_none_is_missed():
    """Brute force over all sizes of eight devices, one chunk per stage and one row per microbatch."""
    found = {
        (p.data, p.context, p.tensor, p.stage, p.expert)
        for p in candidates(CONFIG, machine(CLUSTER)[0], 8)
        if p.virtual is None and p.microbatches * p.data == 16
    }
    legal = set()
    for data, tensor, stage, expert in ((d, t, s, e) for d in (1, 2, 4, 8) for t in (1, 2, 4, 8) for s in (1, 2, 4, 8)
                                        for e in (1, 2, 4, 8)):  # fmt: skip
        if data * tensor * stage != 8 or 8 // stage % expert:
            continue
        plan = PlanConfig(
            data=data, tensor=tensor, stage=stage, expert=expert, microbatches=16 // data,
            fsdp="optimizer" if data > 1 else "none",
        )  # fmt: skip
        try:
            fold_plan(plan, CONFIG.model)
            dataclasses.replace(CONFIG, plan=plan).check()
        except ConfigError:
            continue
        legal.add((data, 1, tensor, stage, expert))
    assert found == legal and len(legal) > 10


def test_plans_are_ranked_by_their_predictions_and_fit():
    ranking = search(CONFIG, CLUSTER, 8)
    rates = [ranked.prediction.tokens_per_second for ranked in ranking.plans]
    assert rates == sorted(rates, reverse=True) and len(rates) > 3
    for ranked in ranking.plans[:3]:
        assert ranked.plan.devices == 8 and ranked.prediction.fits
        again = predict(dataclasses.replace(CONFIG, plan=ranked.plan), CLUSTER)
        assert again.tokens_per_second == pytest.approx(ranked.prediction.tokens_per_second, rel=0.02)
    lines = explain(ranking)
    assert (
        lines[1].startswith("winner: ") and lines[2].startswith("runner-up: ") and "longer, most of it in" in lines[3]
    )


def test_less_memory_brings_more_recomputation_or_sharding():
    whole = max(r.prediction.device_memory_bytes for r in search(CONFIG, CLUSTER, 4).plans)
    tight = dataclasses.replace(CLUSTER, memory_gib=0.5 * whole / 2**30)
    assert all(ranked.prediction.device_memory_bytes <= 0.5 * whole for ranked in search(CONFIG, tight, 4).plans)
    with pytest.raises(ConfigError, match=r"none of \d+ legal plans on 4 devices fits into 0 GiB"):
        search(CONFIG, dataclasses.replace(CLUSTER, memory_gib=1e-6), 4)
    with pytest.raises(ConfigError, match="no plan on 13 devices is legal"):
        search(CONFIG, CLUSTER, 13)


@pytest.mark.parametrize(("devices", "memory", "nearest"), [(13, 79, 16), (1, 0.02, 4), (20_000, 79, 128)])
def test_an_impossible_search_names_the_nearest_plan(capsys, devices, memory, nearest):
    """On more devices, or on fewer where the batch has too few sequences for as many."""
    asked = ["simulate", "--gin_file", "gin_configs/recipes/quickstart.gin", "--search", "--devices", str(devices)]
    assert main([*asked, "--gin_bindings", f"ClusterConfig.memory_gib = {memory}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"; nearest that fits: {nearest} devices, " in line


def test_plans_that_are_skipped_are_named():
    """One sequence: every pipeline of four stages takes 4 times as long as its work, or 2.5 with two chunks."""
    one = run_config(hybrid(), batch_size=1, sequence_length=48, compute_dtype="bfloat16")
    ranking = search(one, CLUSTER, 4)
    assert ranking.skipped > 0 and ranking.fitting + ranking.skipped <= ranking.legal
    assert f"{ranking.skipped} were skipped" in explain(ranking)[0]
    with pytest.raises(ConfigError) as refused:
        search(one, dataclasses.replace(CLUSTER, memory_gib=1e-6), 4)
    assert f"none of {ranking.legal - ranking.skipped} legal plans on 4 devices fits" in str(refused.value)
    assert f"{ranking.skipped} legal plans were skipped" in str(refused.value)
    assert str(refused.value).endswith("expected more devices or memory or a larger batch")


def test_a_search_whose_estimates_fit_and_whose_predictions_do_not_is_refused(monkeypatch):
    monkeypatch.setattr("orogen.simulate.search.predict", lambda *_, **__: types.SimpleNamespace(fits=False))
    with pytest.raises(ConfigError, match=r"none of \d+ legal plans on 4 devices fits into 79 GiB"):
        search(CONFIG, CLUSTER, 4)


def test_a_plan_that_is_refused_without_a_word_is_not_legal(monkeypatch):
    def refuse(_):
        raise ConfigError("")

    monkeypatch.setattr(RunConfig, "check", refuse)
    assert not list(candidates(CONFIG, machine(CLUSTER)[0], 4))


def test_the_nearest_plan_keeps_what_it_can():
    plan = PlanConfig(data=4, tensor=2, expert=4, microbatches=2)
    near = nearest_feasible(dataclasses.replace(CONFIG, plan=plan), CLUSTER, 8)
    assert near and (near.plan.data, near.plan.tensor, near.plan.expert, near.plan.microbatches) == (4, 2, 4, 2)
    near = nearest_feasible(dataclasses.replace(CONFIG, plan=plan), CLUSTER, 13)
    assert near and near.plan.devices == 16
    # Experts of the middle stages outweigh the ends of the model, which the lightest plan is chosen by.
    wide = dataclasses.replace(CONFIG.model, pattern="M|E|E|M", mtp_depths=0, moe_intermediate_size=4096)
    deep = dataclasses.replace(CONFIG, model=wide, plan=PlanConfig(stage=4, microbatches=4))
    whole = predict(deep, CLUSTER).device_memory_bytes / 2**30
    small = dataclasses.replace(CLUSTER, memory_gib=0.5 * whole)
    near = nearest_feasible(deep, small, 4)
    assert near is not None and near.prediction.fits


def test_the_winner_loads_as_the_plan_that_was_ranked(tmp_path, capsys):
    file = tmp_path / "best.gin"
    arguments = ["--gin_file", "gin_configs/recipes/quickstart.gin", "--search", "--devices", "8", "--out", str(file)]
    assert main(["simulate", *arguments, "--gin_bindings", "ClusterConfig.hardware='cpu'", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    # The recipe has a plan of its own, which the file overrides.
    loaded = load(["gin_configs/recipes/quickstart.gin", file])[0].plan
    best = facts["plans"][0]["plan"]
    assert dataclasses.asdict(loaded) == {**best, "offload": tuple(best["offload"])}
    assert facts["step_seconds"] == facts["plans"][0]["step_seconds"]
    assert plan_text(loaded, "x").startswith("# x\nPlanConfig.")


def test_the_command_answers_in_one_line_what_it_cannot_do(capsys):
    recipe = ["simulate", "--gin_file", "gin_configs/recipes/quickstart.gin"]
    cases = [
        (["--gin_bindings", "ClusterConfig.hardware='h900'"], "expected one of a100, h100"),
        (["--gin_bindings", "PlanConfig.data=3"], "nearest that fits: 6 devices"),
        (["--gin_bindings", "ClusterConfig.memory_gib=0.01"], "the plan needs"),
        (["--gin_bindings", "ModelConfig.learned_positions=8"], "at most ModelConfig.learned_positions = 8\n"),
        (["--out", "x.gin"], "expected it with --search"),
        (["--routing", "often"], "expected balanced, zipf:EXPONENT"),
        (["--gin_bindings", "ClusterConfig.constants=('matmul=fast',)"], "entries name=value"),
    ]
    for arguments, expected in cases:
        assert main([*recipe, *arguments]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("bindings", "expected"),
    [
        (["LoraConfig.rank=4"], "LoraConfig has bindings; expected none: adapters"),
        (["DistillConfig.divergence=1.0"], "DistillConfig has bindings; expected none: a teacher's passes"),
        (["ElasticConfig.budgets=(0.5, 1.0)", "ElasticConfig.hidden_size=(8,)"], "ElasticConfig has bindings"),
        (["PrecisionConfig.recipe='mxfp8'"], "PrecisionConfig.recipe is 'mxfp8'; expected 'plain'"),
        (["OptimizerConfig.trained=('head',)"], "OptimizerConfig.trained is ('head',); expected ()"),
    ],
)
def test_what_is_not_predicted_is_refused(bindings, expected, capsys):
    recipe = ["simulate", "--gin_file", "gin_configs/recipes/quickstart.gin"]
    assert main([*recipe, *(part for one in bindings for part in ("--gin_bindings", one))]) == 2
    error = capsys.readouterr().err
    assert expected in error and "not predicted" in error and error.count("\n") == 1


def test_the_command_prints_all_parts(capsys):
    recipe = ["simulate", "--gin_file", "gin_configs/recipes/quickstart.gin", "--gin_bindings"]
    assert main([*recipe, "ClusterConfig.hardware='cpu'"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("tokens/s", "MFU", "limited by", "parameters", "expert_up", "kWh", "balanced"))
    assert main(["simulate", "--hardware", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["hardware"]) == set(HARDWARE) and set(facts["software"]) == set(SOFTWARE)
    assert all(kind["source"] and kind["fitted"] for kind in facts["hardware"].values())


def test_a_simulation_imports_no_jax():
    """Importing jax takes longer than an answer may."""
    program = "import sys, orogen.simulate.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
