"""The layer pattern: letters, pipeline segments, and the multi-token-prediction block after a slash."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.helpers import HYBRID

from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig, Pattern, parse_pattern

PATTERNS = {
    "M": Pattern("M", ("M",), "", 0),
    "MEM*E-": Pattern("MEM*E-", ("MEM*E-",), "", 0),
    "ME|M*|E": Pattern("MEM*E", ("ME", "M*", "E"), "", 0),
    "M||E": Pattern("ME", ("M", "", "E"), "", 0),  # a rank may hold the embedding alone
    "MEM*E/*E": Pattern("MEM*E", ("MEM*E",), "*E", 1),
    "MEM*E/*E/*E": Pattern("MEM*E", ("MEM*E",), "*E", 2),
    "M|E/-/-/-": Pattern("ME", ("M", "E"), "-", 3),
}


@pytest.mark.parametrize(("text", "parsed"), PATTERNS.items())
def test_pattern_is_read(text, parsed):
    assert parse_pattern(text) == parsed


@pytest.mark.parametrize("letter", ["Q", "W", "#", " ", "e", "\n"])
def test_unknown_letter_is_named_with_the_known_ones(letter):
    with pytest.raises(ConfigError) as caught:
        parse_pattern(f"M{letter}E")
    assert str(caught.value) == (
        f"ModelConfig.pattern is {f'M{letter}E'!r}: unknown letter {letter!r}; expected "
        "M (Mamba-2), m (Mamba-1), * (attention), w (sliding-window attention), + (multi-head latent attention), "
        "- (dense MLP), E (mixture of experts), x (gated cross-attention), g (tanh-gated MLP), | or /"
    )


@pytest.mark.parametrize("text", ["", "|", "/", "/*E", "|/M"])
def test_pattern_without_a_layer_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_pattern(text)
    assert str(caught.value) == f"ModelConfig.pattern is {text!r}; expected at least one layer before any /"


@pytest.mark.parametrize("text", ["M/", "M/*E/", "M//*E", "M/*E/E*", "M/*/**", "M/*|E", "M/*|E/*|E"])
def test_parts_after_the_slash_must_be_equal_and_not_empty(text):
    with pytest.raises(ConfigError) as caught:
        parse_pattern(text)
    expected = "expected the parts after / to be equal, not empty, without |"
    assert str(caught.value) == f"ModelConfig.pattern is {text!r}; {expected}"


letters = st.text("M*-E", min_size=1, max_size=6)


@given(st.lists(letters, min_size=1, max_size=4), letters, st.integers(0, 4))
def test_parsing_inverts_joining(segments, mtp, parts):
    parsed = parse_pattern("/".join(["|".join(segments), *[mtp] * parts]))
    assert parsed == Pattern("".join(segments), tuple(segments), mtp if parts else "", parts)


def depths(pattern: str, mtp_depths: int) -> int:
    return ModelConfig(**{**HYBRID, "pattern": pattern, "mtp_depths": mtp_depths}).mtp_depths


@pytest.mark.parametrize(
    ("pattern", "given_depths", "expected"),
    [("ME", 0, 0), ("ME/*E", 0, 1), ("ME/*E", 1, 1), ("ME/*E", 3, 3), ("ME/*E/*E", 0, 2), ("ME/*E/*E", 2, 2)],
)
def test_depths_follow_from_the_pattern(pattern, given_depths, expected):
    assert depths(pattern, given_depths) == expected


@pytest.mark.parametrize(
    ("pattern", "given_depths", "message"),
    [
        ("ME", 1, "0: the pattern has no part after /"),
        ("ME", -1, "0: the pattern has no part after /"),
        ("ME/*E", -1, "0 or more"),
        ("ME/*E/*E", 1, "2, the number of parts after / in the pattern"),
        ("ME/*E/*E", 3, "2, the number of parts after / in the pattern"),
    ],
)
def test_depths_that_contradict_the_pattern_are_refused(pattern, given_depths, message):
    with pytest.raises(ConfigError) as caught:
        depths(pattern, given_depths)
    assert str(caught.value) == f"ModelConfig.mtp_depths is {given_depths}; expected {message}"


def test_initial_deviations_by_hand():
    config = ModelConfig(pattern="*|*/*", vocab_size=7, hidden_size=20, **dict.fromkeys(ATTENTION, 1))
    assert config.init_std == pytest.approx(0.2)  # sqrt(0.8 / 20)
    assert config.output_init_std == pytest.approx(0.2 / 2**0.5)  # the layer after / does not count


ATTENTION = ("num_attention_heads", "num_key_value_heads", "head_dim")


def test_expert_width_is_the_latent_if_there_is_one():
    assert ModelConfig(**{**HYBRID, "moe_latent_size": 24}).expert_width == 24
    assert ModelConfig(**{**HYBRID, "moe_latent_size": None}).expert_width == 48


@pytest.mark.parametrize("text", ["M*" * 5000, "M|" * 5000 + "M", "M" + "/*" * 5000, "M/" + "*E" * 5000])
def test_a_pattern_that_is_too_long_is_refused_in_a_short_line(text):
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    mamba = {"mamba_num_heads": 2, "mamba_head_dim": 4, "n_groups": 1, "ssm_state_size": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
    with pytest.raises(ConfigError, match=r"expected at most 1,024") as caught:
        ModelConfig(pattern=text, **sizes, **mamba, **experts)
    assert len(str(caught.value)) < 200
