"""Log-probabilities of a prompt's own tokens are those of the training forward."""

import json
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tests.infer.engines import (
    answers,
    asked,
    changed,
    check_greedy,
    engine_of,
    leaked,
    logits_of,
    opened,
    random_prompt,
)

from orogen.checkpoint.open import Opened
from orogen.config.checks import ConfigError
from orogen.infer.batch import run_batch
from orogen.infer.lines import LineReader
from orogen.infer.request import ERROR, LENGTH, Chosen, Output, Request
from orogen.infer.score import score

LONGEST = 32


def scored(outputs: Sequence[Output]) -> tuple[Chosen, ...]:
    """What the first output tells of the prompt, and no other does."""
    first, *rest = outputs
    assert not any(output.prompt for output in rest)
    return first.prompt


def check_scores(model: Opened, requests: Sequence[Request], found: Any, logits_btv: np.ndarray) -> None:
    """Against logits of the prompts."""
    for request, outputs, logits_tv in zip(requests, found, logits_btv, strict=True):
        told, count = scored(outputs), request.prompt_logprobs
        here_tv = logits_tv[: len(request.prompt) - 1].astype(np.float64)
        log_tv = here_tv - np.log(np.exp(here_tv).sum(-1, keepdims=True))
        assert [one.id for one in told] == list(request.prompt[1:])
        for one, log_v in zip(told, log_tv, strict=True):
            np.testing.assert_allclose(one.logprob, log_v[one.id], atol=2e-5)
            likeliest = np.argsort(-log_v, kind="stable")[:count]
            assert [token for token, _ in one.top] == likeliest.tolist()
            np.testing.assert_allclose([value for _, value in one.top], log_v[likeliest], atol=2e-5)


@pytest.fixture(scope="module")
def hybrid():
    model = opened("M*E")
    return model, engine_of(model, own=True, slots=3)


def test_every_token_but_the_first_has_one_also_where_the_prompt_is_cached(hybrid):
    """Of prompts of one token and of several pieces, beside others that share their programs and their prefixes."""
    model, engine = hybrid
    prompts = [random_prompt(n, length) for n, length in enumerate((1, 7, 24, 25))]
    plain = [asked(prompt, 5) for prompt in prompts]
    check_greedy(model, plain, engine.run(plain), LONGEST)
    traces = dict(engine.programs.traces)
    assert sum(traces.values()) > 0 and "score" not in traces
    requests = [asked(prompt, n % 3, prompt_logprobs=n) for n, prompt in enumerate(prompts)]
    cached = engine.stats.cached_tokens
    found = engine.run([*requests, plain[3]])
    check_scores(model, requests, found[:4], logits_of(model, prompts, LONGEST))
    own = score(model, np.array([prompts[3]]))["logprobs"][0]
    np.testing.assert_allclose([one.logprob for one in scored(found[3])], own, atol=2e-5)
    assert engine.stats.cached_tokens - cached == 24, "that of the request without scores"
    for request, outputs in zip(requests, found, strict=False):
        assert outputs[-1].finish == LENGTH and sum(len(o.tokens) for o in outputs) == request.max_tokens
    assert found[4][0].prompt == () and engine.programs.traces["score"] == len(engine.buckets.rows(16))
    assert {name: count for name, count in engine.programs.traces.items() if name != "score"} == traces
    assert leaked(engine) == [0, 0]


def test_what_is_read_for_scores_is_cached_for_others(hybrid):
    _, engine = hybrid
    prompt = random_prompt(50, 25)
    engine.run([asked(prompt, 0, prompt_logprobs=1)])
    cached = engine.stats.cached_tokens
    answers(engine, asked(prompt, 2))
    assert engine.stats.cached_tokens - cached == 24


def test_scores_that_are_no_numbers_end_their_request_alone(hybrid):
    model, _ = hybrid
    engine = engine_of(changed(model, ("embedding", "weight"), lambda a: a.at[5].set(jnp.nan)), slots=3)
    sound = tuple(token for token in random_prompt(3, 9) if token != 5)
    bad, good = engine.run([asked((1, 2, 5, 3), 0, prompt_logprobs=0), asked(sound, 0, prompt_logprobs=1)])
    assert bad[0].finish == ERROR
    # The layers of a piece multiply NaNs of later tokens by zero.
    assert re.search("the log-probability of token [123] of the prompt is not a number", bad[0].error)
    check_scores(model, [asked(sound, 0, prompt_logprobs=1)], [good], logits_of(model, [sound], LONGEST))


def test_refusals(hybrid):
    model, _ = hybrid
    with pytest.raises(ConfigError, match="Request.max_tokens is 0; expected above 0, or 0 with prompt_logprobs"):
        asked((1,), 0)
    with pytest.raises(ConfigError, match="Request.prompt_logprobs is 21; expected None, or from 0 to 20"):
        asked((1,), 0, prompt_logprobs=21)
    with pytest.raises(ConfigError, match="Request.prompt_logprobs where EngineConfig.exact is True; expected None"):
        engine_of(model, exact=True).submit(asked((1, 2), 1, prompt_logprobs=1))


def test_a_line_of_a_batch_may_ask_for_them(hybrid, tmp_path):
    model, engine = hybrid
    (source := tmp_path / "in.jsonl").write_text('{"prompt": [1, 2, 3], "max_tokens": 0, "prompt_logprobs": 1}\n')
    run_batch(engine, source, out := tmp_path / "out.jsonl", reader=LineReader({}), settings="")
    facts = json.loads(out.read_text())
    assert (facts["tokens"], facts["finish"]) == ([], LENGTH)
    expected = score(model, np.array([[1, 2, 3]]))
    np.testing.assert_allclose(facts["prompt_logprobs"][1:], expected["logprobs"][0], atol=2e-5)
    likeliest = expected["logits"][0, :2].argmax(-1).tolist()
    assert facts["prompt_logprobs"][0] is facts["prompt_top"][0] is None
    assert [top[0][0] for top in facts["prompt_top"][1:]] == likeliest
