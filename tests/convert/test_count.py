"""Counts of every model of `gin_configs/models` against published ones, and against formulas worked out by hand."""

import functools
from pathlib import Path

import pytest

from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.convert.count import count_exported

MODELS = Path(__file__).resolve().parents[2] / "gin_configs" / "models"

# Total (with the MTP block if the released checkpoint has one), active, active without the input embedding.
# Sources: model cards and papers, and the formulas below where these round.
COUNTS = {
    "nemotron_h_4b": (4_489_223_040, 4_489_223_040, None),
    "nemotron_h_8b": (8_100_852_736, 8_100_852_736, None),
    "nemotron_h_47b": (46_791_554_816, 46_791_554_816, None),
    "nemotron_h_56b": (56_324_350_464, 56_324_350_464, None),
    "nemotron_nano_12b_v2": (12_310_001_152, 12_310_001_152, None),
    "nemotron_nano_9b_v2": (8_888_227_328, 8_888_227_328, None),
    "nemotron3_nano_4b": (3_973_556_832, 3_973_556_832, None),
    "nemotron3_nano_30b_a3b": (31_577_940_288, 3_580_076_352, 3_227_754_816),
    "nemotron35_lightning_30b_a3b": (32_913_266_240, 3_580_076_352, 3_227_754_816),
    "nemotron3_super_120b_a12b": (123_611_033_088, 12_770_237_440, 12_233_366_528),
    "nemotron3_ultra_550b_a55b": (560_524_603_904, 56_058_843_136, 54_985_101_312),
    "mamba1_8b": (8_148_783_104, 8_148_783_104, None),
    "mamba2_8b": (8_236_999_680, 8_236_999_680, None),
    "mamba2_hybrid_8b": (8_654_517_248, 8_654_517_248, None),
    "transformer_8b": (8_540_135_424, 8_540_135_424, None),
    "nemotron4_15b": (15_628_775_424, 15_628_775_424, None),
    "nemotron4_15b_e8t2": (83_276_083_200, 25_294_024_704, None),
    "mixtral_8x22b": (140_630_071_296, 39_161_468_928, None),
    "qwen2_57b_a14b": (57_408_658_944, 14_249_270_784, None),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704, None),
    "qwen3_235b_a22b": (235_093_634_560, 22_190_763_520, None),
    "deepseek_v3": (684_489_845_504, 37_552_297_472, 36_625_618_432),
    "gpt_oss_20b": (20_914_757_184, None, 3_608_307_264),
    "gpt_oss_120b": (116_829_156_672, None, 5_132_849_472),
    "gpt_22b": (22_074_273_792, 22_074_273_792, None),
    "gpt_175b": (174_615_846_912, 174_615_846_912, None),
    "gpt_530b": (529_600_819_200, 529_600_819_200, None),
    "gpt_1t": (1_008_038_758_400, 1_008_038_758_400, None),
    "gpt_1_7b": (1_652_230_656, 1_652_230_656, None),
    "gpt_18b": (18_449_756_160, 18_449_756_160, None),
    "gpt_146b": (145_622_261_760, 145_622_261_760, None),
    "llama3_70b": (70_553_706_496, None, None),
    "llama31_405b": (405_853_388_800, None, None),
    "qwen3_8b": (8_190_735_360, None, None),
    "moonlight_16b_a3b": (15_960_110_208, None, None),
}
MTP = {
    "nemotron35_lightning_30b_a3b": 1_335_325_952,
    "nemotron3_super_120b_a12b": 2_942_325_248,
    "nemotron3_ultra_550b_a55b": 11_215_610_368,
    "deepseek_v3": 13_463_426_304,  # with its own copies of embedding and head
}
TENSORS = {
    "nemotron3_nano_4b": 263,
    "nemotron3_nano_30b_a3b": 6_243,
    "nemotron35_lightning_30b_a3b": 6_513,
    "nemotron3_super_120b_a12b": 42_683,
    "nemotron3_ultra_550b_a55b": 51_023,
    "gpt_oss_20b": 411,
    "gpt_oss_120b": 615,
}
BYTES = {"nemotron3_super_120b_a12b": 247_222_108_160, "gpt_oss_120b": 233_658_313_344}
WITHOUT_A_FAMILY = {"nemotron4_15b_e8t2"}


def model(name: str) -> ModelConfig:
    config, _ = load([MODELS / f"{name}.gin"])
    return config.need("model").model


@functools.cache
def counted(name: str) -> dict:
    """Of the model of this name."""
    return count_exported(model(name))


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_published_ones(name):
    found = counted(name)
    total, active, without_embedding = COUNTS[name]
    assert found["total"] == total
    assert active is None or found["active"] == active
    assert without_embedding is None or found["active_without_embedding"] == without_embedding
    assert found["mtp"] == MTP.get(name, 0)
    assert (found["tensors"] is None) == (found["bytes"] is None) == (name in WITHOUT_A_FAMILY)
    assert name not in TENSORS or found["tensors"] == TENSORS[name]
    assert name not in BYTES or found["bytes"] == BYTES[name]


def test_every_published_model_is_counted():
    ours = {"bench_dense", "bench_moe", "hybrid_1b", "nemotron3_toy", "r1"}
    assert {file.stem for file in MODELS.glob("*.gin")} - ours == COUNTS.keys()


def nemotron_layer(letter: str, c: ModelConfig) -> int:
    d, states = c.hidden_size, c.n_groups * c.ssm_state_size
    if letter == "M":
        inner = c.mamba_num_heads * c.mamba_head_dim
        convolved = inner + 2 * states
        projections = d * (2 * inner + 2 * states + c.mamba_num_heads) + inner * d
        return d + projections + convolved * (c.conv_kernel + 1) + 3 * c.mamba_num_heads + inner
    if letter == "*":
        return d + 2 * d * c.num_attention_heads * c.head_dim + 2 * d * c.num_key_value_heads * c.head_dim
    if letter == "-":
        return d + 2 * d * c.intermediate_size
    width = c.moe_latent_size or d
    experts = c.n_routed_experts * (d + 1 + 2 * width * c.moe_intermediate_size)
    return d + experts + 2 * d * c.moe_shared_expert_intermediate_size + 2 * d * (c.moe_latent_size or 0)


@pytest.mark.parametrize("name", [name for name in COUNTS if "nemotron" in name and "nemotron4" not in name])
def test_counts_follow_the_formula_of_a_nemotron(name):
    c = model(name)
    layers = sum(nemotron_layer(letter, c) for letter in c.layers.main)
    mtp = sum(nemotron_layer(letter, c) for letter in c.layers.mtp)
    mtp += 2 * c.hidden_size**2 + 3 * c.hidden_size if c.layers.mtp else 0
    outer = 2 * c.vocab_size * c.hidden_size + c.hidden_size
    assert counted(name)["total"] == outer + layers + mtp


@pytest.mark.parametrize("name", [name for name in COUNTS if name.startswith("gpt_") and "oss" not in name])
def test_counts_follow_the_formula_of_a_gpt(name):
    c = model(name)
    h, depth = c.hidden_size, len(c.layers.main) // 2
    expected = 12 * depth * h * h + 13 * depth * h + 2 * h + (c.vocab_size + c.learned_positions) * h
    assert counted(name)["total"] == expected
