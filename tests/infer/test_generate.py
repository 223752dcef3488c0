"""Generation by a tiny random model: what the seed decides."""

import chex
import jax
import pytest

import orogen.infer.generate as generate_module
from orogen.checkpoint.open import Opened
from orogen.config.data import DataConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.data.vocabulary import make_tokenizer
from orogen.infer.generate import generate
from orogen.model.lm import build, initial_state
from orogen.parallel.plan import single_device_plan


@pytest.fixture(scope="module")
def opened() -> Opened:
    model = ModelConfig(pattern="-", vocab_size=259, hidden_size=8, intermediate_size=12)
    params, buffers = jax.jit(lambda: initial_state(model, 0))()
    tokenizer = make_tokenizer(DataConfig(corpus="text", tokenizer="byte"), [])
    return Opened(model, single_device_plan(PlanConfig(), model), build(model), params, buffers, tokenizer)


def test_the_seed_decides_every_token(opened):
    first, other, again = (generate(opened, ["a", "a"], tokens=24, seed=seed) for seed in (4, 5, 4))
    assert first == again
    assert first[0] != other[0]
    assert first[0] != first[1], "rows with one prompt are drawn apart"
    assert len(set(first[0])) > 4, "tokens are drawn apart"


def test_prompts_of_one_bucket_and_all_seeds_share_a_program(opened, monkeypatch):
    """A trace samples once, in the body of the loop over tokens."""
    chex.clear_trace_counter()
    monkeypatch.setattr("orogen.infer.generate.choose", chex.assert_max_traces(generate_module.choose, n=1))
    for prompts, seed in ((["ab", "c"], 0), (["d", "efgh"], 1), (["", "i"], 2)):
        generate(opened, prompts, tokens=7, seed=seed)  # 7: another test's number would find its program
    with pytest.raises(AssertionError, match="traced > 1 times"):
        generate(opened, ["ab", "c"], tokens=8)
