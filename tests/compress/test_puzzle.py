"""MiniPuzzle's integer program against every combination, and what its file of scores may hold."""

import itertools
import json

import numpy as np
import pytest
from tests.helpers import hybrid

from orogen.cli import main
from orogen.compress.candidates import total_costs
from orogen.compress.puzzle import Replacement, read_scores, removal_order, solve
from orogen.config.checks import ConfigError
from orogen.config.search import SearchConfig
from orogen.config.text import model_text

PARENT = hybrid(pattern="M-*M-*-", mtp_depths=0)
HEADS, HIDDEN = (18, 12), (60, 36)  # of Mamba and of the MLPs


def scores(file, *, seed=3):
    """Random scores of removing each layer but one, and of each width of some layers."""
    rng, lines = np.random.default_rng(seed), []
    for layer, letter in enumerate(PARENT.layers.main):
        if layer != 2:
            lines.append({"layer": layer, "removed": True, "score": float(rng.uniform(1, 5))})
        field, values = {"M": ("mamba_num_heads", HEADS), "-": ("intermediate_size", HIDDEN)}.get(letter, ("", ()))
        for value in values if layer != 4 else values[:1]:  # layer 4 has no score of the smallest width
            lines.append({"layer": layer, field: value, "score": float(rng.uniform(0, 2))})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_scores(file, PARENT)


def every(search, found):
    """All legal choices as (score, pattern, widths), by their scores: costs are those of the resulting models."""
    table = {one[:3]: one.score for one in found}
    main, results = PARENT.layers.main, []
    for heads, hidden in itertools.product((24, *HEADS), (72, *HIDDEN)):
        for kept in itertools.product((True, False), repeat=len(main)):
            score, legal = 0.0, True
            for layer, (letter, stays) in enumerate(zip(main, kept, strict=True)):
                choices = {"M": ("mamba_num_heads", heads, 24), "-": ("intermediate_size", hidden, 72)}
                field, value, own = choices.get(letter, (None, None, None))
                key = (layer, "removed", 0) if not stays else (layer, field, value)
                if stays and value == own:
                    continue
                legal &= key in table
                score += table.get(key, 0.0)
            counts = np.array([[sum(k and m == letter for k, m in zip(kept, main, strict=True)) for letter in "M-*"]])
            model = hybrid(pattern="M-*", mtp_depths=0, mamba_num_heads=heads, intermediate_size=hidden)
            costs = {name: float(value[0]) for name, value in total_costs(model, search, counts).items()}
            legal &= all(costs[name] <= most for name, most in search.budgets.items())
            legal &= all(int(c) in r for c, r in zip(counts[0], search.counts(PARENT).values(), strict=True)) or (
                not search.layers
            )
            legal &= search.depth is None or search.depth[0] <= counts.sum() <= search.depth[1]
            if legal:
                # A width that no layer reads is not part of the model.
                widths = (heads if counts[0][0] else None, hidden if counts[0][1] else None)
                pattern = "".join(letter for letter, stays in zip(main, kept, strict=True) if stays)
                results.append((score, pattern, widths))
    return sorted(set(results))


@pytest.mark.parametrize(
    "fields",
    [
        {"most_parameters": 50_000.0},
        {"most_parameters": 42_000.0, "most_gib": 8e-5, "context": 300},
        {"most_active": 60_000.0, "layers": ("M:1-2", "-:2-3", "*:2-2")},
        {"most_parameters": 60_000.0, "depth": (4, 5)},
    ],
    ids=["parameters", "parameters and bytes", "layers", "depth"],
)
def test_the_best_are_those_of_every_combination(tmp_path, fields):
    search = SearchConfig(best=5, **fields)
    found = scores(tmp_path / "scores.jsonl")
    wanted = every(search, found)[:5]
    best = solve(PARENT, search, found).best
    assert [one.score for one in best] == pytest.approx([score for score, *_ in wanted], rel=1e-9)
    for one, (_, pattern, widths) in zip(best, wanted, strict=True):
        assert one.model.pattern == pattern
        assert (one.model.mamba_num_heads, one.model.intermediate_size) == widths
        assert one.costs["parameters"] <= search.budgets.get("parameters", np.inf)


def test_the_nearest_budget_is_that_of_the_smallest_choice(tmp_path):
    found = scores(tmp_path / "scores.jsonl")
    with pytest.raises(ConfigError, match=r"most_parameters of at least") as refusal:
        solve(PARENT, SearchConfig(most_parameters=100.0), found)
    nearest = float(str(refusal.value).split("of at least ")[1])
    smallest = solve(PARENT, SearchConfig(most_parameters=nearest), found).best[0]
    assert smallest.layers == {"M": 0, "-": 0, "*": 1} and 0.998 * nearest < smallest.costs["parameters"] <= nearest


def test_layers_go_in_the_order_of_their_scores(tmp_path):
    found = scores(tmp_path / "scores.jsonl")
    order = removal_order(found)
    by_layer = {one.layer: one.score for one in found if one.field == "removed"}
    assert sorted(order) == [0, 1, 3, 4, 5, 6] and [by_layer[n] for n in order] == sorted(by_layer.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"layer": 9, "removed": true, "score": 1}', "1: layer is 9; expected a number from 0 to 6"),
        ('{"layer": 0, "removed": true, "score": NaN}', "score is nan; expected a finite number"),
        ('{"layer": 0, "removed": true}', "score is None; expected a finite number"),
        ('{"layer": 0, "removed": false, "score": 1}', "expected removed: true, or one of mamba_num_heads"),
        ('{"layer": 0, "intermediate_size": 36, "score": 1}', "one of mamba_num_heads, mamba_head_dim"),
        ('{"layer": 0, "mamba_num_heads": 24, "score": 1}', "expected a size below 24"),
        ('{"layer": 0, "removed": true, "score": 1}\n' * 2, "2: layer 0 has a score of this already"),
        ("\n", "has no scores"),
        ("{", "scores.jsonl:1"),
    ],
)
def test_a_file_of_scores_is_checked(tmp_path, line, message):
    (tmp_path / "scores.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_scores(tmp_path / "scores.jsonl", PARENT)


def test_refusals(tmp_path):
    found = scores(tmp_path / "scores.jsonl")
    with pytest.raises(ConfigError, match="do not add up over layers"):
        solve(PARENT, SearchConfig(fits=True), found)
    with pytest.raises(ConfigError, match="hidden_size has values; expected them in the file of scores alone"):
        solve(PARENT, SearchConfig(hidden_size=(24,)), found)
    more = read_scores_of(tmp_path, '{"layer": 0, "mamba_num_heads": 12, "score": 1}\n'
                                    '{"layer": 3, "mamba_head_dim": 2, "score": 1}')  # fmt: skip
    with pytest.raises(ConfigError, match="layers of M have scores of mamba_head_dim, mamba_num_heads"):
        solve(PARENT, SearchConfig(), more)
    with pytest.raises(
        ConfigError, match=r"layers allows at most 0 of \*; expected at least 1: 1 of the 2 have no score"
    ):
        solve(PARENT, SearchConfig(layers=("*:0-0",), most_parameters=1.0), found)
    uneven = read_scores_of(tmp_path, '{"layer": 0, "mamba_num_heads": 13, "score": 1}')
    with pytest.raises(ConfigError, match="mamba_num_heads = 13: .*n_groups is 2.*, such as mamba_num_heads = 12"):
        solve(PARENT, SearchConfig(), uneven)
    with pytest.raises(ConfigError, match=r"SearchConfig.removal is .*; expected a file"):
        read_scores(tmp_path / "none.jsonl", PARENT, "removal")


def read_scores_of(folder, text):
    (folder / "more.jsonl").write_text(text)
    return read_scores(folder / "more.jsonl", PARENT)


def test_the_command_takes_scores(tmp_path, capsys):
    scores(tmp_path / "scores.jsonl")
    text = f"SearchConfig.scores = {str(tmp_path / 'scores.jsonl')!r}\nSearchConfig.most_parameters = 50000\n"
    (tmp_path / "search.gin").write_text(model_text(PARENT) + text)
    assert main(["search", "--gin_file", str(tmp_path / "search.gin"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["best"][0]["score"] <= facts["best"][1]["score"] and facts["best"][0]["parameters"] <= 50000


def test_costs_count_the_layers_after_the_slash():
    """The block's MLPs have the width of the others: what is reported is what the model has, and a budget keeps it."""
    parent = hybrid(pattern="-M-/-*-", mtp_depths=1)
    found = [Replacement(layer, "intermediate_size", 36, 0.5) for layer in (0, 2)]
    found += [Replacement(layer, "removed", 0, 9.0) for layer in (0, 2)]
    best = solve(parent, SearchConfig(best=20), found).best
    for one in best:
        main = one.model.layers.main
        counts = np.array([[main.count(letter) for letter in dict.fromkeys(main)]])
        exact = {name: float(value[0]) for name, value in total_costs(one.model, SearchConfig(), counts).items()}
        assert one.costs == exact
        assert one.model.intermediate_size == (36 if "intermediate_size" in one.widths else 72)
    sizes = sorted(one.costs["parameters"] for one in best)
    for most in sizes:
        kept = solve(parent, SearchConfig(best=20, most_parameters=most), found).best
        assert sorted(one.costs["parameters"] for one in kept) == [size for size in sizes if size <= most]


def test_layers_that_no_entry_names_stay(tmp_path):
    found = scores(tmp_path / "scores.jsonl")
    search = SearchConfig(layers=("-:1-2",), most_parameters=60_000.0)
    for one in solve(PARENT, search, found).best:
        assert one.layers["M"] == 2 and one.layers["*"] == 2 and one.layers["-"] in (1, 2)


def test_depths_that_cannot_be_met_are_refused_without_a_budget(tmp_path):
    found = scores(tmp_path / "scores.jsonl")
    with pytest.raises(ConfigError, match="expected at least 1: 1 of the 2 have no score of their removal"):
        solve(PARENT, SearchConfig(layers=("*:0-0",)), found)
    for depth, nearest in (((9, 12), 7), ((8, 8), 7)):
        with pytest.raises(ConfigError, match=f"expected a range with {nearest}, the nearest depth"):
            solve(PARENT, SearchConfig(depth=depth), found)
    for search in (SearchConfig(layers=("-:1-2",), depth=(1, 2)), SearchConfig(layers=("-:1-2",), depth=(1, 4))):
        with pytest.raises(ConfigError, match="expected a range with 5, the nearest depth"):
            solve(PARENT, search, found)
    assert solve(PARENT, SearchConfig(layers=("-:1-2",), depth=(5, 5)), found).best


def test_a_layer_stays():
    parent = hybrid(pattern="M-", mtp_depths=0)
    found = [Replacement(layer, "removed", 0, -1.0) for layer in (0, 1)]
    assert [one.model.pattern for one in solve(parent, SearchConfig(), found).best[:2]] != ["", ""]
    assert all(sum(one.layers.values()) >= 1 for one in solve(parent, SearchConfig(), found).best)
