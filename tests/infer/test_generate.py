"""Generation by a tiny random model: what the seed decides, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.data.vocabulary import make_tokenizer
from orogen.infer import generate as module
from orogen.infer.generate import engine_for, generate
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
    assert first[1] == other[0], "row 1 has the seed after row 0's"
    assert len(set(first[0])) > 4, "tokens are drawn apart"


def test_more_prompts_than_slots_are_all_continued(opened, monkeypatch):
    monkeypatch.setattr(module, "MOST_SLOTS", 2)
    prompts = ["a", "bc", "a", "d", ""]
    texts = generate(opened, prompts, tokens=3, temperature=0)
    assert len(texts) == 5 and texts[0] == texts[2]


def test_texts_of_like_length_share_an_engine_and_none_is_cached():
    assert engine_for(rows=3, length=1) == engine_for(rows=3, length=256)
    assert engine_for(rows=100, length=257) == dataclasses.replace(engine_for(rows=64, length=512), queue=100)
    assert not engine_for(rows=1, length=1).prefix_cache


def test_logits_that_are_no_numbers_are_an_error(opened):
    broken = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), opened.params)
    with pytest.raises(FloatingPointError, match="continuation of 'ab' failed: the logits of token 0 are not numbers"):
        generate(opened._replace(params=broken), ["ab"], tokens=2)


def test_a_model_without_a_tokenizer_is_refused(opened):
    with pytest.raises(ConfigError, match="no tokenizer.json; expected one, to read the prompt with"):
        generate(opened._replace(tokenizer=None), ["a"], tokens=2)
