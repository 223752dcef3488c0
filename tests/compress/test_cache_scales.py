"""Scales of keys and values: calibrated by `orogen quantize`, in the files, and read by an engine."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tests.compress.test_quantize import SETTINGS, TEXT, TOKENIZER, model_folder, weights
from tests.convert.quantised import read
from tests.convert.synthetic import CASES, shapes, write
from tests.helpers import bound, several_devices
from tests.infer.engines import asked, changed, engine_of, ids

from orogen.checkpoint.cache_scales import attention_modules, scales_of
from orogen.checkpoint.folders import HuggingFaceFolder
from orogen.checkpoint.open import open_model
from orogen.cli import main
from orogen.compress.cache_scales import cache_scales
from orogen.compress.calibration_text import text_of_files
from orogen.compress.quantised_folder import entries_of, write_entries
from orogen.config.checks import ConfigError
from orogen.config.data import BYTE_VOCAB_SIZE
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.quantize import QuantizeConfig

D = 16
PADDING = 3  # a token that no text has
MODEL = ModelConfig(
    pattern="*-*-", vocab_size=BYTE_VOCAB_SIZE, hidden_size=D, intermediate_size=24, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A folder, the folder quantised with the cache, the record, and the calibration text."""
    root = tmp_path_factory.mktemp("cache")
    source, text = model_folder(root / "model", MODEL), root / "text.txt"
    text.write_text(TEXT)
    arguments = ["--checkpoint", str(source), "--format", "fp8", "--text", str(text), "--out", str(root / "out")]
    bindings = bound(*SETTINGS, "QuantizeConfig.key_values = 'fp8'", "QuantizeConfig.keep = ('attention:plain',)")
    assert main(["quantize", *arguments, *bindings]) == 0
    config = QuantizeConfig(format="fp8", batch_size=2, sequence_length=24, calibration_tokens=96, heldout_tokens=48)
    record = json.loads((root / "out" / "quantization.json").read_text())
    return source, root / "out", record, text_of_files([str(text)], TOKENIZER, config).calibration


def test_scales_are_the_largest_keys_and_values_of_the_text(quantised):
    """Of the first layer, in float64, from the embedding on."""
    source, out, _, batches = quantised
    held, tokens = weights(source), np.concatenate([batch.tokens_bt for batch in batches])
    h = held["embedding", "weight"][tokens].astype(np.float64)
    h /= np.sqrt((h**2).mean(-1, keepdims=True) + MODEL.layer_norm_epsilon)
    stem = ("backbone", "children", 0, "children", 0)
    h = h * held[*stem, "norm", "weight"][0]
    files = read(out)
    for name, scale in (("key", "k_proj.k_scale"), ("value", "v_proj.v_scale")):
        largest = np.abs(h @ held[*stem, "mixer", name][0]).max()
        assert files[f"backbone.layers.0.mixer.{scale}"] == pytest.approx(largest / 448, rel=1e-5)
        assert files[f"backbone.layers.2.mixer.{scale}"] > 0
    assert sum(name.endswith(("k_scale", "v_scale")) for name in files) == 4


def test_files_say_it_and_an_engine_reads_it(quantised, tmp_path):
    """As ModelOpt writes it; exported, opened again, and decoded with: greedy answers of a random model are near."""
    _, out, record, _ = quantised
    assert main(["convert", "to-hf", str(out), str(tmp_path / "hf")]) == 0
    stated = json.loads((tmp_path / "hf" / "hf_quant_config.json").read_text())["quantization"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    assert stated["kv_cache_quant_algo"] == "FP8" and config["kv_cache_scheme"]["num_bits"] == 8
    files, opened = read(out), open_model(tmp_path / "hf")
    expected = [
        tuple(float(files[f"backbone.layers.{n}.mixer.{s}"]) for s in ("k_proj.k_scale", "v_proj.v_scale"))
        for n in (0, 2)
    ]
    assert opened.cache_scales == (expected[0], None, expected[1], None)
    found = engine_of(opened, key_values="fp8").run([asked(range(40, 52), 6)])
    assert len(ids(found[0])) == 6
    assert record["key_values"] == "fp8" and record["loss_after"] != record["loss_after_weights_alone"]
    assert record["loss_after"] == pytest.approx(record["loss_before"], rel=0.01)


@several_devices
def test_scales_do_not_depend_on_the_plan(quantised):
    source, _, _, batches = quantised
    one, two = (cache_scales(open_model(source, plan), batches) for plan in (None, PlanConfig(data=2, tensor=2)))
    for first, second in zip(one, two, strict=True):
        assert first == second or first == pytest.approx(second, rel=1e-6)


def test_padding_does_not_count_and_latent_attention_has_one_scale(tmp_path):
    """Tokens of documents alone; beside them a token of padding whose keys are the largest, since it alone has
    anything in a channel that the norm makes 100 times larger."""
    latent = {"rope_theta": 100.0, "kv_lora_rank": 7, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 5}
    model = dataclasses.replace(MODEL, pattern="+", q_lora_rank=None, **latent)
    opened = open_model(model_folder(tmp_path / "model", model))
    norm = ("backbone", "children", 0, "norm", "weight")
    opened = changed(opened, ("embedding", "weight"), lambda w: w.at[:, 5].set(0).at[PADDING].set(jnp.arange(D) == 5))
    opened = changed(opened, norm, lambda w: w.at[..., 5].set(100))
    (tmp_path / "text.txt").write_text(TEXT)
    config = QuantizeConfig(format="fp8", batch_size=2, sequence_length=24, calibration_tokens=48, heldout_tokens=48)
    (batch,) = text_of_files([str(tmp_path / "text.txt")], TOKENIZER, config).calibration
    assert not (batch.tokens_bt == PADDING).any()
    (pair,) = cache_scales(opened, [batch])
    assert pair is not None and pair[0] == pair[1] > 0
    late = np.arange(24) >= 12
    padded = batch._replace(tokens_bt=np.where(late, PADDING, batch.tokens_bt))
    ((largest, _),) = cache_scales(opened, [padded])
    assert largest > 10 * pair[0]
    ((less, _),) = cache_scales(opened, [padded._replace(segments_bt=np.where(late, 0, batch.segments_bt))])
    assert 1e-30 < less <= pair[0]
    ((none, _),) = cache_scales(opened, [padded._replace(segments_bt=np.zeros_like(batch.segments_bt))])
    assert none < 1e-30


@pytest.mark.parametrize("case", [case for case in CASES if case != "gpt2"])
def test_every_family_names_its_attention(case, tmp_path):
    """And its scales are read back from the files."""
    write(tmp_path / "hf", *shapes(case))
    with HuggingFaceFolder(tmp_path / "hf") as folder:
        found = attention_modules(folder.tensors.table, folder.config)
        letters = enumerate(folder.config.layers.main)
        assert sorted(found) == [number for number, letter in letters if letter in "*w+"]
        assert all(name.endswith((".mixer", ".self_attn", ".attention")) for name in found.values()), found
        config = QuantizeConfig(format="fp8", inputs="none")  # as compressed-tensors
        targets = [{k: config.target(n) for k, (n,) in one.items()} for one in config.choices(folder.config)]
        scales = tuple((0.5 + n, 0.25) if n in found else None for n in range(len(folder.config.layers.main)))
        write_entries(folder, entries_of(folder, targets), tmp_path / "out", maxima=None, cache=scales)
    assert sum(name.endswith(".v_scale") and "v_proj" not in name for name in read(tmp_path / "out")) == len(found)
    with HuggingFaceFolder(tmp_path / "out", stored=True) as folder:
        assert folder.tensors.cache_scales == scales


def test_models_without_scales_are_refused_before_they_are_read(quantised, tmp_path, monkeypatch, capsys):
    source, mamba = quantised[0], dataclasses.replace(
        MODEL, pattern="M", mamba_num_heads=4, mamba_head_dim=3, n_groups=2, ssm_state_size=5, chunk_size=8
    )  # fmt: skip
    monkeypatch.setattr("orogen.compress.quantize.read_model", lambda *_: pytest.fail("the model is read"))
    (tmp_path / "text.txt").write_text(TEXT)
    for folder, more, line in (
        (
            model_folder(tmp_path / "mamba", mamba),
            (),
            "key_values is 'fp8'; expected 'none': the model has no attention",
        ),
        (source, ("PlanConfig.context = 2",), "PlanConfig.context is 2; expected 1 where keys and values are"),
    ):
        arguments = ["--checkpoint", str(folder), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
        bindings = bound(*SETTINGS, "QuantizeConfig.key_values = 'fp8'", *more)
        assert main(["quantize", "--format", "fp8", *arguments, *bindings]) == 2
        assert line in capsys.readouterr().err


def test_refusals(quantised, tmp_path):
    out = quantised[1]
    with pytest.raises(ConfigError, match="QuantizeConfig.key_values"):
        QuantizeConfig(format="fp8", key_values="int8")
    assert main(["convert", "to-hf", str(out), str(tmp_path / "hf")]) == 0
    with HuggingFaceFolder(tmp_path / "hf") as folder:
        tensors = folder.tensors
        spoiled = f"{attention_modules(tensors.table, tensors.config)[2]}.k_proj.k_scale"
        number = "expected a finite number above 0"
        for wrong, line in (
            ([1.0, 2.0], "has the shape (2,); expected one number"),
            *((one, f"is {one}; {number}") for one in (-1.0, np.nan, np.inf, 0.0)),
        ):
            read_one = lambda name, wrong=wrong: np.array(wrong if name == spoiled else 0.5)  # noqa: E731
            scales = scales_of(tensors.table, tensors.config, tensors.stored, read_one)
            assert scales == ((0.5, 0.5), None, f"{spoiled} {line}", None)
    opened = open_model(tmp_path / "hf")._replace(cache_scales=scales)
    with pytest.raises(ConfigError, match=f"{spoiled} is 0.0; {number}, or 'fp8_unscaled'"):
        engine_of(opened, key_values="fp8")
    opened = opened._replace(cache_scales=((0.5, 0.5), None, None, None))
    with pytest.raises(ConfigError, match="expected a checkpoint with k_scale and v_scale for layer 2"):
        engine_of(opened, key_values="fp8")
