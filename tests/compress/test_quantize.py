"""Quantised folders against numpy float64: weights, scales of inputs, choices; and what is refused."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.compress.test_upcycle import save
from tests.convert.quantised import read
from tests.helpers import bound
from tests.precision import reference

from orogen.checkpoint import checksums
from orogen.checkpoint.folders import RunFolder
from orogen.checkpoint.open import open_folder, open_model, read_model
from orogen.cli import main
from orogen.compress.calibration_text import rows_of, text_of_files
from orogen.compress.quantize import Calibrated, Quantiser, unquantised_folder
from orogen.compress.sensitivity import Passes
from orogen.config.checks import ConfigError
from orogen.config.data import BYTE_VOCAB_SIZE, DataConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.precision import KINDS
from orogen.config.quantize import QuantizeConfig, Target
from orogen.data.packing import Stream
from orogen.data.vocabulary import make_tokenizer
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.precision.calibration import probe_shape

D = 20  # a block of 16 and a shorter one
MODEL = ModelConfig(
    pattern="ME", vocab_size=BYTE_VOCAB_SIZE, hidden_size=D, mamba_num_heads=4, mamba_head_dim=3, n_groups=2,
    ssm_state_size=5, chunk_size=8, n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=6,
    moe_shared_expert_intermediate_size=10, routed_scaling_factor=2.0,
)  # fmt: skip
TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(60))
TOKENIZER = make_tokenizer(DataConfig(corpus="stdlib", tokenizer="byte"), [])
SETTINGS = (
    "QuantizeConfig.batch_size = 2", "QuantizeConfig.sequence_length = 24", "QuantizeConfig.calibration_tokens = 96",
    "QuantizeConfig.heldout_tokens = 48",
)  # fmt: skip


def model_folder(folder, config=MODEL):
    save(folder, config)
    TOKENIZER.save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A folder, the folder quantised, and the record of it."""
    root = tmp_path_factory.mktemp("quantised")
    source, text = model_folder(root / "model"), root / "text.txt"
    text.write_text(TEXT)
    bindings = bound(*SETTINGS, "QuantizeConfig.scales = 'mse'", "QuantizeConfig.keep = ('mamba:fp8', 'shared:plain')")
    arguments = ["--checkpoint", str(source), "--format", "nvfp4", "--text", str(text), "--out", str(root / "out")]
    assert main(["quantize", *arguments, *bindings]) == 0
    return source, root / "out", json.loads((root / "out" / "quantization.json").read_text())


def weights(folder):
    with open_folder(folder) as opened:
        assert not isinstance(opened, RunFolder)
        return {path: opened.piece(path, ()) for path in opened.parameters()}


MAMBA, EXPERTS = ("backbone", "children", 0, "mixer"), ("backbone", "children", 1, "mixer", "experts")


def test_weights_are_those_of_the_definitions(quantised):
    before, after = (weights(folder) for folder in quantised[:2])
    together = np.concatenate([before[*MAMBA, name] for name in ("z", "x", "B", "C", "dt")], 1)
    largest = np.abs(together).max()  # one matrix in the file, with one scale
    rounded = {(*MAMBA, name): largest for name in ("z", "x", "B", "C", "dt")}
    rounded[*MAMBA, "out"] = np.abs(before[*MAMBA, "out"]).max()
    for name, most in rounded.items():
        expected = np.multiply(*reference.tensor_scaled(before[name], "e4m3", most)).astype(np.float32)
        np.testing.assert_array_equal(after[name], expected, err_msg=str(name))
    for name in ("up", "down"):
        for old, new in zip(before[*EXPERTS, name], after[*EXPERTS, name], strict=True):
            values, scale = reference.searched(old, (16, 1))
            np.testing.assert_array_equal(new, (values * scale).astype(np.float32))
    changed = {*rounded, (*EXPERTS, "up"), (*EXPERTS, "down")}
    for name in before.keys() - changed:  # router, convolutions, norms, shared expert, embedding and head
        np.testing.assert_array_equal(after[name], before[name], err_msg=str(name))


def test_static_scales_are_the_largest_inputs_of_the_calibration_text(quantised):
    source, out, _ = quantised
    config = QuantizeConfig(format="nvfp4", batch_size=2, sequence_length=24, calibration_tokens=96, heldout_tokens=48)
    (source.parent / "again.txt").write_text(TEXT)
    text = text_of_files([str(source.parent / "again.txt")], TOKENIZER, config)
    tokens = np.concatenate([batch.tokens_bt for batch in text.calibration])
    assert text.tokens == (96, 48)
    held = weights(source)
    h = held["embedding", "weight"][tokens].astype(np.float64)
    h /= np.sqrt((h**2).mean(-1, keepdims=True) + MODEL.layer_norm_epsilon)
    largest = np.abs(h * held["backbone", "children", 0, "norm", "weight"]).max()
    files = read(out)
    assert files["backbone.layers.0.mixer.in_proj.input_scale"] == pytest.approx(largest / 448, rel=1e-5)
    scales = [files[f"backbone.layers.1.mixer.experts.{n}.up_proj.input_scale"] for n in range(3)]
    assert len(set(map(float, scales))) == 1 and scales[0] > 0  # one for all experts of a layer
    assert "backbone.layers.1.mixer.shared_experts.up_proj.input_scale" not in files


def test_the_record_says_what_was_chosen_and_measured(quantised):
    record = quantised[2]
    assert {row["unit"]: row["format"] for row in record["layers"]} == {
        "mamba_in": "fp8", "mamba_out": "fp8", "routed": "nvfp4", "shared_up": "plain", "shared_down": "plain",
    }  # fmt: skip
    inner, states, heads = 12, 10, 4
    mamba, routed, shared = D * (2 * inner + 2 * states + heads) + inner * D, 3 * 2 * D * 6, 2 * D * 10
    bits = (8 * mamba + 4 * routed + 16 * shared) / (mamba + routed + shared)
    assert record["effective_bits"] == pytest.approx(bits)
    assert record["stored_bits"] > bits
    assert 0 < record["loss_before"] != record["loss_after"] != record["loss_after_weights_alone"]
    assert abs(record["relative_loss"]) < 0.05
    assert record["tokens"] == {"calibration": 96, "heldout": 48}
    assert (quantised[1] / "quantization.png").read_bytes()[:4] == b"\x89PNG"
    listed = (quantised[1] / checksums.NAME).read_text()
    assert " quantization.json\n" in listed and " quantization.png\n" in listed
    checksums.check(quantised[1])


def test_a_folder_is_published_when_it_is_whole(quantised, tmp_path, monkeypatch, capsys):
    """A loss that cannot be measured, or a picture that cannot be drawn, leaves no folder."""
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["--checkpoint", str(quantised[0]), "--format", "fp8", "--text", str(tmp_path / "text.txt")]
    arguments += [*bound(*SETTINGS, "QuantizeConfig.inputs = 'none'"), "--out", str(tmp_path / "out")]

    def fails(*_):
        raise ConfigError("no picture")

    monkeypatch.setattr("orogen.report.quantised.draw_formats", fails)
    assert main(["quantize", *arguments]) == 2
    assert capsys.readouterr().err.endswith("orogen: no picture\n")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_other_programs_read_the_layout_and_the_numbers(quantised, tmp_path):
    """As ModelOpt writes it; numbers decoded by hand from the files."""
    assert main(["convert", "to-hf", str(quantised[1]), str(tmp_path / "hf")]) == 0
    stated = json.loads((tmp_path / "hf" / "hf_quant_config.json").read_text())["quantization"]
    assert stated["quant_algo"] == "MIXED_PRECISION"
    layers = stated["quantized_layers"]
    assert layers["backbone.layers.0.mixer.in_proj"] == {"quant_algo": "FP8"}
    assert layers["backbone.layers.1.mixer.experts.2.down_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert len(layers) == 2 + 3 * 2
    files = read(tmp_path / "hf")
    name = "backbone.layers.1.mixer.experts.2.up_proj"
    codes = files[f"{name}.weight"]
    pairs = np.stack([codes & 15, codes >> 4], -1).reshape(6, D)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    scale = np.repeat(files[f"{name}.weight_scale"].astype(np.float32), 16, 1)[:, :D]
    decoded = np.where(pairs & 8, -1, 1) * grid[pairs & 7] * scale * files[f"{name}.weight_scale_2"]
    expected = weights(quantised[1])[*EXPERTS, "up"][2]
    np.testing.assert_allclose(decoded.T, expected, rtol=1e-6)


def test_a_planted_sensitive_layer_is_kept_high(tmp_path):
    """Its output is a hundred times as large as the others', and so are the errors of its output."""
    config = ModelConfig(pattern="---", vocab_size=BYTE_VOCAB_SIZE, hidden_size=16, intermediate_size=16)
    source = model_folder(tmp_path / "model", config)
    tensors = load_file(source / "model.safetensors")
    tensors["backbone.children.0.children.0.mixer.down"][1] *= 100
    save_file(tensors, source / "model.safetensors")
    (tmp_path / "text.txt").write_text(TEXT)
    settings = QuantizeConfig(
        format="auto", candidates=("nvfp4", "plain"), effective_bits=8.0, inputs="none", batch_size=2,
        sequence_length=24, calibration_tokens=48, heldout_tokens=48, score_tokens=48,
    )  # fmt: skip
    with unquantised_folder(source, tmp_path / "out") as folder:
        text = lambda tokenizer: text_of_files([str(tmp_path / "text.txt")], tokenizer, settings)  # noqa: E731
        quantiser = Quantiser(folder, settings, text)
        calibrated = quantiser.calibrate()
        outcome = quantiser.write(calibrated, tmp_path / "out")
    chosen = {
        (unit.layer, unit.name): name for unit, name in zip(outcome.units, outcome.allocation.formats, strict=True)
    }
    assert [key for key, name in chosen.items() if name == "plain"] == [(1, "dense_up"), (1, "dense_down")]
    assert quantiser.described(calibrated, outcome)["tokens"] == {"heldout": 48, "sensitivities": 48}
    assert outcome.allocation.effective_bits == 8.0 and 0 < outcome.allocation.score < np.inf


def test_auto_may_choose_nvfp4_and_fp8_for_weights_alone(tmp_path, monkeypatch):
    config = ModelConfig(pattern="-", vocab_size=BYTE_VOCAB_SIZE, hidden_size=16, intermediate_size=16)
    source = model_folder(tmp_path / "model", config)
    (tmp_path / "text.txt").write_text(TEXT)
    settings = QuantizeConfig(
        format="auto", candidates=("nvfp4", "fp8"), effective_bits=6.0, inputs="none", batch_size=2,
        sequence_length=24, calibration_tokens=48, heldout_tokens=48, score_tokens=48,
    )  # fmt: skip
    scores = {(0, "dense_up"): {"nvfp4": 3.0, "fp8": 1.0}, (0, "dense_down"): {"nvfp4": 2.0, "fp8": 1.5}}
    with unquantised_folder(source, tmp_path / "out") as folder:
        quantiser = Quantiser(folder, settings, lambda t: text_of_files([str(tmp_path / "text.txt")], t, settings))
        held = []

        def reading(*arguments, **named):
            held.append(len(jax.tree.leaves(quantiser.passes.opened.params)))
            return read_model(*arguments, **named)

        monkeypatch.setattr("orogen.compress.quantize.read_model", reading)
        outcome = quantiser.write(Calibrated(6.0, None, scores), tmp_path / "out")
    assert held == [0]  # one model at a time is in memory
    assert list(outcome.allocation.formats) == ["fp8", "nvfp4"] and np.isfinite(outcome.loss)
    names = {name.removeprefix("layers.0.").removeprefix("backbone.") for name in read(tmp_path / "out")}
    assert {name.rpartition(".")[2] for name in names} >= {"weight_packed", "weight_global_scale", "weight_scale"}


def test_rows_are_full_and_documents_stay_apart():
    config = QuantizeConfig(format="fp8", batch_size=2, sequence_length=5)
    streams = [
        Stream(np.arange(start, start + n, dtype=np.int32), np.ones(n)) for start, n in ((10, 3), (20, 9), (40, 10))
    ]
    first, second = rows_of(streams, config)
    assert first.tokens_bt.tolist() == [[10, 11, 12, 20, 21], [22, 23, 24, 25, 26]]
    assert first.segments_bt.tolist() == [[1, 1, 1, 2, 2], [1] * 5]
    assert first.positions_bt.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    assert first.weights_bt.tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 1, 1]]
    assert second.tokens_bt.tolist() == [[27, 28, 40, 41, 42], [43, 44, 45, 46, 47]]
    assert second.segments_bt[0].tolist() == [1, 1, 2, 2, 2]


def test_refusals(refused, tmp_path, quantised):
    source, text = str(quantised[0]), tmp_path / "text.txt"
    text.write_text("short")
    common = ["quantize", "--checkpoint", source, "--out", str(tmp_path / "new")]
    files = ["--format", "fp8", "--text", str(text)]
    assert "expected either --text, or a DataConfig" in refused(*common, "--format", "fp8")
    assert "nothing binds QuantizeConfig.format" in refused(*common, "--text", str(text))
    assert "fills 0 tokens of batches of 2 x 24; expected 96: more text" in refused(*common, *files, *bound(*SETTINGS))
    taken = ["quantize", "--checkpoint", source, "--out", source]
    assert "exists; expected a new folder" in refused(*taken, *files)
    again = ["quantize", "--checkpoint", str(quantised[1]), "--out", str(tmp_path / "new")]
    assert "is quantised; expected a checkpoint that is not" in refused(*again, *files, *bound(*SETTINGS))
    little = ["--format", "auto", "--text", str(text), *bound("QuantizeConfig.effective_bits = 3.5")]
    assert "effective_bits is 3.5; expected at least 4, which the smallest" in refused(*common, *little)
    nothing = bound("QuantizeConfig.keep = ('mamba:plain', 'routed:plain', 'shared:plain')")
    assert "expected something to quantise among" in refused(*common, *files, *nothing)
    parts = bound("QuantizeConfig.keep = ('routed_up:plain',)")
    assert "expected routed in place of routed_up" in refused(*common, *files, *parts)
    auto = ["--format", "auto", "--text", str(text), *bound("QuantizeConfig.score_tokens = 200000")]
    assert "score_tokens is 200000; expected at most calibration_tokens = 131072" in refused(*common, *auto)
    split = ["--format", "nvfp4", "--text", str(text), *bound(*SETTINGS, "PlanConfig.tensor = 2")]
    line = "layer 0: 2 ranks share the 12 inputs of mamba_out; expected a multiple of 16 for each"
    assert line in refused(*common, *split)


def test_numbers_that_are_not_finite_are_refused(tmp_path, monkeypatch, capsys):
    config = ModelConfig(pattern="-", vocab_size=BYTE_VOCAB_SIZE, hidden_size=16, intermediate_size=16)
    source = model_folder(tmp_path / "model", config)
    opened = open_model(source)
    tensors = load_file(source / "model.safetensors")
    tensors["backbone.children.0.norm.weight"][:] = 3e38
    save_file(tensors, source / "model.safetensors")
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["--checkpoint", source, "--text", tmp_path / "text.txt", "--out", tmp_path / "out", *bound(*SETTINGS)]
    none = bound("QuantizeConfig.inputs = 'none'")
    line = "the loss of the calibration text is nan; expected a finite number"
    assert main([str(word) for word in ["quantize", "--format", "fp8", *arguments, *none]]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [f"orogen: {line}"]
    probe = np.zeros((1, *probe_shape(1, 1)))
    probe[0, 0, KINDS.index("dense_down")] = np.nan
    monkeypatch.setattr(Passes, "_probes", lambda *_: iter(probe))
    passes = Passes(opened)
    with pytest.raises(ConfigError, match="layer 0: the input of dense_down is not finite; expected"):
        passes.maxima([], [{}])
    targets = [{"dense_up": (Target(format="fp8"),)}]
    with pytest.raises(ConfigError, match="layer 0: the sensitivity of dense_down is not finite; expected"):
        passes.scores([], targets, np.zeros((1, 1, 1)))


def test_ranks_may_share_inputs_in_whole_blocks():
    model = dataclasses.replace(MODEL, mamba_head_dim=8)  # 32 inputs of mamba_out, 10 of shared_down
    plan, built = make_plan(PlanConfig(tensor=2), model), build(model)
    passes = Passes(types.SimpleNamespace(config=model, plan=plan, built=built))
    nvfp4, fp8 = Target(format="nvfp4"), Target(format="fp8")
    passes.require_whole_blocks([{"mamba_in": [nvfp4], "mamba_out": [nvfp4]}, {"shared_up": [nvfp4]}])
    passes.require_whole_blocks([{}, {"shared_down": [fp8]}])
    with pytest.raises(ConfigError, match="layer 1: 2 ranks share the 10 inputs of shared_down"):
        passes.require_whole_blocks([{}, {"shared_down": [fp8, nvfp4]}])


def test_empty_rows_of_experts_with_biases_are_not_measured():
    model = dataclasses.replace(MODEL, mlp_bias=True, moe_bias="routed")
    opened = types.SimpleNamespace(config=model, plan=make_plan(PlanConfig(dispatch="alltoall"), model))
    with pytest.raises(ConfigError, match="dispatch is 'alltoall'; expected another: biases of experts"):
        Passes(opened)
