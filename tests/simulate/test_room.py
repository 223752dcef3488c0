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


def subject_in(model, size: int, *, attention: str = "full", plan: PlanConfig | None = None) -> Subject:
    config = EvaluateConfig(tasks=("x",))
    memory = Memory(size, None)
    room = EvaluationRoom(model=model.config, memory=memory, plan=plan, attention=attention, config=config)
    return Subject(model, config, EngineConfig(slots=2, max_length=32, chunk=16, page=16), room=room)


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


def test_an_engine_grows_only_as_far_as_the_memory():
    subject = subject_in(opened("*"), 2**18)
    with pytest.raises(ConfigError, match="EvaluateConfig.max_length is 2048; expected less: inference"):
        subject.write([Prompt((5,) * 2000, 8)])
