"""A pruned model's logits, in transformers and here."""

import numpy as np
import pytest
from tests.compress.pruned import logits
from tests.convert.synthetic import shapes, write
from tests.convert.test_peer import without_clamp
from tests.helpers import bound

from orogen.cli import main

SIZES = {
    "hidden_size": 27, "num_attention_heads": 2, "mamba_num_heads": 4, "mamba_head_dim": 3, "n_routed_experts": 4,
    "moe_intermediate_size": 11, "moe_shared_expert_intermediate_size": 17, "moe_latent_size": 13,
}  # fmt: skip


@pytest.mark.peer
def test_transformers_computes_the_logits_of_a_pruned_model(tmp_path):
    import torch
    import transformers

    config, tensors = shapes("nemotron_h")
    write(tmp_path / "hf", config, tensors, "float32")
    (tmp_path / "prune.gin").write_text("PruneConfig.width_scores = 'random'\nPruneConfig.remove_layers = (1,)\n")
    sizes = bound(*(f"PruneConfig.{field} = {size}" for field, size in SIZES.items()))
    command = ["prune", "--checkpoint", tmp_path / "hf", "--gin_file", tmp_path / "prune.gin", "--out"]
    assert main([*map(str, command), str(tmp_path / "ours"), *sizes]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "ours"), str(tmp_path / "pruned")]) == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "pruned", dtype="float32", output_loading_info=True)
    assert not any(info.values()), info
    tokens_bt = np.random.default_rng(2).integers(3, 96, (2, 19))
    with torch.no_grad():
        expected = without_clamp(model)(torch.tensor(tokens_bt)).logits.numpy()
    np.testing.assert_allclose(logits(tmp_path / "ours", tokens_bt), expected, atol=1e-5 * np.ptp(expected))
