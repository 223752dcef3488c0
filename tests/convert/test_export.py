"""What a fresh export says: every option of every family as transformers reads it, or a refusal by name."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tests.convert.synthetic import read, stored

from orogen.config.checks import ConfigError
from orogen.config.load import model_text
from orogen.config.model import ModelConfig
from orogen.convert.checkpoint import export, load_checkpoint
from orogen.convert.config import read_config, write_config
from orogen.convert.huggingface import dotted, from_hf
from orogen.convert.names import leaf_shapes, table
from orogen.layers.documents import documents

BASES = (
    "nemotron_h", "mamba2", "mamba", "deepseek_v3", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "nemotron", "gpt2",
)  # fmt: skip
YARN = {"yarn_factor": 4.0, "yarn_original_positions": 16}
# Other values of every field that a checkpoint may differ in without other sizes.
OPTIONS: dict[str, dict] = {
    "as it is": {},
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
}


def model(base: str, option: str) -> ModelConfig | None:
    """A family's case with an option; None where that is no model, or the same as without."""
    config = dataclasses.replace(read_config(stored()[base]["config"])[1], mtp_depths=0)
    changes = dict(OPTIONS[option])
    for field, value in changes.items():
        if value == "other":
            changes[field] = not getattr(config, field)
        if value == "windows":
            changes[field] = config.pattern.replace("*", "w", 1)
    try:
        found = dataclasses.replace(config, **changes)
    except ConfigError:
        return None
    return None if option != "as it is" and found == config else found


def fresh(base: str, option: str) -> dict | str:
    """The config.json of a new export, or the refusal."""
    found = model(base, option)
    if found is None:
        return "no model"
    try:
        return write_config(base, found)
    except ConfigError as error:
        return str(error)


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
    """Of each position, computed by Orogen."""
    loaded = load_checkpoint(folder)
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
def test_what_a_family_s_class_lacks_is_refused(base, fields, message):
    assert refused(base, **fields).startswith(message)


def test_an_option_that_is_off_does_not_come_back_as_the_class_s_default():
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
    """transformers' class ties nothing: without the tensor it draws a head at random."""
    config = tied_nemotron_h(tmp_path)
    export(tmp_path / "ours", tmp_path / "hf")
    tensors = read(tmp_path / "hf")
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["backbone.embeddings.weight"])
    from_hf(tmp_path / "hf", tmp_path / "again")
    assert load_checkpoint(tmp_path / "again").config == config
    save_file({n: a for n, a in tensors.items() if n != "lm_head.weight"}, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "without")  # as Orogen once wrote it
    export(tmp_path / "without", tmp_path / "with")
    assert "lm_head.weight" in read(tmp_path / "with")


def test_a_nemotron_h_that_says_tied_and_has_two_tensors_has_a_head_of_its_own(tmp_path):
    tied_nemotron_h(tmp_path)
    export(tmp_path / "ours", tmp_path / "hf")
    tensors = read(tmp_path / "hf")
    tensors["lm_head.weight"] = 2 * tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    from_hf(tmp_path / "hf", tmp_path / "again")
    assert not load_checkpoint(tmp_path / "again").config.tie_word_embeddings
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
    if base == "gpt2":  # as many as it has position vectors
        assert written["n_positions"] == config.learned_positions and "max_position_embeddings" not in written
        return
    assert written["max_position_embeddings"] == 777
    kept = {**written, "bos_token_id": 17}
    assert write_config(base, config, kept, context=1000) == kept | {"max_position_embeddings": 1000}
    assert write_config(base, config, kept, context=100) == write_config(base, config, kept) == kept
    assert read_config(written)[1] == read_config(kept)[1]


def test_a_longer_context_does_not_move_yarn_s_original_one():
    """Without one of its own, YaRN's is max_position_embeddings."""
    rope = {"rope_type": "yarn", "factor": 4.0}
    kept = stored()["mixtral"]["config"] | {"max_position_embeddings": 64, "rope_parameters": rope}
    config = read_config(kept)[1]
    written = write_config("mixtral", config, kept, context=512)
    assert written["max_position_embeddings"] == 512 and read_config(written)[1] == config
    assert config.yarn_original_positions == 64


# Of the other families test_peer exchanges models written by transformers; every option of each is minutes of work.
@pytest.mark.peer
@pytest.mark.parametrize("base", ["nemotron_h"])
def test_transformers_reads_every_option_as_we_compute_it(base, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokens, seen, wrong = np.random.default_rng(2).integers(3, 96, (2, 37)), [], {}
    for number, option in enumerate(OPTIONS):
        if isinstance(fresh(base, option), str):
            continue
        seen.append(option)
        ours, theirs = tmp_path / f"{number}", tmp_path / f"{number}_hf"
        write_ours(ours, model(base, option), base)
        export(ours, theirs)
        family = json.loads((theirs / "config.json").read_text())["model_type"]
        load = transformers.AutoModelForCausalLM.from_pretrained
        peer, info = load(theirs, dtype=torch.float32, output_loading_info=True)
        peer.set_experts_implementation("eager")
        with torch.no_grad():
            expected = peer.eval()(torch.tensor(tokens)).logits.numpy()
        off = float(np.abs(logits(ours, tokens) - expected).max() / np.ptp(expected))
        if any(info.values()) or off > 1e-5:
            wrong[option] = family, off, {k: sorted(map(str, v))[:3] for k, v in info.items() if v}
    assert not wrong, (wrong, seen)
    assert {"as it is", "tied or not"} <= set(seen)
