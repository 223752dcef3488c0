"""The ranking of candidates after light distillation: its commands, its order, going on, refusals. No model runs."""

import dataclasses
import json

import pytest
from tests.helpers import hybrid

from orogen.cli import make_parser
from orogen.compress.puzzle import Replacement, solve
from orogen.compress.retrain import Retraining, call_orogen, removal_of, retrain
from orogen.compress.search import search_models
from orogen.compress.speed import Speed
from orogen.config.checks import ConfigError
from orogen.config.cluster import ClusterConfig
from orogen.config.engine import EngineConfig
from orogen.config.load import load_prune
from orogen.config.search import SearchConfig
from orogen.model.count import count

PARENT = hybrid(pattern="M-*M-", mtp_depths=0, intermediate_size=40)
SEARCH = SearchConfig(layers=("M:1-2",), intermediate_size=(40, 28, 24), most_parameters=60_000, best=3)
LOSSES = {1: 2.5, 2: 2.25, 3: 2.75}


class Commands:
    """In place of `orogen`: notes the words, and leaves what the command would leave."""

    def __init__(self, parameters, *, heldout=True):
        self.words, self._parameters, self._heldout = [], list(parameters), heldout

    def __call__(self, words):
        self.words.append(list(words))
        make_parser().parse_args(list(words))  # ends the test if the command has other options
        value = lambda name: words[words.index(name) + 1]  # noqa: E731
        if words[0] == "prune":
            out = self.folder / value("--out")
            out.mkdir(parents=True)
            return {"parameters": [0, self._parameters[int(out.parent.name[-1]) - 1]]}
        run = self.folder / value("--run")
        run.mkdir(parents=True, exist_ok=True)
        number = int(run.parent.name[-1]) if run.name == "distilled" else 2
        loss = LOSSES[number] - (0.5 if run.name == "winner" else 0)
        scores = {"whole_heldout_loss": loss, "whole_heldout_divergence": loss / 10} if self._heldout else {}
        (run / "metrics.jsonl").write_text(json.dumps({"step": 7, **scores}) + "\n")
        return {}


@pytest.fixture
def found():
    speed = Speed(SEARCH, ClusterConfig(), EngineConfig(compute_dtype="bfloat16", slots=2, max_length=64))
    ranking = search_models(PARENT, SEARCH, speed)
    assert len(ranking.best) == 3
    return ranking.best


@pytest.fixture
def asked(tmp_path):
    (tmp_path / "scores").mkdir()
    taken = {"width_scores": "activations", "depth_scores": "cosine", "expert_scores": "count", "seed": 4}
    (tmp_path / "scores" / "pruning.json").write_text(json.dumps({"prune": taken}))
    return Retraining(tmp_path / "base", tmp_path / "scores", ["light.gin", "more.gin"], [], tmp_path / "run")


def commands(asked, found, **settings):
    made = Commands([one.costs["parameters"] for one in found], **settings)
    made.folder = asked.run.parent
    return made


def test_candidates_are_pruned_distilled_and_ranked_by_loss(asked, found):
    call = commands(asked, found)
    ranked = retrain(found, PARENT, asked._replace(winner=["long.gin"]), call)
    assert [one["place"] for one in ranked] == [2, 1, 3]
    assert ranked[0]["heldout_loss"] == 2.25 and ranked[0]["heldout_divergence"] == 0.225
    assert ranked[0]["winner"]["heldout_loss"] == 1.75 and "winner" not in ranked[1]
    assert [words[0] for words in call.words] == ["prune", "distill"] * 3 + ["distill"]
    light, winner = call.words[1], call.words[-1]
    assert [light[i + 1] for i, word in enumerate(light) if word == "--gin_file"] == ["light.gin", "more.gin"]
    assert winner[winner.index("--student") + 1] == str(asked.run / "candidate_2" / "distilled")
    assert winner[winner.index("--gin_file") + 1] == "long.gin"
    lines = [json.loads(line) for line in (asked.run / "ranking.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [2, 1, 3]


def test_a_candidate_is_pruned_to_its_own_sizes_by_the_scores_given(asked, found):
    call = commands(asked, found)
    retrain(found, PARENT, asked, call)
    for one, words in zip(found, call.words[::2], strict=True):
        prune, _ = load_prune([words[words.index("--gin_file") + 1]])
        changed = {"intermediate_size": one.widths["intermediate_size"]}
        assert prune.widths == ({} if one.widths["intermediate_size"] == 40 else changed)
        assert (prune.pattern or PARENT.layers.main) == one.model.layers.main
        assert (prune.depth_scores, prune.expert_scores, prune.seed) == ("cosine", "count", 4)
        assert words[words.index("--scores") + 1] == str(asked.scores)


def test_the_layers_of_a_program_are_those_that_are_pruned(asked):
    """The pattern alone fits two choices here: by it and the removal scores layers 0 and 3 would stay, and to narrow
    layer 3 costs 5."""
    parent = hybrid(pattern="M-M-", mtp_depths=0)
    scores = [Replacement(layer, "removed", 0, score) for layer, score in enumerate((9.0, 1.0, 3.1, 1.1))]
    scores += [Replacement(1, "intermediate_size", 36, 0.0), Replacement(3, "intermediate_size", 36, 5.0)]
    small = count(hybrid(pattern="M-", mtp_depths=0, intermediate_size=36))["total"]
    settings = SearchConfig(layers=("M:1-1", "-:1-1"), most_parameters=float(small), best=1)
    (best,) = solve(parent, settings, scores).best
    assert (best.removed, best.model.pattern, best.score) == ((2, 3), "M-", 3.1 + 1.1)
    assert best.facts()["remove_layers"] == [2, 3]
    call = commands(asked, [best])
    retrain([best], parent, asked, call)
    prune, _ = load_prune([call.words[0][call.words[0].index("--gin_file") + 1]])
    assert (prune.remove_layers, prune.pattern) == ((2, 3), None)
    assert prune.widths == {"intermediate_size": 36}


def test_candidates_lack_the_layers_of_lowest_score(asked):
    """Of the file that the search names, or else of the pruning whose scores the candidates are pruned by."""
    assert removal_of(SEARCH, PARENT, None) == removal_of(SEARCH, PARENT, asked) == []
    line = lambda layer, score: json.dumps({"layer": layer, "removed": True, "score": score}) + "\n"  # noqa: E731
    (asked.scores / "removal.jsonl").write_text(line(0, 3.0) + line(1, 2.0))
    assert removal_of(SEARCH, PARENT, asked) == [1, 0]
    named = asked.run.parent / "named.jsonl"
    named.write_text(line(0, 1.0) + line(1, 2.0))
    assert removal_of(dataclasses.replace(SEARCH, removal=str(named)), PARENT, asked) == [0, 1]


def test_what_is_pruned_already_is_not_pruned_again(asked, found):
    def stopped(words):
        if words[0] == "distill" and "candidate_2" in words[words.index("--run") + 1]:
            raise KeyboardInterrupt
        return call(words)

    call = commands(asked, found)
    with pytest.raises(KeyboardInterrupt):
        retrain(found, PARENT, asked, stopped)
    assert len((asked.run / "ranking.jsonl").read_text().splitlines()) == 1
    call = commands(asked, found)
    assert [one["place"] for one in retrain(found, PARENT, asked, call)] == [2, 1, 3]
    assert [words[0] for words in call.words] == ["distill", "distill", "prune", "distill"]
    assert all("--resume" in words for words in call.words if words[0] == "distill")
    with pytest.raises(ConfigError, match="has other candidates than this search; expected a new --run"):
        retrain(found[:2], PARENT, asked, call)


def test_refusals(asked, found, refused, tmp_path):
    call = commands(asked, found)
    wrong = found[0]._replace(costs=found[0].costs | {"parameters": found[0].costs["parameters"] + 1})
    with pytest.raises(ConfigError, match="candidate 1 has .* parameters when pruned; expected"):
        retrain([wrong], PARENT, asked, call)
    with pytest.raises(ConfigError, match="has no whole_heldout_loss after its last step; expected DataConfig.heldout"):
        retrain(found, PARENT, asked._replace(run=tmp_path / "new"), commands(asked, found, heldout=False))
    same = found[0]._replace(model=PARENT, widths={})
    with pytest.raises(ConfigError, match="the model itself is a candidate; expected budgets that it exceeds"):
        retrain([same], PARENT, asked._replace(run=tmp_path / "whole"), call)
    line = refused("search", "--gin_file", "gin_configs/search/nemotron_nano2.gin", "--run", tmp_path / "x")
    assert "--checkpoint and --scores and --training missing; expected" in line
    with pytest.raises(ConfigError, match="ended with status 2; expected 0"):
        call_orogen(["search", "--gin_file", str(tmp_path / "absent.gin")])
