"""Models to prune, their folders with planted weights, and the command that prunes them."""

import dataclasses

import numpy as np
from safetensors.numpy import save_file
from tests.helpers import bound

from orogen.checkpoint.leaves import dotted, leaves_of
from orogen.checkpoint.open import open_model
from orogen.cli import main
from orogen.config.model import ModelConfig
from orogen.config.text import model_text
from orogen.infer.score import score
from orogen.model.lm import build

# A repetition and layers after it; experts in a latent, biases, sinks and normalised heads. A pruned norm weighs
# the epsilon differently, so it is small here.
MODEL = ModelConfig(
    pattern="MM*E-/E", vocab_size=259, hidden_size=22, num_attention_heads=12, num_key_value_heads=3, head_dim=4,
    attention_bias="all", qk_norm=True, attention_sinks=True, rope_theta=1e4, intermediate_size=26, mlp_bias=True,
    moe_bias="shared", mamba_num_heads=18, mamba_head_dim=5, n_groups=2, mamba_norm_groups=3, ssm_state_size=7,
    chunk_size=8, mamba_proj_bias=True, n_routed_experts=8, n_group=2, topk_group=2, num_experts_per_tok=3,
    moe_intermediate_size=14, moe_shared_expert_intermediate_size=10, moe_latent_size=16, mtp_depths=1,
    layer_norm_epsilon=1e-9,
)  # fmt: skip
# Latent attention, Mamba-1 and gated experts without a latent.
OTHER = ModelConfig(
    pattern="+EmE", vocab_size=259, hidden_size=22, num_attention_heads=6, kv_lora_rank=9, q_lora_rank=8,
    qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5, rope_theta=1e4, mamba_intermediate_size=12, time_step_rank=3,
    ssm_state_size=4, mlp_gated=True, mlp_hidden_act="silu", mlp_bias=True, n_routed_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=14, moe_shared_expert_intermediate_size=10, moe_shared_expert_gate=True, norm="layer_1p",
    tie_word_embeddings=True, learned_positions=64, attention_bias="all",
)  # fmt: skip
DEPTH = ModelConfig(
    pattern="*-*-*-", vocab_size=259, hidden_size=10, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
    intermediate_size=12,
)  # fmt: skip
TOKENS_BT = np.random.default_rng(1).integers(32, 127, (2, 19))  # printable bytes, as in the text


def save(folder, config, plant=lambda name, array: array):
    """An Orogen checkpoint folder with random weights, which `plant` changes by the names of their parameters."""
    random, built = np.random.default_rng(0), build(config)
    arrays = {}
    for path, leaf in leaves_of(built.params, built.buffers).items():
        name, shape = dotted(path), leaf.get_value().shape
        # Every expert is chosen by some token of the text.
        array = random.normal(0, 0.01 if name.endswith("router.bias") else 0.5, shape).astype(np.float32)
        arrays[name] = np.ascontiguousarray(plant(name, array), np.float32)
    folder.mkdir()
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.gin").write_text(model_text(config))
    return folder


def text(folder):
    """A gin file that reads a corpus of 12 texts; both are written into `folder` if they are not there."""
    file, corpus = folder / "text.gin", folder / "corpus"
    if file.exists():
        return file
    corpus.mkdir()
    for number in range(12):
        words = np.random.default_rng(number).integers(32, 127, 40 + number).astype(np.uint8).tobytes()
        (corpus / f"{number}.txt").write_bytes(words)
    lines = [f"DataConfig.corpus = {str(corpus)!r}", "DataConfig.tokenizer = 'byte'"]
    lines += ["DataConfig.heldout_fraction = 0.0", "DataConfig.tuning_fraction = 0.0"]
    lines += [f"PruneConfig.{name} = {n}" for name, n in (("rows", 12), ("depth_rows", 3), ("batch_size", 4))]
    file.write_text("\n".join([*lines, "PruneConfig.sequence_length = 32", ""]))
    return file


def prune(source, target, *bindings, more=()):
    """The exit status of `orogen prune` with the text beside `source`."""
    fields = [binding if "." in binding else f"PruneConfig.{binding}" for binding in bindings]
    command = ["prune", "--checkpoint", source, "--gin_file", text(source.parent), "--out", target]
    return main([*map(str, command), *more, *bound(*fields)])


def logits(folder, tokens_bt=TOKENS_BT):
    return score(open_model(folder), tokens_bt)["logits"]


def of(pattern):
    """MODEL with other layers."""
    return dataclasses.replace(MODEL, pattern=pattern, mtp_depths=int("/" in pattern))
