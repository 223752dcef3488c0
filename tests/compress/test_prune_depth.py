"""Layers that do nothing go, the published models come out, and removals order a search."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.compress.pruned import DEPTH, prune, save

from orogen.cli import main
from orogen.compress import pruning
from orogen.compress.choose import pruned_config
from orogen.compress.depth import check_depth, choose_layers
from orogen.compress.prune import decide, random_found
from orogen.config.checks import ConfigError
from orogen.config.load import load, load_part
from orogen.config.plan import PlanConfig
from orogen.config.prune import PruneConfig
from orogen.config.text import model_text
from orogen.simulate.fit import count as count_parameters


def idle(*layers):
    """Layers 2 and 3 (or others) of DEPTH, whose arrays are stacked three deep, write nothing."""

    def change(name, array):
        for layer in layers:
            if name.endswith("mixer.down" if layer % 2 else "mixer.out"):
                array[layer // 2] = 0
        return array

    return change


@pytest.mark.parametrize(
    "bindings",
    [
        ["num_layers = 4"],
        ["num_layers = 4", "depth_scores = 'logit_kl'", "iterative = True"],
        ["layers = {'*': 2, '-': 2}", "depth_scores = 'cosine'"],
        ["pattern = '*-*-'", "depth_scores = 'logit_mse'"],
        ["remove_layers = (3, 2)"],
    ],
    ids=["hidden_mse", "logit_kl", "cosine", "logit_mse", "given"],
)
def test_layers_that_do_nothing_are_removed(tmp_path, bindings):
    before = save(tmp_path / "before", DEPTH, idle(2, 3))
    assert prune(before, tmp_path / "after", *bindings) == 0
    assert load([tmp_path / "after" / "config.gin"])[0].model.pattern == "*-*-"
    facts = json.loads((tmp_path / "after" / "pruning.json").read_text())
    assert facts["kept"]["layers"] == [0, 1, 4, 5] and sorted(facts["kept"]["removed"]) == [2, 3]
    if facts["scores"]["of_layers"].get(facts["prune"]["depth_scores"]):
        lines = [json.loads(line) for line in (tmp_path / "after" / "removal.jsonl").read_text().splitlines()]
        scores = facts["scores"]["of_layers"][facts["prune"]["depth_scores"]]
        assert lines == [{"layer": n, "removed": True, "score": score} for n, score in enumerate(scores)]
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    for name, array in new.items():
        np.testing.assert_array_equal(array, old[name][[0, 2]] if "children" in name else old[name], err_msg=name)


PUBLISHED = [
    ("nano2_12b_to_9b", "nemotron_nano_12b_v2", "nemotron_nano_9b_v2", 8_888_227_328),
    ("nemotron_h_56b_to_47b", "nemotron_h_56b", "nemotron_h_47b", 46_791_554_816),
]


@pytest.mark.parametrize(("file", "before", "after", "parameters"), PUBLISHED)
def test_the_published_models_come_out(file, before, after, parameters):
    old, new = (load([f"gin_configs/models/{name}.gin"])[0].model for name in (before, after))
    settings = load_part(PruneConfig, [f"gin_configs/prune/{file}.gin"])
    check_depth(old, settings)
    depth = choose_layers(old, settings, list(range(len(old.layers.main))), lambda removed: 0.0)
    found = pruned_config(old, settings, depth.layers, PlanConfig())
    assert found == new and count_parameters(found) == parameters


def test_layers_are_not_scored_on_more_rows_than_are_read():
    with pytest.raises(ConfigError, match="depth_rows is 20; expected at most rows = 12"):
        PruneConfig(num_layers=2, rows=12, depth_rows=20)


def test_the_scores_of_removals_order_the_layers_of_a_search(tmp_path):
    """Layer 4 goes first, and not the evenly spread one."""
    settings, scores = PruneConfig(num_layers=5, depth_scores="random"), [5.0, 4.0, 3.0, 2.0, 1.0, 6.0]
    found = random_found(DEPTH, settings)._replace(of_layers=scores)
    lines = pruning.removal_lines(decide(DEPTH, settings, found, PlanConfig()), [])
    (tmp_path / "removal.jsonl").write_bytes(lines)
    file, out = tmp_path / "search.gin", tmp_path / "smaller.gin"
    for binding, pattern in ((f"SearchConfig.removal = {str(tmp_path / 'removal.jsonl')!r}", "*-*--"), ("", "*--*-")):
        file.write_text(f"{model_text(DEPTH)}SearchConfig.layers = ('*:2-2',)\n{binding}\n")
        assert main(["search", "--gin_file", str(file), "--out", str(out)]) == 0
        assert load([out])[0].model.pattern == pattern
