"""Exports without a Hugging Face origin: transformers reads every option of every family, or it is refused by name."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tests.convert.synthetic import read, same, stored

from orogen.checkpoint.leaves import dotted
from orogen.checkpoint.open import open_model
from orogen.checkpoint.transfer import export, from_hf
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.config.reads import plain_model
from orogen.config.text import model_text
from orogen.convert.config import read_config, write_config
from orogen.convert.names import leaf_shapes, table
from orogen.layers.documents import documents

BASES = (
    "nemotron_h", "mamba2", "mamba", "deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "nemotron", "gpt2",
)  # fmt: skip
YARN = {"yarn_factor": 4.0, "yarn_original_positions": 4096}  # so long that YaRN changes most pairs
# Other values of the fields in which checkpoints of a family may differ.
OPTIONS: dict[str, dict] = {
    "tied or not": {"tie_word_embeddings": "other"},
    "mlp_bias": {"mlp_bias": "other"},
    "mlp_bias shared": {"mlp_bias": True, "moe_bias": "shared"},
    "no attention bias": {"attention_bias": "none"},
    "qkv bias": {"attention_bias": "qkv"},
    "attention bias": {"attention_bias": "all"},
    "qk_norm": {"qk_norm": "other"},
    "sinks": {"attention_sinks": "other"},
    "partial rotary": {"partial_rotary_factor": 0.5},
    "interleaved": {"rope_interleave": "other"},
    "yarn": YARN,
    "yarn untruncated": YARN | {"yarn_truncate": False, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
    "yarn mscale": YARN | {"yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.9},
    "no rotary": {"rope_theta": None, "yarn_factor": None},
    "gelu": {"mlp_hidden_act": "gelu"},
    "silu": {"mlp_hidden_act": "silu"},
    "gated": {"mlp_gated": "other"},
    "limit": {"swiglu_limit": 0.5},
    "no limit": {"swiglu_limit": None},
    "proj bias": {"mamba_proj_bias": "other"},
    "conv bias": {"use_conv_bias": "other"},
    "one norm group": {"mamba_norm_groups": 1},
    "softmax": {"router_score": "softmax"},
    "softmax of the chosen": {"router_score": "softmax_topk"},
    "router bias": {"router_bias": "other"},
    "no correction": {"router_correction_bias": "other"},
    "renormalised": {"norm_topk_prob": "other"},
    "scaled": {"routed_scaling_factor": 1.7},
    "groups": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    "no shared expert": {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False},
    "shared gate": {"moe_shared_expert_gate": "other"},
    "no latent": {"moe_latent_size": None},
    "no query latent": {"q_lora_rank": None},
    "norm": {"norm": "layer"},
    "epsilon": {"layer_norm_epsilon": 3e-3},
    "heads of another size": {"head_dim": 20},
    "one key": {"num_key_value_heads": 1},
    "windows": {"pattern": "windows", "sliding_window": 5},
    "windows only": {"pattern": "windows only", "sliding_window": 5},
    "dense first": {"pattern": "dense first", "intermediate_size": 26},
    "dense last": {"pattern": "dense last", "intermediate_size": 26},
    "steps at least": {"time_step_min": 0.05},
    "steps at most": {"time_step_max": 0.4},
    "three taps": {"conv_kernel": 3},
    "one group": {"n_groups": 1},
    "rank": {"time_step_rank": 5},
    "one expert": {"num_experts_per_tok": 1},
}
PATTERNS: dict[str, Callable[[str], str]] = {
    "windows": lambda pattern: pattern.replace("*", "w", 1),
    "windows only": lambda pattern: pattern.replace("*", "w"),
    "dense first": lambda pattern: pattern.replace("E", "-", 1),
    "dense last": lambda pattern: "-".join(pattern.rsplit("E", 1)),
}


def as_it_is(base: str) -> ModelConfig:
    """The stored case of a family, without MTP."""
    return dataclasses.replace(read_config(stored()[base]["config"])[1], mtp_depths=0)


def with_option(base: str, config: ModelConfig, option: str) -> ModelConfig | None:
    """The model with an option; None if no layer reads the change, or if the family refuses it."""
    changes = dict(OPTIONS[option])
    for field, value in changes.items():
        if value == "other":
            changes[field] = not getattr(config, field)
        if field == "pattern":
            changes[field] = PATTERNS[value](config.pattern)
    try:
        found = dataclasses.replace(config, **changes)
        write_config(base, found)
    except ConfigError:
        return None
    return None if plain_model(found) == plain_model(config) else found


def together(base: str) -> tuple[ModelConfig, list[str]]:
    """A family's case with those options of COMPUTED that are compatible, and their names."""
    config, taken = as_it_is(base), []
    for option in COMPUTED:
        if (base, option) != UPPER_LIMIT and (found := with_option(base, config, option)) is not None:
            config, taken = found, [*taken, option]
    return config, taken


def write_ours(folder: Path, config: ModelConfig, family: str) -> None:
    """An Orogen checkpoint folder with random numbers."""
    draw = np.random.default_rng(0)
    arrays = {}
    for path, shape in leaf_shapes(table(family, config)).items():
        name, noise = dotted(path), draw.normal(size=shape).astype(np.float32)
        if name.endswith("A_log"):
            arrays[name] = 0.3 * noise
        elif "norm" in name:
            arrays[name] = 1 + 0.2 * noise
        else:
            arrays[name] = noise / np.sqrt(shape[-2]) if len(shape) > 1 else 0.2 * noise
    folder.mkdir()
    save_file({n: np.ascontiguousarray(a, np.float32) for n, a in arrays.items()}, folder / "model.safetensors")
    (folder / "config.gin").write_text(model_text(config))


def logits(folder: Path, tokens_bt: np.ndarray) -> np.ndarray:
    """The logits of each position, computed by Orogen."""
    loaded = open_model(folder)
    lm = nnx.merge(loaded.built.graph, loaded.params, loaded.buffers)
    compute = jax.jit(lambda tokens: lm.logits(tokens, documents(jnp.ones_like(tokens)), loaded.plan))
    return np.asarray(compute(jnp.asarray(tokens_bt, jnp.int32)))


def refused(base: str, **fields) -> str:
    with pytest.raises(ConfigError) as error:
        write_config(base, dataclasses.replace(read_config(stored()[base]["config"])[1], **fields))
    return str(error.value)


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        ("nemotron_h", {"attention_bias": "all"}, "ModelConfig.attention_bias is 'all'"),
        ("nemotron_h", {"attention_bias": "qkv"}, "ModelConfig.attention_bias is 'qkv'"),
        ("nemotron_h", {"mlp_bias": True}, "ModelConfig.moe_bias is 'routed'"),
        (
            "nemotron_h",
            {"moe_shared_expert_intermediate_size": None},
            "ModelConfig.moe_shared_expert_intermediate_size is None",
        ),
        ("mixtral", {"attention_bias": "all"}, "ModelConfig.attention_bias is 'all'"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "ModelConfig.partial_rotary_factor is 0.5"),
        ("qwen2_moe", {"partial_rotary_factor": 0.5}, "ModelConfig.partial_rotary_factor is 0.5"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, "ModelConfig.partial_rotary_factor is 0.5"),
        ("gpt_oss", {"partial_rotary_factor": 0.5}, "ModelConfig.partial_rotary_factor is 0.5"),
        ("gpt_oss", {"swiglu_limit": None}, "ModelConfig.swiglu_limit is None"),
        ("qwen2_moe", {"attention_bias": "all"}, "ModelConfig.attention_bias is 'all'"),
        ("qwen3_moe", {"attention_bias": "qkv"}, "ModelConfig.attention_bias is 'qkv'"),
    ],
)
def test_what_the_class_of_a_family_lacks_is_refused(base, fields, message):
    assert refused(base, **fields).startswith(message)


def test_an_option_that_is_off_does_not_come_back_as_the_default():
    """DeepSeek-V3's class has a query latent, shared experts and an MTP block unless the file says otherwise."""
    config = read_config(stored()["deepseek_v3_plain"]["config"])[1]
    written = write_config("deepseek_v3", dataclasses.replace(config, q_lora_rank=None))
    assert written["q_lora_rank"] is None and written["num_nextn_predict_layers"] == 0
    assert read_config(written)[1].q_lora_rank is None


def tied_nemotron_h(tmp_path: Path) -> ModelConfig:
    config = dataclasses.replace(read_config(stored()["nemotron_h"]["config"])[1], tie_word_embeddings=True)
    write_ours(tmp_path / "ours", config, "nemotron_h")
    return config


def test_a_tied_nemotron_h_is_exported_with_its_head(tmp_path):
    """transformers' class does not tie: without the tensor it initialises a head at random."""
    config = tied_nemotron_h(tmp_path)
    export(tmp_path / "ours", tmp_path / "hf")
    tensors = read(tmp_path / "hf")
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["backbone.embeddings.weight"])
    from_hf(tmp_path / "hf", tmp_path / "again")
    assert open_model(tmp_path / "again").config == config
    save_file({n: a for n, a in tensors.items() if n != "lm_head.weight"}, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "without")  # as Orogen once wrote it
    export(tmp_path / "without", tmp_path / "with")
    assert "lm_head.weight" in read(tmp_path / "with")


def test_a_tied_nemotron_h_with_two_different_tensors_is_untied(tmp_path):
    tied_nemotron_h(tmp_path)
    export(tmp_path / "ours", tmp_path / "hf")
    tensors = read(tmp_path / "hf")
    tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "again")
    assert not open_model(tmp_path / "again").config.tie_word_embeddings
    export(tmp_path / "again", tmp_path / "back")
    np.testing.assert_array_equal(read(tmp_path / "back")["lm_head.weight"], tensors["lm_head.weight"])
    assert not json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]


def test_only_families_that_lack_the_tie_write_the_head_twice(tmp_path):
    for base in ("mamba", "gpt2"):
        config = read_config(stored()[base]["config"])[1]
        assert config.tie_word_embeddings
        write_ours(tmp_path / base, config, base)
        export(tmp_path / base, tmp_path / f"{base}_hf")
        assert "lm_head.weight" not in read(tmp_path / f"{base}_hf")


@pytest.mark.parametrize("base", BASES)
def test_the_context_length_is_stated(base):
    config = read_config(stored()[base]["config"])[1]
    written = write_config(base, config, context=777)
    if base == "gpt2":  # always the number of its position vectors
        assert written["n_positions"] == config.learned_positions and "max_position_embeddings" not in written
        return
    assert written["max_position_embeddings"] == 777
    kept = {**written, "bos_token_id": 17}
    assert write_config(base, config, kept, context=1000) == kept | {"max_position_embeddings": 1000}
    assert write_config(base, config, kept, context=100) == write_config(base, config, kept) == kept
    assert read_config(written)[1] == read_config(kept)[1]


def test_a_longer_context_does_not_change_the_original_one_of_yarn():
    """If it is not stated, YaRN's original context is max_position_embeddings."""
    rope = {"rope_type": "yarn", "factor": 4.0}
    kept = stored()["mixtral"]["config"] | {"max_position_embeddings": 64, "rope_parameters": rope}
    config = read_config(kept)[1]
    written = write_config("mixtral", config, kept, context=512)
    assert written["max_position_embeddings"] == 512 and read_config(written)[1] == config
    assert config.yarn_original_positions == 64


# Options that change the computation, in an order in which many are compatible; the others change names and shapes.
COMPUTED = (
    "mlp_bias shared", "partial rotary", "interleaved", "yarn untruncated", "yarn mscale", "limit", "renormalised",
    "groups", "scaled", "epsilon", "windows", "steps at least", "steps at most", "rank", "gelu", "one group", "one key",
)  # fmt: skip
UPPER_LIMIT = ("nemotron_h", "steps at most")  # transformers 5.23 ignores it there (transformers#48989)


def exported(folder: Path, config: ModelConfig, family: str) -> Path:
    """A Hugging Face folder of the model, written beside Orogen's own folder of it."""
    write_ours(folder, config, family)
    export(folder, folder.with_name(f"{folder.name}_hf"))
    return folder.with_name(f"{folder.name}_hf")


def read_by_transformers(folder: Path) -> tuple[Any, dict[str, list[str]]]:
    """The model that transformers loads from the folder, and the names of tensors that it reports, by kind of fault."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    found, faults = load(folder, dtype=torch.float32, output_loading_info=True)
    return found, {kind: sorted(map(str, names)) for kind, names in faults.items() if names}


def off(ours: Path, theirs: Any, tokens_bt: np.ndarray) -> float:
    """The largest difference of logits, relative to their range."""
    import torch

    theirs.set_experts_implementation("eager")  # torch's grouped product refuses odd widths
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(tokens_bt)).logits.numpy()
    return float(np.abs(logits(ours, tokens_bt) - expected).max() / np.ptp(expected))


@pytest.mark.peer
@pytest.mark.parametrize("base", BASES)
def test_transformers_finds_every_tensor_of_every_option(base, tmp_path):
    """No key is missing or unexpected, tied or untied."""
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    models = {option: found for option in OPTIONS if (found := with_option(base, as_it_is(base), option)) is not None}
    wrong = {}
    for option, config in {"as it is": as_it_is(base), **models}.items():
        for tied in (False, True):
            config = dataclasses.replace(config, tie_word_embeddings=tied)
            hf = exported(tmp_path / f"{option} {tied}", config, base)
            assert json.loads((hf / "config.json").read_text())["model_type"] == base
            if faults := read_by_transformers(hf)[1]:
                wrong[option, tied] = faults
    assert not wrong
    assert {"tied or not", "epsilon"} <= models.keys()


# The number of compatible options, so that none is dropped unnoticed.
TOGETHER = {
    "nemotron_h": 9, "mamba2": 4, "mamba": 2, "deepseek_v3": 8, "mixtral": 5, "qwen2_moe": 7, "qwen3_moe": 6,
    "gpt_oss": 6, "nemotron": 5, "gpt2": 2,
}  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("base", BASES)
def test_transformers_computes_with_the_options_as_we_do(base, tmp_path):
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, taken = together(base)
    assert len(taken) == TOGETHER[base], taken
    cases = {"as it is": as_it_is(base), "together": config}
    if base == "deepseek_v3":
        cases["no shared expert"] = with_option(base, as_it_is(base), "no shared expert")
    tokens_bt = np.random.default_rng(2).integers(3, 96, (2, 37))
    found = {}
    for name, config in cases.items():
        theirs = read_by_transformers(exported(tmp_path / name, config, base))[0]
        found[name] = off(tmp_path / name, theirs, tokens_bt)
    assert max(found.values()) < 1e-5, found


DEEP = {"pattern": "+-" * 60 + "+E/+E", "mtp_depths": 1}  # the block is layer 61


@pytest.mark.peer
@pytest.mark.parametrize(("base", "fields"), [("nemotron_h", {"pattern": "MEM*-EME/*E"}), ("deepseek_v3", DEEP)])
def test_transformers_knows_the_mtp_block_of_an_export(base, fields, tmp_path):
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = dataclasses.replace(read_config(stored()[base]["config"])[1], **fields)
    assert read_by_transformers(exported(tmp_path / "ours", config, base))[1] == {}


def shallow() -> ModelConfig:
    return dataclasses.replace(read_config(stored()["deepseek_v3"]["config"])[1], pattern="+-+E/+E", mtp_depths=1)


def test_a_line_says_what_transformers_does_differently(tmp_path, capsys):
    exported(tmp_path / "deep", dataclasses.replace(shallow(), **DEEP), "deepseek_v3")
    assert capsys.readouterr().err == ""
    exported(tmp_path / "shallow", shallow(), "deepseek_v3")
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.layers.2.* hold the multi-token-prediction block" in line
    limited = dataclasses.replace(read_config(stored()["nemotron_h"]["config"])[1], time_step_max=0.4)
    exported(tmp_path / "limited", limited, "nemotron_h")
    (line,) = capsys.readouterr().err.splitlines()
    assert "no upper limit on time steps, which is 0.4 here" in line


@pytest.mark.peer
def test_transformers_reports_just_those_tensors(tmp_path):
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    faults = read_by_transformers(exported(tmp_path / "ours", shallow(), "deepseek_v3"))[1]
    assert faults.keys() == {"unexpected_keys"} and len(faults["unexpected_keys"]) > 20
    assert all(name.startswith("model.layers.2.") for name in faults["unexpected_keys"])


def test_deepseek_without_shared_experts_has_them_without_columns(tmp_path):
    """transformers' class always has shared experts."""
    config = dataclasses.replace(shallow(), moe_shared_expert_intermediate_size=None)
    tensors = read(exported(tmp_path / "ours", config, "deepseek_v3"))
    assert tensors["model.layers.1.mlp.shared_experts.down_proj.weight"].shape == (config.hidden_size, 0)
    assert "model.layers.0.mlp.shared_experts.down_proj.weight" not in tensors
    from_hf(tmp_path / "ours_hf", tmp_path / "again")
    export(tmp_path / "again", tmp_path / "back")
    assert same(read(tmp_path / "back"), tensors)
    others = {name: a for name, a in tensors.items() if a.size}  # as DeepSeek's own code has them
    save_file(others, tmp_path / "ours_hf" / "model.safetensors")
    from_hf(tmp_path / "ours_hf", tmp_path / "without")
    export(tmp_path / "without", tmp_path / "exact")
    assert same(read(tmp_path / "exact"), others)
