"""EngineConfig.exact: tokens and log-probabilities are the same to the bit however they come about."""

import numpy as np
import pytest
from tests.infer.engines import asked, chosen, engine_of, ids, logits_of, opened, random_prompt

from orogen.infer.request import Sampling

PROMPTS = [random_prompt(n, n) for n in (5, 22, 8)]
TOKENS = 9
# With pages that are shorter than pieces: what is cached of attention alone could end inside a piece.
MODELS = {"Mmw*E": {"sliding_window": 3}, "*": {}}


@pytest.fixture(scope="module", params=MODELS)
def served(request):
    """A model, an engine and its answers to the prompts, together."""
    model = opened(request.param, **MODELS[request.param])
    engine = exactly(model)
    return model, engine, engine.run([asked(prompt, TOKENS) for prompt in PROMPTS])


def exactly(model, **changes):
    return engine_of(model, page=4, exact=True, slots=3, **changes)


def numbers(outputs):
    return [(token.id, token.logprob) for token in chosen(outputs)]


def test_token_by_token_with_cached_beginnings(served):
    """Every text so far is a prompt, of which most is cached, wherever it ends."""
    _, engine, found = served
    for prompt, outputs in zip(PROMPTS, found, strict=True):
        before = engine.stats.cached_tokens
        for place, expected in enumerate(numbers(outputs)):
            text = (*prompt, *ids(outputs)[:place])
            assert numbers(engine.run([asked(text, 1)])[0]) == [expected], place
        assert engine.stats.cached_tokens > before or len(prompt) + TOKENS < 16


def test_alone_in_other_slots_and_in_pieces_of_other_lengths(served):
    """Without cached beginnings; beside requests that draw with penalties, which are other programs."""
    model, _, found = served
    engine = exactly(model, prefix_cache=False, prefill_tokens=24, steps=2)
    for prompt, outputs in zip(PROMPTS, found, strict=True):
        assert numbers(engine.run([asked(prompt, TOKENS)])[0]) == numbers(outputs)
    rude = Sampling(temperature=2.0, seed=3, presence_penalty=1.0)
    others = [asked(random_prompt(40 + n, n), 4, rude) for n in (3, 17)]
    again = engine.run([others[0], asked(PROMPTS[1], TOKENS), others[1], asked(PROMPTS[0], TOKENS)])
    assert [numbers(again[1]), numbers(again[3])] == [numbers(found[1]), numbers(found[0])]
    assert engine.stats.cached_tokens == 0


def test_log_probabilities_are_those_of_the_training_forward(served):
    """Within 1e-4 of the logits' range."""
    model, _, found = served
    texts = [(*prompt, *ids(outputs)) for prompt, outputs in zip(PROMPTS, found, strict=True)]
    for prompt, outputs, logits_tv in zip(PROMPTS, found, logits_of(model, texts, 32), strict=True):
        here_tv = logits_tv[len(prompt) - 1 :][:TOKENS].astype(np.float64)
        assert here_tv.argmax(-1).tolist() == ids(outputs)
        expected = here_tv.max(-1) - np.log(np.exp(here_tv).sum(-1))
        error = np.abs([token.logprob for token in chosen(outputs)] - expected).max()
        assert error < 1e-4 * (here_tv.max() - here_tv.min())
