"""FLOPs by convention, beside published numbers and by hand."""

import pytest

from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.cost.conventions import flops_per_token

# Published TFLOP/s per device over tokens/s per device, GFLOP per token: arXiv:2603.07685, table 11, and
# Megatron-Bridge's verification cards.
PUBLISHED = [
    ("deepseek_v3", 4096, 260.7),
    ("qwen3_235b_a22b", 4096, 148.0),
    ("nemotron3_nano_30b_a3b", 8192, 937.8 / 42.094),
    ("nemotron35_lightning_30b_a3b", 8192, 399.6 / 14.195),
    ("nemotron3_super_120b_a12b", 4096, 248.61 / 2.969345),
    ("qwen3_30b_a3b", 4096, 299 / 13.011),
]


@pytest.mark.parametrize(("name", "length", "published"), PUBLISHED)
def test_megatron2024_is_what_megatron_reports(name, length, published):
    model = load([f"gin_configs/models/{name}.gin"])[0].model
    assert flops_per_token("megatron2024", model, length) / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("name", "batch", "layers", "size"), [("gpt_175b", 64, 96, 12288), ("gpt_22b", 4, 48, 6144)])
def test_megatron2021_is_the_formula_of_its_paper(name, batch, layers, size):
    """72 B s l h² (1 + s/6h + V/12lh): arXiv:2205.05198, appendix A."""
    length, vocabulary = 2048, 51200
    formula = 1 + length / (6 * size) + vocabulary / (12 * layers * size)
    expected = 72 * batch * length * layers * size**2 * formula
    model = load([f"gin_configs/models/{name}.gin"])[0].model
    assert batch * length * flops_per_token("megatron2021", model, length) == pytest.approx(expected, rel=1e-3)


def test_the_conventions_differ_where_they_say():
    """One attention layer: all pairs of tokens, or half of them."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 5}
    model = ModelConfig(pattern="*", vocab_size=11, hidden_size=6, **heads)
    products, pairs, head = 2 * 6 * (20 + 20 + 10 + 10), 4 * 20 * 14, 2 * 6 * 11
    for convention, share in (("megatron2021", 1), ("megatron2024", 0.5), ("orogen", 0.5)):
        assert flops_per_token(convention, model, 14) == 3 * (products + share * pairs + head)
