"""The search for smaller models: costs by hand and as published, budgets at their boundary, ranks, refusals."""

import dataclasses
import json

import numpy as np
import pytest
from tests.helpers import hybrid

from orogen.cli import main
from orogen.compress.candidates import GIB, candidates, layer_counts, pattern_of, total_costs, with_nearest
from orogen.compress.search import feasible_costs, rank_of, search_models
from orogen.compress.speed import Speed
from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.engine import EngineConfig
from orogen.config.load import load, load_search
from orogen.config.search import SearchConfig

CONFIGS = "gin_configs"
ENGINE = EngineConfig(compute_dtype="bfloat16", slots=2, max_length=2048, prefix_cache=False)


def searched(name):
    parent, search, cluster, engine = load_search([f"{CONFIGS}/search/{name}.gin"])
    return parent, search, Speed(search, cluster, engine)


def counts_of(model):
    return np.array([[model.layers.main.count(letter) for letter in dict.fromkeys(model.layers.main)]])


def test_costs_of_nano_2_are_those_published():
    """12.31 and 8.89 B parameters; of the 9B, weights of 16.56 GiB, keys and values of 2.00 and states of 0.13."""
    nano = {size: load([f"{CONFIGS}/models/nemotron_nano_{size}_v2.gin"])[0].model for size in ("12b", "9b")}
    search = SearchConfig(context=131072)
    found = {size: total_costs(model, search, counts_of(model)) for size, model in nano.items()}
    assert found["12b"]["parameters"] == 12_310_001_152 and found["9b"]["parameters"] == 8_888_227_328
    weights, keys = 2 * 8_888_227_328 / GIB, 4 * 2 * 8 * 128 * 131072 * 2 / GIB
    states = 27 * (128 * 80 * 128 * 4 + 3 * (128 * 80 + 2 * 8 * 128) * 2) / GIB
    assert found["9b"]["gib"] == pytest.approx(weights + keys + states, rel=1e-12)
    assert [round(x, 2) for x in (weights, keys, states)] == [16.56, 2.0, 0.13]
    reading = SearchConfig(context=131072, prefill_chunk=16384)
    more = total_costs(nano["9b"], reading, counts_of(nano["9b"]))["gib"][0] - found["9b"]["gib"][0]
    assert more == pytest.approx(16384 * 15680 * 2 / GIB, rel=1e-9)


@pytest.mark.parametrize(("pattern", "widest"), [("M-", 2 * 36), ("M-E", 2 * (24 + 3 * 20)), ("M*", 0)])
def test_the_widest_mlp_s_hidden_units_count_while_a_prompt_is_read(pattern, widest):
    """A gate has as many units again; of experts, those that one token uses and the shared one."""
    model = hybrid(pattern=pattern, mtp_depths=0, intermediate_size=36, mlp_gated=True)
    plain, reading = (total_costs(model, SearchConfig(prefill_chunk=n), counts_of(model))["gib"][0] for n in (0, 50))
    assert (reading - plain) * GIB == pytest.approx(50 * widest * 2, abs=1e-3)


def test_costs_of_experts_windows_and_latents_by_hand():
    """A token uses 3 of 24 experts; a window's keys are no more than the text's."""
    model = hybrid(pattern="wEm/E", mtp_depths=1, sliding_window=100, mamba_intermediate_size=10, time_step_rank=3)
    search = SearchConfig(context=40, requests=3, weight_bits=4.0, cache_bits=8.0, state_bits=16.0)
    found = {name: float(value[0]) for name, value in total_costs(model, search, counts_of(model)).items()}
    expert = 24 * 20 * 2
    layer = 24 * expert + 48 * 24 + 2 * 48 * 24 + 2 * 48 * 24 + 48
    attention, mamba = (
        48 * 96 * 2 + 48 * 8 * 2 + 48,
        3 * 48 * 10 + 10 * 4 + 10 + 10 * (3 + 5 + 5) + 3 * 10 + 5 * 10 + 20 + 48,
    )
    mtp = layer + 2 * 48 * 48 + 3 * 48
    total = 2 * 96 * 48 + 48 + attention + layer + mamba + mtp
    assert found["parameters"] == total
    assert found["active"] == total - mtp - 21 * expert
    kept = 2 * 2 * 4 * 40 * 8 + 10 * 5 * 16 + 10 * 3 * 16
    assert found["gib"] == pytest.approx((total * 4 + 3 * kept) / 8 / GIB, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "published", "most_rank", "share"),
    [("nemotron_nano2", "nemotron_nano_9b_v2", 16, 0.003), ("nemotron_h_47b", "nemotron_h_47b", 3, 0.002)],
)
def test_the_published_model_is_feasible_and_near_the_top(name, published, most_rank, share):
    parent, search, speed = searched(name)
    model = load([f"{CONFIGS}/models/{published}.gin"])[0].model
    costs = {cost: float(value[0]) for cost, value in total_costs(model, search, counts_of(model)).items()}
    costs["layers"] = float(len(model.layers.main))
    feasible = feasible_costs(parent, search, speed)
    there = np.all([feasible[cost] == value for cost, value in costs.items()], axis=0)
    assert there.any()
    rank = rank_of(feasible, search.order, costs)
    assert rank <= most_rank and rank <= share * len(there), (rank, len(there))
    # Its widths are those of a candidate, and the parent breaks the budget.
    assert any(
        all(getattr(model, field) == value for field, value in group.widths.items())
        for group in candidates(parent, search)
    )
    assert total_costs(parent, search, counts_of(parent))["gib"][0] > search.most_gib


SMALL = SearchConfig(
    layers=("M:1-2", "-:0-2"), hidden_size=(48, 24), intermediate_size=(72, 36), order=("layers", "parameters")
)
PARENT = hybrid(pattern="M-*M-", mtp_depths=0)


def speed_of(search, hardware="h100", **cluster):
    return Speed(search, ClusterConfig(hardware=hardware, **cluster), ENGINE)


def test_candidates_are_all_and_sorted():
    found = search_models(PARENT, dataclasses.replace(SMALL, best=100), speed_of(SMALL))
    assert found.candidates == found.feasible == len(found.best) == 2 * 3 * 2 * 2
    keys = [(sum(one.layers.values()), one.costs["parameters"]) for one in found.best]
    assert keys == sorted(keys, reverse=True) and found.best[0].model.pattern == "M-*M-"
    for one in found.best:
        assert {letter: one.model.pattern.count(letter) for letter in "M-*"} == one.layers
        exact = total_costs(one.model, SMALL, counts_of(one.model))["parameters"][0]
        assert one.costs["parameters"] == exact
    assert {one.model.intermediate_size for one in found.best if not one.layers["-"]} == {None}


def test_a_budget_is_kept_at_its_boundary_and_the_refusal_names_it():
    sizes = sorted({one.costs["parameters"] for one in search_models(PARENT, SMALL, speed_of(SMALL)).best})
    least = search_models(PARENT, dataclasses.replace(SMALL, most_parameters=sizes[0]), speed_of(SMALL))
    assert least.best[0].costs["parameters"] == sizes[0]
    with pytest.raises(ConfigError, match=r"none of 24 candidates keeps the budgets") as refusal:
        search_models(PARENT, dataclasses.replace(SMALL, most_parameters=1000.0), speed_of(SMALL))
    nearest = float(str(refusal.value).split("most_parameters of at least ")[1])
    assert search_models(PARENT, dataclasses.replace(SMALL, most_parameters=nearest), speed_of(SMALL)).feasible > 0
    with pytest.raises(ConfigError):
        search_models(PARENT, dataclasses.replace(SMALL, most_parameters=0.998 * nearest), speed_of(SMALL))


def test_with_two_budgets_the_one_that_is_nearest_is_named():
    search = dataclasses.replace(SMALL, most_parameters=1.0, most_gib=1.0)
    with pytest.raises(ConfigError, match=r"SearchConfig.most_parameters of at least \d"):
        search_models(PARENT, search, speed_of(SMALL))
    search = dataclasses.replace(SMALL, most_parameters=1.0, most_active=1.0)
    with pytest.raises(ConfigError, match=r"most_parameters of at least .* and SearchConfig.most_active of at least"):
        search_models(PARENT, search, speed_of(SMALL))


def test_speed_is_predicted_and_its_budget_kept():
    search = dataclasses.replace(SMALL, order=("tokens_per_second",), best=100)
    found = search_models(PARENT, search, speed_of(search))
    rates = [one.speed["tokens_per_second"] for one in found.best]
    np.testing.assert_allclose(rates, sorted(rates, reverse=True), rtol=1e-6)
    for one in found.best[:3]:
        assert one.speed["tokens_per_second"] == speed_of(search).predict(one.model).tokens_per_second
    middle = sorted(rates)[len(rates) // 2]
    kept = search_models(
        PARENT, dataclasses.replace(search, least_tokens_per_second=middle * (1 - 1e-6)), speed_of(search)
    )
    assert len(kept.best) == sum(rate >= middle * (1 - 1e-6) for rate in rates)
    with pytest.raises(ConfigError, match=r"least_tokens_per_second of at most \d"):
        search_models(PARENT, dataclasses.replace(search, least_tokens_per_second=1e9), speed_of(search))


def test_what_does_not_fit_the_device_is_left_out():
    search = dataclasses.replace(SMALL, fits=True)
    held = {one.costs["parameters"]: one.speed for one in search_models(PARENT, search, speed_of(search)).best}
    sizes = sorted(one["device_memory_bytes"] for one in held.values())
    some = speed_of(search, memory_gib=sizes[2] / GIB)
    assert all(one.speed["device_memory_bytes"] <= sizes[2] for one in search_models(PARENT, search, some).best)
    with pytest.raises(ConfigError, match=r"a device with at least .* GiB for SearchConfig.fits"):
        search_models(PARENT, search, speed_of(search, memory_gib=1e-9))


def test_patterns_by_hand():
    parent = hybrid(pattern="M-*M-M-*E/*", mtp_depths=1)
    assert pattern_of(parent, {"M": 3, "-": 3, "*": 2, "E": 1}) == parent.pattern
    assert pattern_of(parent, {"M": 1, "-": 2, "*": 1, "E": 0}) == "-M-*/*"
    # The layers that may go first, go; numbers 3, 5 and 0 are of Mamba, 1 of an MLP.
    assert pattern_of(parent, {"M": 1, "-": 2, "*": 2, "E": 1}, [3, 1, 5, 0]) == "M*--*E/*"
    assert pattern_of(parent, {"M": 2, "-": 1, "*": 2, "E": 1}, [4]) == "M*M-*E/*"


def test_depths_and_layer_counts():
    counts = layer_counts(PARENT, dataclasses.replace(SMALL, depth=(3, 3)))
    assert counts.tolist() == [[1, 1, 1], [2, 0, 1]]
    with pytest.raises(ConfigError, match=r"depth is \(9, 9\); expected a range with 5, the nearest depth"):
        layer_counts(PARENT, dataclasses.replace(SMALL, depth=(9, 9)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ("M:2-1",)}, "expected entries LETTER:LEAST-MOST"),
        ({"layers": ("M:1-2", "M:1-1")}, "expected each letter once"),
        ({"hidden_size": (8, 8)}, "expected different sizes above 0"),
        ({"order": ("speed",)}, "expected some of layers, parameters"),
        ({"depth": (4, 2)}, "the second at least the first"),
        ({"most_gib": 0.0}, "most_gib is 0.0; expected a number above 0"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ("M:1-9",)}, "expected at most the model's 2 of M"),
        ({"moe_latent_size": (8,)}, "the model has no layer that reads it"),
        ({"hidden_size": (96,)}, "hidden_size is .96,.; expected at most the model's 48"),
        ({"mamba_num_heads": (7,)}, "SearchConfig make a model: .*n_groups.*, such as mamba_num_heads = 6"),
        ({"hidden_size": tuple(range(1, 40)), "intermediate_size": tuple(range(1, 70)),
          "mamba_num_heads": tuple(range(1, 24)), "num_attention_heads": tuple(range(1, 24)),
          "mamba_head_dim": (1, 2, 3)}, "combinations of widths; expected at most 100,000"),
    ],
)  # fmt: skip
def test_what_does_not_suit_the_model_is_refused(fields, message):
    search = SearchConfig(**fields)
    with pytest.raises(ConfigError, match=message):
        search_models(PARENT, search, speed_of(search))


def test_widths_that_make_no_model_are_told(capsys):
    search = SearchConfig(mamba_num_heads=(12, 7, 9), hidden_size=(48, 24), best=9)
    assert search_models(PARENT, search, speed_of(search)).candidates == 2
    line = capsys.readouterr().err
    assert "warning: 4 of 6 combinations of widths are left out: " in line and "such as mamba_num_heads = 6" in line
    assert line.count("\n") == 1


WIDE = hybrid(pattern="M*", mtp_depths=0, num_attention_heads=24, num_key_value_heads=6)


@pytest.mark.parametrize(
    ("widths", "such"),
    [
        # Both are wrong whatever the other is; then each is wrong beside the other alone; then one of three.
        ({"mamba_num_heads": 7, "num_attention_heads": 7}, "mamba_num_heads = 6 and num_attention_heads = 6"),
        ({"num_attention_heads": 10, "num_key_value_heads": 3}, "num_attention_heads = 9"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads = 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5, "mamba_num_heads": 7}, "mamba_num_heads = 6"),
    ],
)
def test_widths_that_are_suggested_make_a_model_together(widths, such):
    with pytest.raises(ConfigError) as refusal:
        dataclasses.replace(WIDE, **widths)
    assert with_nearest(refusal.value, WIDE, widths) == f"{refusal.value}, such as {such}"
    changed = {field: int(size) for field, size in (one.split(" = ") for one in such.split(" and "))}
    dataclasses.replace(WIDE, **{**widths, **changed})


def test_no_widths_are_suggested_where_none_are_found(monkeypatch):
    monkeypatch.setattr("orogen.compress.candidates._suits", lambda parent, widths: False)
    assert with_nearest(ConfigError("why"), PARENT, {"mamba_num_heads": 7}) == "why"


def test_the_command_answers_and_writes_a_model(tmp_path, capsys):
    out = tmp_path / "smaller.gin"
    file = f"{CONFIGS}/search/nemotron_h_47b.gin"
    assert main(["search", "--gin_file", file, "--json", "--out", str(out)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["feasible"] < facts["candidates"] == 15 * 15 * 6 * 9 and len(facts["best"]) == 10
    model = load([out])[0].model
    assert model.pattern == facts["best"][0]["pattern"] and facts["best"][0]["gib"] <= 31.7
    assert model.intermediate_size == facts["best"][0]["intermediate_size"]
    assert facts["hardware"] is None and facts["seconds"] < 60
    assert main(["search", "--gin_file", file, "--gin_bindings", "SearchConfig.most_gib = 3.0"]) == 2
    line = capsys.readouterr().err
    assert "SearchConfig.most_gib of at least" in line and line.count("\n") == 1
    assert main(["search", "--gin_file", f"{CONFIGS}/upcycle/e8g1t2.gin"]) == 2


def test_a_parent_with_an_mtp_block_is_searched_by_speed():
    """The last layer of a kind is left out to estimate, the block stays."""
    parent = hybrid(pattern="M-*M-/*-", mtp_depths=1)
    search = dataclasses.replace(SMALL, least_tokens_per_second=1.0, fits=True)
    found = search_models(parent, search, speed_of(search))
    assert found.feasible == 24 and all(one.model.pattern.endswith("/*-") for one in found.best)
    assert found.predicted == len(found.best) == 10


def test_candidates_have_a_layer():
    parent = hybrid(pattern="MM", mtp_depths=0)
    search = SearchConfig(layers=("M:0-2",), fits=True)
    assert [one.model.pattern for one in search_models(parent, search, speed_of(search)).best] == ["MM", "M"]
    with pytest.raises(ConfigError, match="expected some with at least one layer in all"):
        layer_counts(parent, SearchConfig(layers=("M:0-0",)))


def test_the_refusal_of_what_only_estimates_allow_has_predicted_values(monkeypatch):
    """Estimates of half the bytes: the value that the refusal names is the least of those predicted."""
    search = dataclasses.replace(SMALL, fits=True, best=100)
    honest = speed_of(search)
    sizes = [one.speed["device_memory_bytes"] for one in search_models(PARENT, search, honest).best]
    tight = speed_of(search, memory_gib=0.9 * min(sizes) / GIB)
    exact = tight.estimates
    monkeypatch.setattr(tight, "estimates", lambda *given: (exact(*given)[0], 0.5 * exact(*given)[1]))
    with pytest.raises(ConfigError, match=r"none of the \d+ candidates that were predicted, of \d+ within") as refusal:
        search_models(PARENT, search, tight)
    named = float(str(refusal.value).split("at least ")[1].split(" GiB")[0])
    assert 1 <= named / (min(sizes) / GIB) < 1.002
    monkeypatch.setattr("orogen.compress.search.MOST_PREDICTED", 2)
    with pytest.raises(ConfigError, match=r"none of the 2 candidates that were predicted"):
        search_models(PARENT, search, tight)


@pytest.mark.parametrize(
    "binding",
    ["ClusterConfig.hardware = 'h100'", "EngineConfig.slots = 3", "SearchConfig.new_tokens = 7",
     "SearchConfig.order = ('layers',)\nSearchConfig.scores = 'scores.jsonl'"],
)  # fmt: skip
def test_settings_that_no_search_reads_are_refused(tmp_path, binding):
    (tmp_path / "search.gin").write_text(binding + "\n")
    name = binding.split(" ")[0]
    with pytest.raises(ConfigError, match=f"{name} is bound; expected their defaults, since nothing"):
        load_search([tmp_path / "search.gin"])
    if "order" not in binding:
        load_search([tmp_path / "search.gin"], ["SearchConfig.fits = True"])


def test_scores_and_an_order_of_removal_exclude_each_other():
    with pytest.raises(ConfigError, match="removal is 'a'; expected None"):
        SearchConfig(removal="a", scores="b")
