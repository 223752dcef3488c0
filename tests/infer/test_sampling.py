"""Which token is chosen: against loops over the definitions, and what it must not depend on."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from orogen.config.checks import ConfigError
from orogen.infer.knobs import Features, check_ids, features_of, knobs_of, words_of_mask
from orogen.infer.request import Budget, Grammar, Request, Sampling
from orogen.infer.sampling import _gumbel, choose, history_of

V = 11
ALL_TOKENS = np.ones(V, bool)


def asked(prompt=(1,), **sampling) -> Request:
    return Request(prompt=prompt, max_tokens=9, sampling=Sampling(**{"seed": 0, **sampling}))


@functools.partial(jax.jit, static_argnames="features")
def _choose(logits_bv, knobs, rows, is_token_v, mask_bw, live_b, *, features):
    return choose(logits_bv, knobs, rows, features, is_token_v=is_token_v, mask_bw=mask_bw, live_b=live_b)


def chosen(logits_bv, requests, *, features=None, generated=None, is_token_v=None, mask_bw=None, live_b=None):
    """Choice and rows of requests with these logits."""
    logits_bv = np.asarray(logits_bv, np.float32)
    features = features or features_of(requests)
    rows = history_of(requests, features, vocab_size=logits_bv.shape[1], generated=generated)
    is_token_v = np.ones(logits_bv.shape[1], bool) if is_token_v is None else is_token_v
    return _choose(logits_bv, knobs_of(requests, features), rows, is_token_v, mask_bw, live_b, features=features)


def frequencies(logits_v, request: Request, *, draws=3000, **given) -> np.ndarray:
    """How often each token is drawn, by as many tokens of one request."""
    generated = given.pop("generated", None)
    features = features_of([request])
    knobs = knobs_of([request] * draws, features)
    rows = history_of(
        [request] * draws, features, vocab_size=len(logits_v), generated=generated and [generated] * draws
    )
    logits_bv = np.tile(np.float32(logits_v), (draws, 1))
    rows = rows._replace(number_b=np.arange(draws, dtype=np.int32))
    is_token_v = np.ones(len(logits_v), bool)
    choice, _ = _choose(logits_bv, knobs, rows, is_token_v, None, None, features=features)
    assert not choice.bad_b.any()
    return np.bincount(choice.token_b, minlength=len(logits_v))


def assert_drawn_from(counts, probabilities) -> None:
    """Pearson's test at five standard deviations of chi-square, and nothing of probability 0."""
    probabilities = np.asarray(probabilities, np.float64)
    expected = probabilities / probabilities.sum() * counts.sum()
    assert not counts[expected == 0].any()
    likely = expected > 0
    freedom = likely.sum() - 1
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


def shaped(logits_v, request: Request, generated=()) -> np.ndarray:
    """Logits with biases and penalties, token by token."""
    sampling, out = request.sampling, []
    for token, logit in enumerate(np.float64(logits_v)):
        logit += sum(value for biased, value in sampling.logit_bias if biased == token)
        if token in request.prompt or token in generated:
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        logit -= sampling.frequency_penalty * list(generated).count(token)
        logit -= sampling.presence_penalty * (token in generated)
        out.append(logit)
    return np.array(out)


PENALTIES = {
    "presence_penalty": 1.5,
    "frequency_penalty": -0.4,
    "repetition_penalty": 1.7,
    "logit_bias": ((2, 3.0), (7, -100.0), (2, 0.5), (10, 1.0)),
}


@pytest.mark.parametrize("names", [[name] for name in PENALTIES] + [list(PENALTIES)])
def test_penalties_and_biases_are_those_of_the_definition(names):
    random = np.random.default_rng(len(names[0]))
    for _ in range(20):
        logits_v = np.float32(random.normal(size=V) * 2)
        prompt, generated = (tuple(random.integers(0, V, n).tolist()) for n in (3, 5))
        request = asked(prompt, temperature=0, **{name: PENALTIES[name] for name in names})
        choice, rows = chosen([logits_v], [request], generated=[generated])
        assert int(choice.token_b[0]) == int(np.argmax(shaped(logits_v, request, generated)))
        if len(names) > 1 or "penalty" in names[0]:
            after = np.bincount([*generated, int(choice.token_b[0])], minlength=V)
            np.testing.assert_array_equal(rows.counts_bv[0], after)


def test_draws_follow_the_definition_with_all_settings_at_once():
    logits_v = np.float32(np.random.default_rng(11).normal(size=V))
    request = asked((4, 5), temperature=1.9, top_k=7, top_p=0.93, min_p=0.15, **PENALTIES)
    generated = (3, 3, 5)
    weights = np.exp(shaped(logits_v, request, generated) / 1.9)
    order = np.argsort(-weights)[:7]
    nucleus = order[(np.cumsum(weights[order]) - weights[order]) < 0.93 * weights[order].sum()]
    left = [i for i in nucleus if weights[i] > 0.15 * weights.max()]
    assert 2 < len(left) < len(nucleus) < 7
    expected = np.zeros(V)
    expected[left] = weights[left]
    assert_drawn_from(frequencies(logits_v, request, generated=generated), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1e30, 1e300])
def test_temperature_scales_the_logits(temperature):
    probabilities = np.array([0.5, 0.25, 0.2, 0.05])
    counts = frequencies(np.log(probabilities), asked(temperature=temperature))
    assert_drawn_from(counts, probabilities ** (1 / temperature))


def test_what_is_excluded_is_never_drawn():
    counts = frequencies([-np.inf, 0, -np.inf, 0], asked(temperature=1e300))
    assert_drawn_from(counts, [0, 1, 0, 1])


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-46, 1e-40, 1.17e-38])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.3}, {"top_k": 2}])
def test_temperatures_that_devices_take_for_zero_are_greedy(temperature, more):
    rows = [asked(temperature=temperature, seed=seed, **more) for seed in range(4)]
    logits_v = [-3.0, 1e4, 2.5, 1e4, 1e4 - 1]
    assert features_of(rows) == Features()
    assert chosen([logits_v] * 5, [*rows, asked()])[0].token_b[:4].tolist() == [1] * 4


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-30, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 1e30, -1.0, -1e37])
def test_small_temperatures_draw_the_largest(temperature, scale):
    rows = [asked(temperature=temperature, seed=seed) for seed in range(20)]
    choice, _ = chosen([np.float32([-3.0, 7.0, 2.5, 6.0]) * np.float32(scale)] * 20, rows)
    assert set(choice.token_b.tolist()) == {1 if scale > 0 else 0}


@pytest.mark.parametrize("temperature", [0, 1e-38, 1.0, 1e300])
def test_an_infinite_logit_is_drawn(temperature):
    rows = [asked(temperature=temperature, seed=seed) for seed in range(20)]
    choice, _ = chosen([[0.0, -np.inf, np.inf, 3.0]] * 20, rows)
    assert set(choice.token_b.tolist()) == {2}
    assert not choice.bad_b.any()


@pytest.mark.parametrize("more", [{}, {"temperature": 0}, {"top_k": 1000}, {"top_p": 1e-30}, {"min_p": 1.0}])
def test_the_only_possible_token_is_chosen(more):
    logits_v = np.full(V, -np.inf)
    logits_v[6] = -3e38
    choice, _ = chosen([logits_v], [asked(repetition_penalty=1e300, **more)])
    assert (choice.token_b.tolist(), choice.bad_b.tolist()) == ([6], [False])


def test_greedy_ties_go_to_the_lower_index():
    assert chosen([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]], [asked(temperature=0)] * 2)[0].token_b.tolist() == [1, 0]


def test_noise_is_gumbels_and_has_more_bits_than_a_mantissa():
    """A largest value that repeats would favour lower indices: 1 - exp(-exp(-x)) is no multiple of 2**-23."""
    noise = np.float64(jax.jit(lambda key: _gumbel(key, 3, 100_000))(np.array([0, 7], np.uint32)))
    assert abs(noise.mean() - np.euler_gamma) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.04
    steps = -np.expm1(-np.exp(-np.sort(noise)[-50:])) * 2**23
    assert np.abs(steps - np.round(steps)).max() > 0.2


MIXED = [
    asked((1, 2), temperature=0),
    asked((3,), temperature=0.9, top_p=0.8, seed=5),
    asked((3, 4), temperature=1.2, presence_penalty=1.1, seed=2**63 - 1),
    asked((5,), temperature=0, repetition_penalty=1.4),
    asked((6,), top_k=3, logit_bias=((0, 2.0),), seed=2**32),
    asked((7,), min_p=0.1, seed=2**32 + 5),
]


def continued(requests, logits_tbv, *, features=None, at_once=True) -> np.ndarray:
    """Tokens (t, b) of as many steps, in one program or in one program each."""
    features = features or features_of([r for r in requests if r])
    knobs, rows = knobs_of(requests, features), history_of(requests, features, vocab_size=V)

    def step(rows, logits_bv):
        choice, rows = choose(logits_bv, knobs, rows, features, is_token_v=ALL_TOKENS)
        return rows, choice.token_b

    if at_once:
        return np.asarray(jax.jit(lambda rows: lax.scan(step, rows, logits_tbv))(rows)[1])
    tokens, one = [], jax.jit(step)
    for logits_bv in logits_tbv:
        rows, token_b = one(rows, logits_bv)
        tokens.append(token_b)
    return np.array(tokens)


def test_tokens_do_not_depend_on_slot_neighbours_program_or_steps_at_once():
    logits_tbv = np.float32(np.random.default_rng(1).normal(size=(12, len(MIXED), V)))
    together_tb = continued(MIXED, logits_tbv)
    np.testing.assert_array_equal(continued(MIXED, logits_tbv, at_once=False), together_tb)
    np.testing.assert_array_equal(continued(MIXED[::-1], logits_tbv[:, ::-1])[:, ::-1], together_tb)
    everything = dataclasses.replace(features_of(MIXED), logprobs=20)
    np.testing.assert_array_equal(continued(MIXED, logits_tbv, features=everything), together_tb)
    for row, request in enumerate(MIXED):
        beside_tb = continued([None, request, None], np.repeat(logits_tbv[:, row : row + 1], 3, 1))
        np.testing.assert_array_equal(beside_tb[:, 1], together_tb[:, row])


def test_seeds_rows_and_numbers_of_tokens_are_drawn_apart():
    """Also seeds that differ in their high bits alone."""
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**62]
    tokens_tb = continued([asked(seed=seed) for seed in seeds], np.zeros((40, len(seeds), V), np.float32))
    assert len({tuple(tokens) for tokens in tokens_tb.T.tolist()}) == len(seeds)
    for row in tokens_tb.T:
        assert len(set(row.tolist())) > 5


def test_a_row_goes_on_from_what_it_has_generated():
    logits_tbv = np.float32(np.random.default_rng(2).normal(size=(9, len(MIXED), V)))
    whole_tb = continued(MIXED, logits_tbv)
    resumed = whole_tb[:4].T.tolist()
    choice, rows = chosen(logits_tbv[4], MIXED, generated=resumed)
    assert choice.token_b.tolist() == whole_tb[4].tolist()
    assert rows.number_b.tolist() == [5] * len(MIXED)


def test_rows_that_do_not_live_stay_as_they_are():
    requests = [asked(frequency_penalty=1), asked(frequency_penalty=1, seed=3)]
    _, rows = chosen(np.zeros((2, V)), requests, live_b=np.array([True, False]))
    assert rows.number_b.tolist() == [1, 0]
    assert rows.counts_bv.sum(-1).tolist() == [1, 0]


def test_masks_hold_token_i_in_bit_i_of_their_words():
    size = 77
    allowed_bv = np.random.default_rng(0).random((3, size)) < 0.1
    allowed_bv[:, [0, 31, 32, 63, 64, 76]] = [[1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]
    bits_bw = np.zeros((3, words_of_mask(size)), np.uint32)
    for row, token in np.argwhere(allowed_bv):
        bits_bw[row, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    request = dataclasses.replace(asked(temperature=0), grammar=Grammar(kind="regex", text="a"))
    logits_bv = np.float32(np.random.default_rng(1).normal(size=(3, size)))
    choice, _ = chosen(logits_bv, [request] * 3, mask_bw=bits_bw)
    assert choice.token_b.tolist() == np.where(allowed_bv, logits_bv, -np.inf).argmax(-1).tolist()
    assert not choice.bad_b.any()
    bits_bw[1] = 0
    assert chosen(logits_bv, [request] * 3, mask_bw=bits_bw)[0].bad_b.tolist() == [False, True, False]


def test_rows_of_the_vocabulary_without_a_token_are_never_chosen():
    is_token_v = np.arange(V) % 2 == 1
    logits_v = np.where(is_token_v, 0.0, 9.0)
    request = dataclasses.replace(asked(logit_bias=((0, 100.0),), top_p=0.9), logprobs=20)
    rows = [dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=s)) for s in range(30)]
    choice, _ = chosen([logits_v] * 30, rows, is_token_v=is_token_v)
    assert set(choice.token_b.tolist()) <= {1, 3, 5, 7, 9}
    assert choice.top_ids_bn[0, :5].tolist() == [1, 3, 5, 7, 9]
    assert choice.top_logprobs_bn[0, 5:].tolist() == [-np.inf] * (V - 5)


def test_held_tokens_come_after_the_first_so_many():
    logits_v = [9.0, 8.0, 1.0, *[0.0] * 7, 8.5]
    early, plain = (dataclasses.replace(asked(temperature=0), min_tokens=least, held=(0, 10)) for least in (3, 0))
    rows = [early] * 4 + [plain]
    generated = [(), (1, 1), (1, 1, 1), (1,) * 5, ()]
    assert features_of(rows).holds and not features_of([plain]).holds
    assert chosen([logits_v] * 5, rows, generated=generated)[0].token_b.tolist() == [1, 1, 0, 0, 0]
    drawn = asked(temperature=100.0)
    counts = frequencies(logits_v, dataclasses.replace(drawn, max_tokens=9**5, min_tokens=9**5, held=(0, 10)))
    assert counts[[0, 10]].tolist() == [0, 0] and counts.min(where=np.arange(V) % 10 > 0, initial=1) > 0
    infinite_v = np.where(np.arange(V) == 10, np.inf, logits_v)
    choice, _ = chosen([infinite_v] * 2, [early, plain])
    assert choice.token_b[0] not in (0, 10) and choice.token_b[1] == 10 and not choice.bad_b.any()
    with pytest.raises(ConfigError, match="Request.held has token id 11; expected 0 to 10"):
        check_ids(dataclasses.replace(early, held=(11,)), V)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("place", [0, 5, V - 1])
def test_a_nan_fails_its_own_row_alone(temperature, place):
    logits_bv = np.zeros((3, V), np.float32)
    logits_bv[1, place] = np.nan
    requests = [asked(temperature=temperature, top_p=0.9, seed=seed) for seed in range(3)]
    choice, _ = chosen(logits_bv, requests)
    whole, _ = chosen(np.zeros((3, V)), requests)
    assert choice.bad_b.tolist() == [False, True, False]
    assert choice.token_b[::2].tolist() == whole.token_b[::2].tolist()
    assert 0 <= int(choice.token_b[1]) < V
    assert chosen(np.full((1, V), -np.inf), requests[:1])[0].bad_b.tolist() == [True]


@pytest.mark.parametrize("count", [0, 3])
def test_log_probabilities_are_the_models_own(count):
    logits_bv = np.float32(np.random.default_rng(0).normal(size=(2, 30)) * 4)
    requests = [
        dataclasses.replace(asked(temperature=0.3, top_k=2, logit_bias=((4, 9.0),), seed=seed), logprobs=count)
        for seed in range(2)
    ]
    choice, _ = chosen(logits_bv, requests)
    exact_bv = np.float64(logits_bv) - np.log(np.exp(np.float64(logits_bv)).sum(-1, keepdims=True))
    np.testing.assert_allclose(choice.logprob_b, exact_bv[[0, 1], choice.token_b], rtol=1e-5, atol=1e-6)
    if count:
        order_bn = np.argsort(-exact_bv, -1)[:, :20]
        assert choice.top_ids_bn.tolist() == order_bn.tolist()
        np.testing.assert_allclose(choice.top_logprobs_bn, np.take_along_axis(exact_bv, order_bn, -1), rtol=1e-5)


def test_log_probabilities_of_huge_logits_are_finite():
    request = dataclasses.replace(asked(temperature=0), logprobs=0)
    choice, _ = chosen([[3e38, 3e38, -3e38], [np.inf, 0, 1]], [request] * 2)
    np.testing.assert_allclose(choice.logprob_b, [-np.log(2), 0], rtol=1e-6)


def test_features_are_what_the_requests_ask_for():
    plain = asked(temperature=0)
    assert features_of([]) == features_of([plain]) == Features()
    assert features_of([plain, asked()]) == Features(draws=True)
    assert features_of([asked(top_p=0.9)]) == Features(draws=True, restricts=True)
    assert features_of([asked(temperature=0, presence_penalty=-1)]) == Features(penalties=True)
    assert features_of([asked(temperature=0, logit_bias=((1, 1.0),))]) == Features(biases=True)
    budget = dataclasses.replace(plain, budget=Budget(tokens=1), grammar=Grammar(kind="regex", text="a"))
    assert features_of([budget]) == Features(budgets=True, masks=True)
    logprobs = [dataclasses.replace(plain, logprobs=n) for n in (None, 0, 1, 20)]
    assert [features_of(logprobs[: n + 1]).logprobs for n in range(4)] == [None, 0, 20, 20]


def test_pure_greedy_neither_sorts_nor_draws():
    features = Features()
    rows = history_of([None], features, vocab_size=V)
    text = str(jax.make_jaxpr(lambda x: choose(x, knobs_of([None], features), rows, features, is_token_v=ALL_TOKENS))(
        jnp.zeros((1, V))
    ))  # fmt: skip
    assert not {"sort", "top_k", "threefry2x32", "random_bits", "while", "exp", "log", "cumsum"} & set(text.split())


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"Sampling.logit_bias has token id 11; expected 0 to 10"):
        check_ids(asked(logit_bias=((11, 1.0),)), V)
    with pytest.raises(ConfigError, match="Sampling.seed is None"):
        knobs_of([asked(seed=None)], Features())
