"""The meaning of a gin file that leaves fields of ModelConfig out."""

import dataclasses

from orogen.config.model import ModelConfig

# The values of Nemotron-H's config.json (nvidia/Nemotron-H-8B-Base-8K), and of Nemotron 3's for fields that it has;
# YaRN's are its paper's (arXiv:2309.00071), the weights of the losses DeepSeek-V3's (arXiv:2412.19437, 4.2).
MEANT = {
    "norm": "rms", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "attention_bias": "none",
    "qk_norm": False, "attention_sinks": False, "partial_rotary_factor": 1.0, "rope_interleave": False,
    "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_truncate": True,
    "mlp_hidden_act": "relu2", "mlp_gated": False, "mlp_bias": False,
    "chunk_size": 128, "conv_kernel": 4, "use_conv_bias": True, "mamba_proj_bias": False,
    "moe_shared_expert_gate": False, "moe_bias": "routed", "router_score": "sigmoid", "router_bias": False,
    "router_correction_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1,
    "topk_group": 1, "router_aux_loss_coef": 1e-4, "router_balance": "row", "router_z_loss_coef": 0.0,
    "mtp_depths": 0, "mtp_loss_scale": 0.3,
}  # fmt: skip


def test_defaults_never_change():
    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    assert {name: defaults[name] for name in MEANT} == MEANT
    absent = {name for name, value in defaults.items() if value is dataclasses.MISSING}
    assert absent == {"pattern", "vocab_size", "hidden_size"}
