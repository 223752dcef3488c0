"""Scores of given tokens equal what an exact engine reported, to the bit, also after it took other weights."""

import jax
import numpy as np
import pytest
from tests.infer.engines import asked, chosen, engine_of, ids, opened, random_prompt

from orogen.infer.exact_scores import ExactScores
from orogen.infer.request import Sampling

PROMPTS = [random_prompt(n, n) for n in (5, 15, 1, 8)]


def answers(engine):
    return engine.run([asked(p, 9, Sampling(temperature=1.3, seed=n)) for n, p in enumerate(PROMPTS)])


def exactly(model):
    return engine_of(model, page=4, exact=True, slots=3, written_out=False)


def test_scores_are_what_was_reported_by_old_and_by_new_weights():
    model = opened("Mw*E", sliding_window=3)
    engine = exactly(model)
    scores = ExactScores(engine)

    def differences(found):
        texts = [(*prompt, *ids(outputs)) for prompt, outputs in zip(PROMPTS, found, strict=True)]
        scored = scores.of(texts, [len(prompt) for prompt in PROMPTS])
        reported = [np.float32([token.logprob for token in chosen(outputs)]) for outputs in found]
        assert [len(one) for one in scored] == [9] * 4
        return max(np.abs(one - other).max() for one, other in zip(scored, reported, strict=True))

    first = answers(engine)
    assert differences(first) == 0
    other = jax.tree.map(lambda x: 1.1 * x, model.params)
    engine.give(other, model.buffers)
    second = answers(engine)
    assert [chosen(a) for a in second] != [chosen(a) for a in first]
    assert differences(second) == 0 and differences(first) > 1e-3
    engine.give(model.params, model.buffers)
    assert [chosen(a) for a in answers(engine)] == [chosen(a) for a in first]  # nothing of other weights is cached


def test_an_engine_at_work_takes_no_weights():
    model = opened("*")
    engine = engine_of(model, written_out=False)
    engine.submit(asked(PROMPTS[0], 3))
    with pytest.raises(ValueError, match="expected it to be idle"):
        engine.give(model.params, model.buffers)
    with pytest.raises(ValueError, match="expected EngineConfig.exact"):
        ExactScores(engine)
