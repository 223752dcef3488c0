"""Weights of every family in the layouts of quantised files: rounded as their format says, read back, or refused."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.compress.test_quantize import EXPERTS, weights
from tests.convert.quantised import read
from tests.convert.synthetic import CASES, shapes, write

from orogen.checkpoint.folders import HuggingFaceFolder
from orogen.compress.quantised_folder import encoded, entries_of, write_entries
from orogen.compress.quantize import Quantiser
from orogen.config.checks import ConfigError
from orogen.config.quantize import QuantizeConfig, Target
from orogen.precision.stored import decode


def test_weights_alone_in_nvfp4_and_fp8_are_written_as_compressed_tensors(tmp_path):
    """Its global scale is the reciprocal; what is decoded is as near as in ModelOpt's layout."""
    write(tmp_path / "hf", *shapes("nemotron_h"))
    for name, keep in (("mixed", ("mamba:fp8",)), ("alone", ("mamba:plain",))):
        config = QuantizeConfig(format="nvfp4", inputs="none", keep=keep)
        with HuggingFaceFolder(tmp_path / "hf") as folder:
            chosen = [{k: config.target(n) for k, (n,) in one.items()} for one in config.choices(folder.config)]
            write_entries(folder, entries_of(folder, chosen), tmp_path / name, maxima=None)
    mixed, alone = read(tmp_path / "mixed"), read(tmp_path / "alone")
    stem = "backbone.layers.1.mixer.experts.2.up_proj"
    product = mixed[f"{stem}.weight_global_scale"] * alone[f"{stem}.weight_scale_2"]
    np.testing.assert_allclose(product, 1, rtol=1e-6)
    up = weights(tmp_path / "hf")[*EXPERTS, "up"].astype(np.float64)
    errors = [np.square(weights(tmp_path / n)[*EXPERTS, "up"] - up).sum() for n in ("mixed", "alone")]
    assert errors[0] == pytest.approx(errors[1], rel=0.02) and errors[0] < 0.01 * (up**2).sum()


@pytest.mark.parametrize("scales", ["max", "mse", "four_over_six"])
def test_a_reciprocal_global_scale_is_as_near(scales):
    draw = np.random.default_rng(2).normal(size=(2, 7, 40)).astype(np.float32)
    target, largest = Target(format="nvfp4", scales=scales), np.abs(draw).max((1, 2))
    stored = [encoded(draw, target, largest, inverse=inverse) for inverse in (False, True)]
    np.testing.assert_allclose(stored[0].global_scale * stored[1].global_scale, 1, rtol=1e-6)
    np.testing.assert_array_equal(stored[0].scale.view(np.uint8), stored[1].scale.view(np.uint8))
    np.testing.assert_allclose(decode(stored[0]), decode(stored[1]), rtol=1e-6)
    assert np.square(decode(stored[1]) - draw).sum() < 0.012 * np.square(draw).sum()


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("nemotron_h_biased", "gpt2")])
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_every_family_is_written_and_read_back(case, name, tmp_path):
    """What products read is rounded, by as much as the format is coarse; all else stays to the bit."""
    write(tmp_path / "hf", *shapes(case))
    config = QuantizeConfig(format=name, keep=(), inputs="none")
    with HuggingFaceFolder(tmp_path / "hf") as folder:
        choices = config.choices(folder.config)
        targets = [{kind: config.target(name) for kind in layer} for layer in choices]
        entries = entries_of(folder, targets)
        assert {entry.weight.kind for entry in entries.values()} == {kind for layer in choices for kind in layer}
        touched = {piece.path for name in entries for piece in folder.tensors.table[name].pieces}
        errors = write_entries(folder, entries, tmp_path / "out", maxima=None)
    before, after = weights(tmp_path / "hf"), weights(tmp_path / "out")
    for path, old in before.items():
        old, new = old.astype(np.float64), after[path].astype(np.float64)
        if path not in touched:
            np.testing.assert_array_equal(new, old)
            continue
        relative = np.sqrt(((new - old) ** 2).sum() / (old**2).sum())
        assert (0.015 < relative < 0.04) if name == "fp8" else (0.06 < relative < 0.13), (path, relative)
    assert all(error.bytes_after < error.bytes_before for error in errors.values())


def test_of_scales_with_equal_errors_the_smallest_is_taken():
    """Ones are exact as 4 times 1/4, 2 times 1/2, 1 times 1 and 1/2 times 2."""
    stored = encoded(
        np.ones((2, 3, 16), np.float32), Target(format="nvfp4", scales="mse"), np.full(2, 2688, np.float32)
    )
    np.testing.assert_array_equal(stored.global_scale, [1, 1])
    np.testing.assert_array_equal(stored.scale.astype(np.float32), np.full((2, 3, 1), 0.25))
    assert (stored.values == 0x66).all()


def test_weights_that_no_layout_describes_are_refused(tmp_path):
    write(tmp_path / "hf", *shapes("gpt2"))
    config = QuantizeConfig(format="fp8", keep=())
    with HuggingFaceFolder(tmp_path / "hf") as folder:
        targets = [dict.fromkeys(layer, config.target("fp8")) for layer in config.choices(folder.config)]
        with pytest.raises(ConfigError, match="is no weight that files describe as quantised; expected a model whose"):
            write_entries(folder, entries_of(folder, targets), tmp_path / "out", maxima=None)
    assert not (tmp_path / "out").exists()


def test_layouts_are_checked_before_the_model_is_read(tmp_path):
    config = QuantizeConfig(format="fp8", keep=())
    write(tmp_path / "hf", *shapes("gpt2"))
    with HuggingFaceFolder(tmp_path / "hf") as folder:
        with pytest.raises(ConfigError, match="is no weight that files describe as quantised"):
            Quantiser(folder, config, lambda tokenizer: pytest.fail("the model was read"))


@pytest.mark.parametrize("other", ["fp8", "plain"])
def test_stacked_experts_have_one_format(other, tmp_path):
    """gpt-oss's files name all experts of a layer as one module."""
    write(tmp_path / "hf", *shapes("gpt_oss"))
    config = QuantizeConfig(format="nvfp4", keep=(), inputs="none")
    with HuggingFaceFolder(tmp_path / "hf") as folder:
        targets = [dict.fromkeys(layer, config.target("nvfp4")) for layer in config.choices(folder.config)]
        targets[1]["routed_down"] = config.target(other)
        with pytest.raises(ConfigError, match="layers.0.mlp.experts has .*; expected one format"):
            write_entries(folder, entries_of(folder, targets), tmp_path / "out", maxima=None)
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    write(tmp_path / "hf", *shapes("nemotron"))
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = np.nan
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    config = QuantizeConfig(format="nvfp4", inputs="none")
    with HuggingFaceFolder(tmp_path / "hf") as folder:
        targets = [dict.fromkeys(layer, config.target("nvfp4")) for layer in config.choices(folder.config)]
        with pytest.raises(ConfigError, match="layers.1.mlp.up_proj.weight has a number that is not finite"):
            write_entries(folder, entries_of(folder, targets), tmp_path / "out", maxima=None)
    assert not (tmp_path / "out").exists()
