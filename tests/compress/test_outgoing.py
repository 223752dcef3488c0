"""The weights that leave units, and what they change in scores; weights that are not finite."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.compress.pruned import DEPTH, MODEL, OTHER, of, prune, save

from orogen.checkpoint.leaves import dotted
from orogen.checkpoint.open import open_model
from orogen.compress.importance import Scores, shapes, weighed
from orogen.compress.outgoing import READERS, outgoing
from orogen.model.homes import homes

GATED = dataclasses.replace(of("E"), mlp_gated=True, mlp_hidden_act="silu")


def norm(*arrays, over):
    return np.sqrt(sum(np.square(array.astype(np.float64)).sum(over) for array in arrays))


def by_hand(model, letter, read):
    """From the parameters of one layer, which `read` takes by their names."""
    if letter == "-":
        return {"mlp": norm(read("down"), over=1)}
    if letter in "*+":
        return {"heads": norm(read("out").reshape(model.num_attention_heads, -1, 22), over=(1, 2))}
    if letter == "M":
        return {"mamba": norm(read("norm.weight")[:, None] * read("out"), over=1).reshape(18, 5)}
    if letter != "E":
        return {}
    found = {"expert_width": norm(read("experts.down"), over=2), "shared": norm(read("shared.down"), over=1)}
    if model.moe_latent_size:
        into = [read(f"experts.{name}") for name in ("up", "gate")[: 1 + model.mlp_gated]]
        found |= {"latent_in": norm(*into, over=(0, 2)), "latent_out": norm(read("latent_up"), over=1)}
    return found


@pytest.mark.parametrize("model", [MODEL, OTHER, GATED], ids=["MODEL", "OTHER", "GATED"])
def test_norms_are_those_of_numpy(tmp_path, model):
    """Of repeated layers each has its own."""
    arrays = load_file(save(tmp_path / "before", model) / "model.safetensors")
    found = outgoing(open_model(tmp_path / "before"))
    for home, mine in zip(homes(model), found, strict=True):
        stem = dotted((*home.path, "mixer"))
        expected = by_hand(model, home.letter, lambda name, s=stem, i=home.index: arrays[f"{s}.{name}"][i])
        assert mine.keys() == expected.keys()
        for name, norms in expected.items():
            np.testing.assert_allclose(mine[name], norms, rtol=1e-5, err_msg=f"{home} {name}")


def test_all_scores_but_those_of_outputs_have_readers():
    """A new kind of unit is either read by weights, or scored by what it writes."""
    names = {name for model in (MODEL, OTHER) for layer in shapes(model)[1] for name in layer}
    assert names - READERS.keys() == {"experts"}


def test_units_that_are_read_weakly_go_first_by_contributions():
    """By activations only those that nothing reads; experts and channels of the stream have no weights of their own."""
    found = Scores(np.arange(3.0), [{"mlp": np.array([1.0, 2.0, 3.0]), "experts": np.array([5.0, 6.0])}], None)
    read = [{"mlp": np.array([4.0, 0.0, 0.5])}]
    expected = {"activations": [1.0, 0.0, 3.0], "contributions": [4.0, 0.0, 1.5]}
    for name, mlp_f in expected.items():
        made = weighed(found, read, name)
        np.testing.assert_array_equal(made.layers[0]["mlp"], mlp_f)
        np.testing.assert_array_equal(made.layers[0]["experts"], [5.0, 6.0])
        np.testing.assert_array_equal(made.hidden, found.hidden)


def test_contributions_are_measured_and_kept_apart_from_activations(tmp_path, capsys):
    """Units with small outgoing weights are the least important by one, and not by the other."""
    weak = [1, 4, 7]

    def plant(name, array):
        if name.endswith("mixer.down"):
            array[..., weak, :] *= 1e-3
        return array

    before, kept = save(tmp_path / "before", DEPTH, plant), {}
    for name in ("activations", "contributions"):
        assert prune(before, tmp_path / name, "intermediate_size = 9", f"width_scores = {name!r}") == 0
        units = json.loads((tmp_path / name / "pruning.json").read_text())["kept"]["units"]
        kept[name] = [sorted(layer["mlp"]) for layer in units if layer]
    assert kept["contributions"] == [[0, 2, 3, 5, 6, 8, 9, 10, 11]] * 3
    assert all(mine != other for mine, other in zip(kept["activations"], kept["contributions"], strict=True))
    scores = ["--scores", str(tmp_path / "contributions")]
    assert prune(before, tmp_path / "no", "intermediate_size = 9", more=scores) == 2
    assert "expected PruneConfig.width_scores = 'contributions'" in capsys.readouterr().err


@pytest.mark.parametrize("scores", ["activations", "random"])
@pytest.mark.parametrize("planted", [(np.nan, np.nan), (np.inf, -np.inf)])
def test_a_weight_that_is_not_finite_is_named(tmp_path, capsys, scores, planted):
    """Measured or not, and if no token of the text reads it."""

    def plant(name, array):
        if name == "embedding.weight":
            array[0, 3:5] = planted
        return array

    before = save(tmp_path / "before", DEPTH, plant)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # which would be more than one line
        assert prune(before, tmp_path / "no", "intermediate_size = 9", f"width_scores = {scores!r}") == 2
    expected = "orogen: embedding.weight has a number that is not finite; expected finite weights\n"
    assert capsys.readouterr().err == expected and not (tmp_path / "no").exists()
