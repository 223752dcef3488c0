"""The memory of an evaluation: what exceeds it is refused before anything is computed."""

import numpy as np
import pytest
from tests.infer.engines import opened

from orogen.config.checks import ConfigError
from orogen.config.engine import EngineConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.config.plan import PlanConfig
from orogen.evaluate.likelihood import Row
from orogen.evaluate.subject import Prompt, Subject
from orogen.simulate.fit import Memory, count
from orogen.simulate.room import EvaluationRoom


def subject_in(
    model, size: int, *, attention: str = "full", plan: PlanConfig | None = None, dtype: str = "float32"
) -> Subject:
    config = EvaluateConfig(tasks=("x",))
    facts = {"memory": Memory(size, None), "plan": plan, "attention": attention, "dtype": dtype}
    room = EvaluationRoom(model=model.config, config=config, **facts)
    settings = EngineConfig(slots=2, max_length=32, chunk=16, page=16, compute_dtype=dtype)
    return Subject(model, config, settings, room=room)


def row(length: int) -> Row:
    return Row(np.zeros(length, np.int32), np.arange(length) > 0)


def test_the_longest_text_is_refused_before_the_first_batch():
    """A row as lm-eval makes them of a checkpoint that states 262,144 positions."""
    model = opened("M*-")
    subject, computed = subject_in(model, 2**30), []
    subject.progress = lambda: computed.append(1)
    scores = 4 * model.config.num_attention_heads * 2**36
    with pytest.raises(ConfigError, match="EvaluateConfig.max_length is 262145; expected less: evaluation") as refusal:
        subject.score([row(8), row(262145), row(40)])
    assert f"{scores:,} of them for scores of attention" in str(refusal.value)
    assert not computed and not subject.scorer.programs
    assert [score.asked for score in subject.score([row(8), row(40)])] == [7, 39] and computed


def test_the_text_is_named_where_the_parameters_take_more():
    model = opened("-")
    held = 4 * count(model.config)
    with pytest.raises(ConfigError, match="EvaluateConfig.max_length is 33; expected less.*for hidden states"):
        subject_in(model, held + 4 * 32 * model.config.hidden_size - 1, attention="blocked").score([row(33)])
    subject_in(model, held + 4 * 32 * model.config.hidden_size, attention="blocked").score([row(33)])


def test_every_batch_is_compared_with_the_memory():
    """A few long rows fit, the many shorter ones that are scored together do not."""
    model = opened("*")
    short = subject_in(model, 2**40).scorer.shapes([row(33)] * 256)
    assert short == {(256, 32)}
    alone = 4 * (count(model.config) + 64 * model.config.hidden_size + model.config.num_attention_heads * 64**2)
    subject_in(model, alone).score([row(65)])
    with pytest.raises(ConfigError, match="EvaluateConfig.batch_tokens is 8192; expected less"):
        subject_in(model, alone).score([row(65), *[row(33)] * 256])


def test_parameters_and_hidden_states_in_bfloat16_take_half_of_float32():
    model = opened("-")
    held = 2 * count(model.config) + 2 * 32 * model.config.hidden_size
    subject_in(model, held, dtype="bfloat16").score([row(33)])
    with pytest.raises(ConfigError, match="EvaluateConfig.max_length is 33"):
        subject_in(model, held - 1, dtype="bfloat16").score([row(33)])


@pytest.mark.parametrize("attention", ["full", "blocked"])
def test_what_is_carried_is_compared_with_the_memory(attention):
    """Two texts in pieces of 512 tokens, the longer one in three: caches of four pieces for both, each with keys and
    values of as many heads, and the scores of one piece."""
    model = opened("*")
    shape = model.config
    caches = 2 * 2048 * shape.num_key_value_heads * shape.head_dim * 2 * 4
    scores = 2 * shape.num_attention_heads * 512 * 2048 * 4 * (attention == "full")
    beside = 4 * count(shape) + scores
    with pytest.raises(ConfigError, match="the length of the longest text is 1100; expected less: evaluation"):
        subject_in(model, beside + caches - 1, attention=attention).carry([row(1100), row(30)])
    scored = subject_in(model, beside + caches + 2 * 2048 * 8, attention=attention).carry([row(1100), row(30)])
    assert [score.asked for score in scored] == [1099, 29]


def test_an_engine_grows_only_as_far_as_the_memory():
    subject = subject_in(opened("*"), 2**18)
    with pytest.raises(ConfigError, match="EvaluateConfig.max_length is 2048; expected less: inference"):
        subject.write([Prompt((5,) * 2000, 8)])
