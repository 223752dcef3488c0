"""Drafts change no token: neither the most likely ones nor those drawn, whatever else a request asks for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.infer.engines import answers, asked, changed, engine_of, leaked, opened, random_prompt, text

from orogen.data.vocabulary import byte_tokenizer
from orogen.infer.request import Budget, Sampling
from orogen.layers.documents import documents

# One page per text, so that there are few programs.
ROOM = {"page": 32, "chunk": 32, "prefill_tokens": 32, "slots": 3}
REQUESTS = [
    asked(random_prompt(1, 5), 17),
    asked(random_prompt(2, 13), 17, Sampling(temperature=1.0, seed=1)),
    asked(random_prompt(3, 1), 17, Sampling(temperature=0, repetition_penalty=1.3, presence_penalty=0.5)),
    asked((7, 8, 7, 8, 7), 17, Sampling(temperature=0.7, seed=2, frequency_penalty=0.4), stop_ids=(3,)),
    asked(random_prompt(4, 9), 17, Sampling(temperature=0.3, seed=3)),
]


@pytest.mark.parametrize(
    ("pattern", "drafter", "drafts", "changes"),
    [
        ("mw/M", "mtp", 2, {"sliding_window": 3}),
        ("M*E/*w", "mtp", 3, {"sliding_window": 3}),
        ("Mm", "lookup", 2, {}),
    ],
)
def test_tokens_are_those_of_plain_decoding(pattern, drafter, drafts, changes):
    """Of greedy and drawn requests, with penalties and ends, in one batch that is smaller than all of them."""
    model = opened(pattern, **changes)
    plain = engine_of(model, **ROOM)
    engine = engine_of(model, **ROOM, drafter=drafter, drafts=drafts)
    expected = plain.run(REQUESTS)
    found = engine.run(REQUESTS)
    tokens = [[(t.id for t in output.tokens) for output in outputs] for outputs in found]
    assert [[t for each in outputs for t in each] for outputs in tokens] == answers(plain, *REQUESTS)
    for one, other in zip(found, expected, strict=True):
        assert one[-1].finish == other[-1].finish
        ours, theirs = ([t.logprob for output in outputs for t in output.tokens] for outputs in (one, other))
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    stats = engine.stats
    assert len(stats.accepted) == len(stats.drafted) == drafts
    assert all(kept <= offered <= stats.steps for kept, offered in zip(stats.accepted, stats.drafted, strict=True))
    assert stats.accepted[0] > 0 and stats.accepted == sorted(stats.accepted, reverse=True)
    assert stats.generated_tokens == plain.stats.generated_tokens // 2
    assert leaked(engine) == [0, 0]


def test_the_block_drafts_what_it_was_trained_to():
    """As many drafts are kept as its training forward over the whole text predicts right."""
    model = opened("M*/M*", vocab_size=5)
    engine = engine_of(model, **ROOM, drafter="mtp", drafts=1)
    prompt, tokens = random_prompt(6, 7, 5), 25
    (found,) = answers(engine, asked(prompt, tokens))
    text = (*prompt, *found)

    @jax.jit
    def predicted(params, buffers, tokens_bt):
        docs = documents(jnp.ones(tokens_bt.shape, jnp.int32))
        whole = nnx.merge(model.built.graph, params, buffers)
        h_btd, _ = whole.hidden(tokens_bt, docs, model.plan)
        ((h_btd, _),) = whole.deeper(h_btd, tokens_bt, docs, model.plan)
        return whole.project(h_btd, model.plan).argmax(-1)[0]

    drafts_t = predicted(model.params, model.buffers, np.array([text], np.int32)).tolist()
    place, steps, kept = len(prompt), 0, 0
    while place + 1 < len(text):
        right = drafts_t[place - 1] == text[place + 1] and place + 2 < len(text)
        place, steps, kept = place + 1 + right, steps + 1, kept + right
    assert (engine.stats.steps, engine.stats.accepted) == (steps, [kept]) and kept > 0


def circle(size: int):
    """A model whose next token is one more than the last, modulo its vocabulary."""
    model = opened("-", vocab_size=size, hidden_size=12, num_attention_heads=4)
    square = jnp.eye(size, 12)
    model = changed(model, ("embedding", "weight"), lambda a: 9 * square)
    model = changed(model, ("head", "weight"), lambda a: jnp.roll(9 * square, 1, axis=0).T)
    return changed(model, ("backbone", "children", 0, "mixer", "down"), jnp.zeros_like)


def test_drafts_that_are_all_right_are_all_counted():
    model = circle(5)
    engine = engine_of(model, **ROOM, drafter="lookup", drafts=3)
    prompt = tuple(n % 5 for n in range(9))
    (found,) = answers(engine, asked(prompt, 13))
    assert found == [n % 5 for n in range(9, 22)]
    stats = engine.stats
    assert (stats.steps, stats.drafted, stats.accepted) == (3, [3, 3, 3], [3, 3, 3])
    # A text that never had its end before has no draft.
    (found,) = answers(engine, asked((2,), 3))
    assert found == [3, 4, 0]
    assert (stats.steps, stats.drafted, stats.accepted) == (5, [3, 3, 3], [3, 3, 3])
    # Two tokens are left after the first, of which one may be a draft's.
    (found,) = answers(engine, asked(prompt, 3))
    assert found == [4, 0, 1]
    assert (stats.steps, stats.drafted, stats.accepted) == (6, [4, 3, 3], [4, 3, 3])


def test_a_budget_and_drafts():
    """The marker is forced where it would be, though drafts are looked up beyond it."""
    tokenizer = byte_tokenizer()
    model = opened("M", tokenizer=tokenizer, vocab_size=tokenizer.vocab_size)
    prompt = tuple(tokenizer.encode_inside("aa<think>").tolist())
    sampling = Sampling(temperature=0.2, seed=1, logit_bias=((100, 4.0), (101, 4.0)))
    requests = [
        asked(prompt, 20, sampling, budget=Budget(tokens=n), ignore_eos=True, logprobs=None) for n in (0, 3, 30)
    ]
    requests.append(dataclasses.replace(requests[1], budget=None))
    plain, drafting = (
        engine_of(model, **ROOM, **more).run(requests) for more in ({}, {"drafter": "lookup", "drafts": 3})
    )
    assert [text(outputs) for outputs in drafting] == [text(outputs) for outputs in plain]
    assert text(drafting[1]).index("</think>") == 3


def test_drafts_are_looked_up_in_a_cached_beginning():
    """Of a model that has attention alone, whose pages know no text."""
    engine = engine_of(opened("*", vocab_size=5), page=8, chunk=8, drafter="lookup", drafts=2, prefill_tokens=32)
    prompt, stats = random_prompt(1, 23, 5), engine.stats
    before, found = np.zeros(5, int), []
    for _ in range(2):
        answers(engine, asked(prompt, 9))
        after = np.array([stats.steps, *stats.drafted, *stats.accepted])
        found.append((after - before).tolist())
        before = after
    assert found[0] == found[1] and found[0][1] > 0
    assert stats.cached_tokens == 16


def test_rings_shorter_than_drafts_lose_nothing():
    """A window of one token, and pieces that are hardly longer than what is drafted beyond them: the block's ring of
    five places goes round with every step. Its drafts are those of an engine whose rings hold whole texts."""
    model = opened("w/w", sliding_window=1, vocab_size=5)
    requests = [asked(random_prompt(n, n, 5), 12) for n in (1, 3, 5, 9, 14)]
    sizes = {"page": 2, "chunk": 4, "prefill_tokens": 4}, {**ROOM, "slots": 2}
    small, large = (engine_of(model, **each, drafter="mtp", drafts=3) for each in sizes)
    for asked_now in (requests, requests[3:]):
        assert answers(small, *asked_now) == answers(large, *asked_now)
    assert small.stats.cached_tokens > 0
    found = [(e.stats.steps, e.stats.drafted, e.stats.accepted) for e in (small, large)]
    assert found[0] == found[1] and found[0][2][0] > 0
