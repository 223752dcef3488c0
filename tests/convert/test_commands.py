"""`orogen convert`, `score`, `generate` and `train --checkpoint`: answers, and refusals that change nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.convert.synthetic import read, same, short_nemotron_h, write
from tests.helpers import bound, listing

from orogen.checkpoint.open import open_model
from orogen.checkpoint.transfer import export, from_hf
from orogen.cli import main
from orogen.config.load import load
from orogen.data.vocabulary import byte_tokenizer
from orogen.infer.engine import Engine
from orogen.infer.generate import engine_for, generate
from orogen.infer.request import Request, Sampling

FIXTURES = Path(__file__).parent.parent / "fixtures" / "models"
RUN = """
DataConfig.corpus = {corpus!r}
DataConfig.tokenizer = 'byte'
DataConfig.heldout_fraction = 0.3
DataConfig.tuning_fraction = 0.0
TrainConfig.steps = {steps}
TrainConfig.batch_size = 2
TrainConfig.sequence_length = 24
TrainConfig.seed = 0
TrainConfig.sample_tokens = 4
OptimizerConfig.learning_rate = {rate}
"""


def four_layers(folder: Path, rows: int, **changes: int) -> Path:
    """A Hugging Face folder of one layer of each type with a tokenizer of 259 tokens. rows: of its embedding."""
    config, tensors = short_nemotron_h(rows)
    write(folder, config | changes, tensors, "float32")
    byte_tokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Such a folder, with settings for sampling."""
    folder = four_layers(tmp_path_factory.mktemp("hub") / "hf", 259, bos_token_id=17)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    return folder


def run(*arguments: str | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def recipe(tmp_path: Path, *lines: str, steps: int = 1, rate: float = 1e-12) -> Path:
    corpus = tmp_path / "corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(20):
        (corpus / f"{number}.txt").write_text(f"document {number}, which is short\n")
    file = tmp_path / "recipe.gin"
    file.write_text(RUN.format(corpus=str(corpus), steps=steps, rate=rate) + "\n".join(lines))
    return file


# convert


def test_convert_carries_the_tokenizer_along(hub, tmp_path, capsys):
    run("convert", "from-hf", hub, tmp_path / "ours", "--json")
    assert json.loads(capsys.readouterr().out) == {"target": str(tmp_path / "ours")}
    run("convert", "to-hf", tmp_path / "ours", tmp_path / "back")
    assert listing(tmp_path / "back").keys() == listing(hub).keys()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hub / name).read_bytes()
    assert same(read(hub), read(tmp_path / "back"))


def test_convert_refusals(refused, hub, tmp_path):
    target = tmp_path / "target"
    assert "has no config.json; expected a Hugging Face folder" in refused("convert", "from-hf", tmp_path, target)
    assert refused("convert", "from-hf", hub, target, "--dtype", "float32").startswith("--dtype float32; expected it")
    assert "has no config.gin and no config.json" in refused("convert", "to-hf", tmp_path / "none", target)
    assert "is a Hugging Face folder; expected a run" in refused("convert", "to-hf", hub, target)
    target.mkdir()
    (target / "file").touch()
    assert refused("convert", "from-hf", hub, target) == f"{str(target)!r} exists; expected a new folder"


def test_what_memory_cannot_hold_is_not_converted(refused, hub, tmp_path, monkeypatch):
    from orogen.convert import command
    from orogen.simulate.fit import Memory

    ours, target = tmp_path / "ours", tmp_path / "target"
    from_hf(hub, ours)
    largest = max(array.nbytes for array in read(hub).values())
    monkeypatch.setattr(command, "free_memory", lambda: Memory(largest - 1, None))
    for direction, source in (("from-hf", hub), ("to-hf", ours)):
        message = refused("convert", direction, source, target)
        expected = f"is {largest}; expected less: conversion needs at least {largest:,} bytes of memory"
        assert message.startswith("the size of ") and expected in message
    monkeypatch.setattr(command, "free_memory", lambda: Memory(largest, None))
    monkeypatch.setattr(command, "answer", lambda *_: None)
    run("convert", "to-hf", ours, target)
    (ours / "checkpoints").mkdir()  # a run's model is held in memory whole
    message = refused("convert", "to-hf", ours, tmp_path / "other")
    assert "expected less: conversion needs at least" in message and "for parameters" in message


def test_checksums_of_a_folder_are_checked(refused, hub, tmp_path):
    ours = tmp_path / "ours"
    from_hf(hub, ours)
    np.save(tmp_path / "in.npy", np.zeros((1, 3), np.int32))
    (ours / "tokenizer" / "chat_template.jinja").write_text("{{ added later }}")  # what is not listed is not read
    file = ours / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    gin = recipe(tmp_path)
    for command in (
        ("generate", "--checkpoint", ours),
        ("score", "--checkpoint", ours, "--tokens", tmp_path / "in.npy", "--out", tmp_path / "out.npz"),
        ("convert", "to-hf", ours, tmp_path / "back"),
        ("train", "--gin_file", gin, "--run", tmp_path / "run", "--checkpoint", ours),
    ):
        assert refused(*command).startswith(f"{file} is damaged: its sha256 is ")
    (ours / "checksums.sha256").unlink()  # as an earlier release wrote it
    export(ours, tmp_path / "back")


# score


@pytest.fixture
def scored(tmp_path) -> Callable[..., dict]:
    """Scores tokens and segments with a checkpoint folder."""

    def score(folder: Path, tokens: np.ndarray, segments: np.ndarray | None = None) -> dict:
        np.save(tmp_path / "in.npy", tokens)
        more = []
        if segments is not None:
            np.save(tmp_path / "segments.npy", segments)
            more = ["--segments", tmp_path / "segments.npy"]
        run("score", "--checkpoint", folder, "--tokens", tmp_path / "in.npy", "--out", tmp_path / "out.npz", *more)
        assert not (tmp_path / "out.npz.tmp").exists()
        return dict(np.load(tmp_path / "out.npz"))

    return score


def test_score_equals_transformers(scored):
    folder = FIXTURES / "nemotron_h_moe"
    expected = np.load(folder / "ref.npz")
    tokens = expected["ids_37"]
    found = scored(folder, tokens)
    assert found["logits"].dtype == found["logprobs"].dtype == np.float32
    np.testing.assert_allclose(found["logits"], expected["logits_37"], atol=1e-5 * np.ptp(expected["logits_37"]))
    likelihood = jax.nn.log_softmax(expected["logits_37"][:, :-1])
    chosen = np.take_along_axis(np.asarray(likelihood), tokens[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(found["logprobs"], chosen, atol=2e-5 * np.ptp(expected["logits_37"]))
    assert found["logprobs"].mean() == pytest.approx(-expected["loss_37"], rel=1e-5)


def test_left_padding_and_packing_do_not_change_scores(scored):
    folder, tokens = FIXTURES / "nemotron_h_moe", np.random.default_rng(0).integers(0, 96, (2, 11))
    alone = scored(folder, tokens)
    padded, segments = np.zeros((2, 19), np.int64), np.zeros((2, 19), np.int64)
    padded[:, 8:], segments[:, 8:] = tokens, 1
    found = scored(folder, padded, segments)
    np.testing.assert_allclose(found["logits"][:, 8:], alone["logits"], atol=1e-5 * np.ptp(alone["logits"]))
    np.testing.assert_allclose(found["logprobs"][:, 8:], alone["logprobs"], atol=2e-5 * np.ptp(alone["logits"]))
    assert (found["logprobs"][:, :8] == 0).all()
    packed = scored(folder, tokens.reshape(1, 22), np.repeat([[3, 4]], 11, 1))
    np.testing.assert_allclose(
        packed["logits"].reshape(alone["logits"].shape), alone["logits"], atol=1e-5 * np.ptp(alone["logits"])
    )
    assert packed["logprobs"][0, 10] == 0


def test_scores_in_several_parts_are_the_same(scored, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 96, (3, 10))
    whole = scored(FIXTURES / "nemotron_h_dense", tokens)
    monkeypatch.setattr("orogen.infer.score.TOKENS_AT_ONCE", 20)
    parts = scored(FIXTURES / "nemotron_h_dense", tokens)
    np.testing.assert_allclose(parts["logits"], whole["logits"], atol=1e-5 * np.ptp(whole["logits"]))


BAD_TOKENS = {
    "float": (np.ones((2, 3)), "tokens are float64 [2, 3]; expected integers (batch, time)"),
    "flat": (np.ones(3, int), "tokens are int64 [3]; expected integers (batch, time)"),
    "empty": (np.ones((0, 3), int), "tokens are int64 [0, 3]; expected integers (batch, time)"),
    "large": (np.full((1, 3), 96), "tokens are from 96 to 96; expected 0 to 95"),
    "negative": (np.full((1, 3), -1), "tokens are from -1 to -1; expected 0 to 95"),
}


@pytest.mark.parametrize(("tokens", "message"), BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_score_refuses_tokens(refused, tmp_path, tokens, message):
    np.save(tmp_path / "in.npy", tokens)
    command = ("score", "--checkpoint", FIXTURES / "nemotron_h_dense", "--tokens", tmp_path / "in.npy")
    assert refused(*command, "--out", tmp_path / "out.npz") == message


def test_score_refuses_files_and_segments(refused, tmp_path):
    command = ("score", "--checkpoint", FIXTURES / "nemotron_h_dense", "--out", tmp_path / "out.npz", "--tokens")
    (tmp_path / "text.npy").write_text("no array")
    assert "expected a .npy file" in refused(*command, tmp_path / "text.npy")
    np.savez(tmp_path / "several.npy", np.ones(2))
    assert "No such file" in refused(*command, tmp_path / "none.npy")
    assert "holds several arrays" in refused(*command, tmp_path / "several.npy.npz")
    np.save(tmp_path / "in.npy", np.ones((2, 5), int))
    message = refused(*command, tmp_path / "in.npy", "--segments", tmp_path / "none.npy")
    assert "No such file" in message
    np.save(tmp_path / "segments.npy", np.ones((2, 4), int))
    message = refused(*command, tmp_path / "in.npy", "--segments", tmp_path / "segments.npy")
    assert message == "segments are [2, 4]; expected [2, 5], as the tokens"
    out = tmp_path / "nowhere" / "out.npz"
    message = refused(*command, tmp_path / "in.npy", "--out", out)
    assert message == f"--out {str(out)!r}; expected a file in a folder that exists"


# generate


def test_generate_reads_every_kind_of_folder_alike(hub, tmp_path, capsys):
    run("convert", "from-hf", hub, tmp_path / "ours")
    capsys.readouterr()
    texts = []
    for folder in (hub, tmp_path / "ours"):
        run("generate", "--checkpoint", folder, "--prompt", "a word", "--tokens", "5", "--temperature", "0", "--json")
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def padded(tmp_path_factory) -> Path:
    """Such a folder with more rows than tokens."""
    return four_layers(tmp_path_factory.mktemp("padded") / "hf", 300)


def test_rows_without_a_token_are_never_sampled(padded):
    """At a high temperature: 400 uniform draws from 300 rows miss the 41 without a token with probability 1e-26."""
    hot = [Sampling(temperature=1e9, seed=seed) for seed in range(10)]
    requests = [Request(prompt=(97, 98), max_tokens=40, sampling=each, ignore_eos=True) for each in hot]
    answers = Engine(open_model(padded), engine_for(rows=10, length=42)).run(requests)
    ids = [token.id for outputs in answers for output in outputs for token in output.tokens]
    assert len(ids) == 400 and max(ids) < 259
    assert len(set(ids)) > 150  # one random key for all steps would draw ten


def test_every_eos_id_of_the_folder_ends_a_text(padded, tmp_path):
    loaded = open_model(padded)
    (whole,) = generate(loaded, ["ab"], tokens=12, temperature=1e9, seed=3)
    ids = loaded.tokenizer.encode(whole).tolist()
    folder = tmp_path / "hf"
    shutil.copytree(padded, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, *range(3, 259)]}))
    assert generate(open_model(folder), ["ab"], tokens=12, temperature=1e9, seed=3) == [""]
    assert len(ids) > 0


def test_score_reads_no_tokenizer(padded, tmp_path, scored):
    folder = tmp_path / "hf"
    shutil.copytree(padded, folder)
    tokens = np.array([[3, 299, 5, 7]])
    expected = scored(folder, tokens)
    (folder / "tokenizer.json").write_text("{")
    np.testing.assert_array_equal(scored(folder, tokens)["logits"], expected["logits"])


def test_generate_without_a_tokenizer(refused):
    message = refused("generate", "--checkpoint", FIXTURES / "nemotron_h_dense", "--prompt", "a")
    assert message == "the checkpoint has no tokenizer.json; expected one, to read the prompt with"


# train


@pytest.mark.parametrize("kind", ["hf", "ours"])
def test_training_starts_from_a_checkpoint_and_goes_back(hub, tmp_path, kind, scored):
    source = hub
    if kind == "ours":
        run("convert", "from-hf", hub, tmp_path / "ours")
        source = tmp_path / "ours"
    file = recipe(tmp_path)
    run("train", "--gin_file", file, "--run", tmp_path / "run", "--checkpoint", source)
    assert load([tmp_path / "run" / "config.gin"])[0].model == load([file], MODEL_OF_HUB)[0].model
    # A learning rate of next to nothing: the weights are still those of the checkpoint.
    run("convert", "to-hf", tmp_path / "run", tmp_path / "back", "--dtype", "float32")
    before, after = read(hub), read(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        tolerance = 2e-3 if name.endswith("e_score_correction_bias") else 1e-6  # the bias moves by 1e-3 per step
        np.testing.assert_allclose(after[name], before[name], atol=tolerance)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["bos_token_id"] == 17  # kept through the run
    tokens = np.random.default_rng(0).integers(0, 259, (1, 9))
    scores = [scored(folder, tokens)["logits"] for folder in (hub, tmp_path / "run")]
    np.testing.assert_allclose(*scores, atol=2e-3 * np.ptp(scores[0]))


MODEL_OF_HUB = [f"ModelConfig.{k} = {v!r}" for k, v in {
    "pattern": "EM*-", "vocab_size": 259, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 40, "mamba_num_heads": 4, "mamba_head_dim": 10, "n_groups": 2,
    "ssm_state_size": 6, "conv_kernel": 3, "chunk_size": 16, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 14, "moe_shared_expert_intermediate_size": 22, "moe_latent_size": 18,
    "routed_scaling_factor": 2.5,
}.items()]  # fmt: skip


def test_a_run_becomes_bfloat16_with_float32_biases(hub, tmp_path):
    run("train", "--gin_file", recipe(tmp_path, *MODEL_OF_HUB), "--run", tmp_path / "run")
    run("convert", "to-hf", tmp_path / "run", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert {n: a.shape for n, a in tensors.items()} == {n: a.shape for n, a in read(hub).items()}
    for name, array in tensors.items():
        assert array.dtype.name == ("float32" if name.endswith("e_score_correction_bias") else "bfloat16")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("nemotron_h", "bfloat16")
    assert config["max_position_embeddings"] == 24  # the sequence length of its training
    assert [config[f"{role}_token_id"] for role in ("pad", "bos", "eos")] == [0, 1, 2]
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    run("convert", "from-hf", tmp_path / "hf", tmp_path / "ours")


def test_a_model_that_differs_from_the_checkpoint_is_refused(refused, hub, tmp_path):
    file = recipe(tmp_path, *MODEL_OF_HUB)
    command = ("train", "--gin_file", file, "--run", tmp_path / "run", "--checkpoint")
    message = refused(*command, hub, *bound("ModelConfig.routed_scaling_factor = 1.0"))
    assert message == f"ModelConfig.routed_scaling_factor is 1.0; expected 2.5, as {str(hub)!r} has it"
    assert "has no config.gin and no config.json" in refused(*command, tmp_path / "none")
    small = FIXTURES / "nemotron_h_moe"
    assert refused(*command, small).startswith("ModelConfig.pattern is 'EM*-'; expected")


def test_lengths_beyond_the_memory_are_refused(refused, hub, tmp_path):
    tokens = 2**20 - 64
    many = ("--gin_bindings", "EngineConfig.slots=100000000")
    message = refused("generate", "--checkpoint", hub, "--prompt", "a", *many)
    assert message.startswith("EngineConfig.slots is 100000000; expected less: inference needs at least ")
    assert "for caches of slots" in message
    np.save(tmp_path / "in.npy", np.zeros((1, tokens), np.int32))
    files = ("--tokens", tmp_path / "in.npy", "--out", tmp_path / "out.npz")
    message = refused("score", "--checkpoint", hub, *files)
    assert message.startswith(f"length of --tokens is {tokens}; expected less: scoring needs at least ")
    assert not (tmp_path / "out.npz").exists()
