"""The engine: the tokens of each request are those of the model alone, whatever runs beside it."""

import jax.numpy as jnp
import numpy as np
import pytest
from tests.infer.engines import (
    LATENT,
    answers,
    asked,
    changed,
    check_greedy,
    chosen,
    engine_of,
    ids,
    leaked,
    opened,
    random_prompt,
)

from orogen.config.checks import ConfigError
from orogen.infer.request import CANCELLED, ERROR, LENGTH, STOP, Budget, Full, Grammar, Sampling

LENGTH_OF_TEXTS = 32


@pytest.fixture(scope="module")
def hybrid():
    """A model of every kind of cache, and an engine whose pieces are cut at every 8 tokens."""
    model = opened("M*E")
    return model, engine_of(model)


MODELS = {
    "Mamba-1 and a window": ("mw", {"sliding_window": 3}),
    "latent attention": ("+-", LATENT),
    "sinks": ("*w", {"sliding_window": 5, "attention_sinks": True, "rope_theta": 50.0, "head_dim": 6}),
}


def test_greedy_tokens_of_a_hybrid_are_those_of_the_training_forward(hybrid):
    """Prompts of one token, a whole piece and one less or more, three pieces; more of them than slots."""
    model, engine = hybrid
    requests = [asked(random_prompt(n, n), 8) for n in (1, 7, 8, 9, 24)]
    found = engine.run(requests)
    check_greedy(model, requests, found, LENGTH_OF_TEXTS)
    assert [outputs[-1].finish for outputs in found] == [LENGTH] * len(requests)
    assert leaked(engine) == [0, 0]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_the_training_forward(name):
    pattern, changes = MODELS[name]
    model = opened(pattern, **changes)
    engine = engine_of(model, page=16, chunk=16)
    requests = [asked(random_prompt(n, n), 7) for n in (1, 17, 25)]
    check_greedy(model, requests, engine.run(requests), LENGTH_OF_TEXTS)


def test_tokens_do_not_depend_on_neighbours(hybrid):
    """Drawn with a seed: alone, and beside requests with penalties and biases, which other programs run."""
    engine = engine_of(hybrid[0], page=32, chunk=32, prefill_tokens=32)
    ours = asked(random_prompt(1, 9), 9, Sampling(temperature=1.3, seed=7))
    (alone,) = engine.run([ours])
    rude = Sampling(temperature=2.0, seed=8, presence_penalty=1.5, logit_bias=((3, 100.0),), top_k=3)
    others = [asked(random_prompt(2 + n, 3 * n), 5, rude) for n in (1, 2, 3)]
    together = engine.run([others[0], ours, *others[1:]])
    assert ids(together[1]) == ids(alone)
    expected = [token.logprob for token in chosen(alone)]
    np.testing.assert_allclose([token.logprob for token in chosen(together[1])], expected, atol=1e-5)
    assert ids(together[2]).count(3) == 5, "a bias of 100"


def test_prefix_hits_change_no_answer(hybrid):
    """A prompt again, with other tails, and what was generated for it; other salts share nothing."""
    model, _ = hybrid
    engine = engine_of(model)
    prompt = random_prompt(5, 24)
    # The third parts where no snapshot is, and leaves one there.
    tails = (prompt[9:], prompt[9:], (1, 2), (3, 4, 5))
    requests = [asked((*prompt[:9], *end), 8) for end in tails]
    found = [engine.run([request])[0] for request in requests]
    check_greedy(model, requests, found, LENGTH_OF_TEXTS)
    assert engine.stats.cached_tokens == 16 + 0 + 8
    before = engine.stats.cached_tokens
    engine.submit(requests[0], salt="another")
    outputs = []
    while engine.busy:
        outputs += engine.step()
    assert engine.stats.cached_tokens == before and ids(outputs) == ids(found[0])
    assert leaked(engine) == [0, 0]


@pytest.mark.parametrize("phase", ["waits", "reads", "decodes"])
def test_a_cancelled_request_ends_alone(hybrid, phase):
    """And gives back all that it held."""
    model, engine = hybrid
    kept, long = asked(random_prompt(11, 4), 9), asked(random_prompt(ord(phase[0]), 24), 8)
    numbers = [engine.submit(kept)]
    numbers += [engine.submit(long), engine.submit(kept)]
    outputs = [] if phase == "waits" else engine.step()
    if phase == "decodes":
        while not any(output.number == numbers[1] for output in outputs):
            outputs += engine.step()
    victim = numbers[2] if phase == "waits" else numbers[1]
    engine.cancel(victim)
    engine.cancel(victim)
    while engine.busy:
        outputs += engine.step()
    mine = [output for output in outputs if output.number == victim]
    assert [output.finish for output in mine].count(CANCELLED) == 1 and mine[-1].finish == CANCELLED
    assert (len(ids(mine)) > 0) == (phase == "decodes")
    rest = [[output for output in outputs if output.number == number] for number in numbers if number != victim]
    requests = [request for number, request in zip(numbers, (kept, long, kept), strict=True) if number != victim]
    check_greedy(model, requests, rest, LENGTH_OF_TEXTS)
    assert leaked(engine) == [0, 0]


def test_logits_that_are_no_numbers_end_their_request_alone(hybrid):
    """Also those that later have its slot and its pages."""
    sound, _ = hybrid
    model = changed(sound, ("embedding", "weight"), lambda a: a.at[5].set(jnp.nan))
    engine = engine_of(model, max_length=16, pages=4)
    good = [tuple(t for t in random_prompt(20 + n, 10) if t != 5) for n in range(5)]
    bad = [(*good[0][:3], 5), (5, *good[1]), (*good[0], 5, 5)]
    requests = [asked(prompt, 4) for prompt in (good[0], bad[0], good[1], bad[1], bad[2], *good[2:])]
    found = engine.run(requests)
    failed = [outputs for request, outputs in zip(requests, found, strict=True) if 5 in request.prompt]
    for outputs in failed:
        assert outputs[-1].finish == ERROR and ids(outputs) == []
        assert outputs[-1].error == "the logits of token 0 are not numbers, or allow no token"
    fine = [(request, outputs) for request, outputs in zip(requests, found, strict=True) if 5 not in request.prompt]
    check_greedy(sound, *zip(*fine, strict=True), LENGTH_OF_TEXTS)
    assert leaked(engine) == [0, 0]


def test_a_token_that_makes_logits_no_numbers_ends_an_answer_behind_it(hybrid):
    sound, _ = hybrid
    (expected,) = answers(engine_of(sound), asked((1, 2, 3), 9))
    first = next(n for n, token in enumerate(expected) if token not in (1, 2, 3))
    model = changed(sound, ("embedding", "weight"), lambda a: a.at[expected[first]].set(jnp.nan))
    (outputs,) = engine_of(model).run([asked((1, 2, 3), 9)])
    assert ids(outputs) == expected[: first + 1]
    assert outputs[-1].error == f"the logits of token {first + 1} are not numbers, or allow no token"


def test_what_may_stop_a_text(hybrid):
    _, engine = hybrid
    prompt = random_prompt(31, 6)
    (whole,) = answers(engine, asked(prompt, 9))
    place = next(n for n in range(1, 9) if whole[n] not in whole[:n])
    stopped, short = engine.run([asked(prompt, 9, stop_ids=(whole[place], 0)), asked(prompt, 1)])
    assert ids(stopped) == whole[: place + 1] and stopped[-1].finish == STOP
    assert ids(short) == whole[:1] and short[-1].finish == LENGTH
    at_once = engine.run([asked(prompt, 9, stop_ids=(whole[0],))])[0]
    assert ids(at_once) == whole[:1] and at_once[-1].finish == STOP


def test_refusals(hybrid):
    model, engine = hybrid
    small = engine_of(model, queue=1)
    small.submit(asked((1,), 1))
    with pytest.raises(Full, match="1 requests wait; expected fewer than 1"):
        small.submit(asked((1,), 1))
    for request, message in (
        (asked((1, 23), 1), "token id 23; expected 0 to 22"),
        (asked((1,), 1, stop_ids=(-1,)), "token id -1; expected 0 to 22"),
        (asked((1,) * 30, 3), "a prompt of 30 tokens and max_tokens=3; expected at most 32 in all"),
        (asked((1,), 1, stop=("a",)), "Request.stop without a tokenizer; expected token ids in stop_ids"),
        (asked((1,), 1, budget=Budget(tokens=1)), "the checkpoint has no tokenizer.json"),
        (asked((1,), 1, grammar=Grammar(kind="regex", text="a")), "the checkpoint has no tokenizer.json"),
        (asked((1,), 1, Sampling(logit_bias=((23, 1.0),))), "Sampling.logit_bias has token id 23; expected 0 to 22"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.submit(request)
    assert not engine.busy
