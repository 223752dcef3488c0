"""Scores of a pruning are reused for the weights, and by the measures, that they were taken of."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.compress.pruned import DEPTH, of, prune, save

from orogen.compress import pruning
from orogen.compress.prune import Taken, decide, random_found
from orogen.compress.stored_scores import read_arrays
from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.config.prune import PruneConfig


def test_scores_of_another_model_are_refused(tmp_path, capsys):
    before = save(tmp_path / "before", DEPTH)
    assert prune(before, tmp_path / "after", "intermediate_size = 8") == 0
    other = save(tmp_path / "other", dataclasses.replace(DEPTH, intermediate_size=11))
    scores = ["--scores", str(tmp_path / "after")]
    assert prune(other, tmp_path / "no", "intermediate_size = 8", more=scores) == 2
    assert "has scores of layer 1 with shapes {'mlp': (12,)}; expected {'mlp': (11,)}" in capsys.readouterr().err
    assert prune(before, tmp_path / "no", "num_layers = 4", more=scores) == 2
    assert "has scores of layers by cosine; PruneConfig.depth_scores asks for 'hidden_mse'" in capsys.readouterr().err
    trained = save(tmp_path / "trained", DEPTH, lambda name, array: array * 1.01 if name.endswith("up") else array)
    assert prune(trained, tmp_path / "no", "intermediate_size = 8", more=scores) == 2
    assert "has scores of other weights of a model of these sizes" in capsys.readouterr().err
    for where in (tmp_path / "nowhere", before):
        assert prune(before, tmp_path / "no", "intermediate_size = 8", more=["--scores", str(where)]) == 2
        expected = f"orogen: --scores {str(where)!r} has no pruning.json; expected the folder of an earlier pruning\n"
        assert capsys.readouterr().err == expected
    assert not (tmp_path / "no").exists()


def test_scores_are_reused_only_for_what_they_were_taken_by(tmp_path, capsys):
    """Random ones are not taken for measured ones, nor placeholders for either."""
    before = save(tmp_path / "before", of("E-"))
    drawn, placeholders = "width_scores = 'random'", ("num_layers = 1", "depth_scores = 'random'")
    assert prune(before, tmp_path / "drawn", "intermediate_size = 8", drawn) == 0
    assert prune(before, tmp_path / "placeholders", *placeholders) == 0
    facts = json.loads((tmp_path / "placeholders" / "pruning.json").read_text())
    assert facts["scores"]["widths"] is None
    assert [name for name in np.load(tmp_path / "placeholders" / "pruning.npz") if name.startswith("scores")] == []
    again = ["--scores", str(tmp_path / "drawn" / "pruning.json")]
    for number, (source, bindings, message) in enumerate((
        ("drawn", [], "has no scores of units by 'activations'; expected PruneConfig.width_scores = 'random'"),
        ("drawn", [drawn, "seed = 1"], "has scores drawn with seed 0; PruneConfig.seed asks for 1"),
        ("placeholders", [], "has no scores of units by 'activations'; expected PruneConfig.width_scores = None"),
        ("placeholders", [drawn], "has no scores of units by 'random'"),
    )):  # fmt: skip
        more = ["--scores", str(tmp_path / source)]
        assert prune(before, tmp_path / f"no{number}", "intermediate_size = 8", *bindings, more=more) == 2
        assert message in capsys.readouterr().err
    assert prune(before, tmp_path / "again", "intermediate_size = 8", drawn, more=again) == 0
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("drawn", "again"))
    assert all(np.array_equal(old[name], new[name]) for name in old)


def test_a_choice_of_experts_needs_their_scores(tmp_path):
    model, settings = of("E-"), PruneConfig(n_routed_experts=6)
    found = random_found(model, settings)._replace(taken=Taken("activations", "count", 0))
    choice = decide(model, settings, found, PlanConfig())
    for weights in ("", "0123"):
        facts = pruning.record(tmp_path, settings, pruning.of_weights(found, weights, None), choice, (1, 1))
        (tmp_path / "pruning.json").write_bytes(pruning.encoded(facts))
        (tmp_path / "pruning.npz").write_bytes(pruning.arrays(found, choice))
        if not weights:
            with pytest.raises(ConfigError, match="does not say which weights its scores are of"):
                pruning.read_scores(tmp_path, model, settings)
    with pytest.raises(ConfigError, match="has scores of experts by 'count'; PruneConfig.expert_scores asks for 'out"):
        pruning.read_scores(tmp_path, model, settings)
    held = pruning.read_scores(tmp_path, model, PruneConfig(n_routed_experts=6, expert_scores="count"))
    for mine, other in zip(held.scores.layers, found.scores.layers, strict=True):
        assert all(np.array_equal(mine[name], other[name]) for name in other)


def test_scores_of_a_large_model_can_be_read(tmp_path):
    """Their JSON would have more bytes than one may have."""
    model = dataclasses.replace(of("E-"), n_routed_experts=500, moe_intermediate_size=4000)
    settings = PruneConfig(moe_intermediate_size=3999, width_scores="random")
    found = random_found(model, settings)
    choice = decide(model, settings, found, PlanConfig())
    found = pruning.of_weights(found, "0123", None)
    facts = pruning.encoded(pruning.record(tmp_path, settings, found, choice, (1, 1)))
    assert len(facts) < 20_000
    (tmp_path / "pruning.json").write_bytes(facts)
    (tmp_path / "pruning.npz").write_bytes(pruning.arrays(found, choice))
    held = pruning.read_scores(tmp_path, model, settings)
    np.testing.assert_array_equal(held.scores.layers[0]["expert_width"], found.scores.layers[0]["expert_width"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[:200]),
        lambda file: np.savez_compressed(file, **{"scores.hidden": np.zeros(10)}),
        lambda file: np.savez(file, **{"scores.hidden": np.array([{}])}),
        lambda file: np.savez(file, **{"scores.hidden": np.zeros(10, np.float32)}),
        lambda file: file.write_bytes(file.read_bytes().replace(b"(10,), }", b"(1<<40,)")),
        lambda file: file.unlink(),
    ],
    ids=["short", "compressed", "pickled", "float32", "header", "missing"],
)
def test_arrays_that_are_none_are_refused(tmp_path, damage):
    file = tmp_path / "pruning.npz"
    np.savez(file, **{"scores.hidden": np.arange(10.0)})
    np.testing.assert_array_equal(read_arrays(file, "scores.")["hidden"], np.arange(10))
    damage(file)
    with pytest.raises(ConfigError, match="pruning.npz"):
        read_arrays(file, "scores.")


def test_a_model_whose_activations_overflow_is_not_scored(tmp_path, capsys):
    before = save(tmp_path / "before", DEPTH, lambda name, array: array * 1e30 if name.endswith("down") else array)
    for bindings in (["intermediate_size = 8"], ["num_layers = 4"], ["num_layers = 4", "depth_scores = 'cosine'"]):
        assert prune(before, tmp_path / "no", *bindings, "width_scores = 'activations'") == 2
        err = capsys.readouterr().err
        assert "finite" in err and err.count("\n") == 1 and not (tmp_path / "no").exists()
