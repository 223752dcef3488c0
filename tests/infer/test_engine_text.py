"""Requests that are about text: what stops one, grammars and budgets, beside others that ask for nothing."""

import re

import pytest
from tests.infer.engines import asked, engine_of, ids, leaked, opened, text

from orogen.config.checks import ConfigError
from orogen.data.vocabulary import byte_tokenizer
from orogen.infer.request import LENGTH, STOP, Budget, Grammar, Sampling, held_back

TOKENIZER = byte_tokenizer()
(EOS,) = TOKENIZER.end_ids
# Letters are likely, so that texts can be read.
LETTERS = tuple((TOKENIZER.encode_inside(letter).tolist()[0], 9.0) for letter in "abcdefgh")
ROOM = {"page": 32, "chunk": 32, "prefill_tokens": 32, "slots": 4}


@pytest.fixture(scope="module")
def engine():
    """Of a model with rows beyond its tokenizer's."""
    return engine_of(opened("M", tokenizer=TOKENIZER, vocab_size=TOKENIZER.vocab_size + 5), **ROOM)


def wanted(prompt: str, tokens: int = 16, bias=LETTERS, **more):
    sampling = Sampling(temperature=1.0, seed=len(prompt), logit_bias=bias)
    return asked(TOKENIZER.encode_inside(prompt).tolist(), tokens, sampling, logprobs=None, **more)


def test_stop_strings_and_ends(engine):
    """A text ends before a stop string, wherever tokens and steps end; the model's own end can be ignored."""
    plain = engine.run([wanted("abc")])[0]
    whole = text(plain)
    assert len(whole) == 16 and plain[-1].finish == LENGTH
    place = next(n for n in range(3, 13) if whole.index(whole[n : n + 3]) == n)
    requests = [wanted("abc", stop=("zzz", whole[place : place + 3])), wanted("abc", stop=(whole[1:17] + "z",))]
    eos_bias = ((EOS, 100.0),)
    stopped, held, ended, ignored = engine.run(
        [*requests, wanted("abc", 5, eos_bias), wanted("abc", 5, eos_bias, ignore_eos=True)]
    )
    assert text(stopped) == whole[:place] and stopped[-1].finish == STOP
    assert text(held) == whole and held[-1].finish == LENGTH, "what could have begun a stop string comes at the end"
    assert (ids(ended), text(ended), ended[-1].finish) == ([EOS], "", STOP)
    assert (ids(ignored), ignored[-1].finish) == ([EOS] * 5, LENGTH)
    assert leaked(engine) == [0, 0]


def test_ends_are_held_back_for_as_long_as_was_asked(engine):
    eos_bias = ((EOS, 100.0),)
    (held,) = engine.run([held_back(wanted("abc", 7, eos_bias, min_tokens=4), [EOS])])
    assert ids(held).index(EOS) == 4 and (held[-1].finish, held[-1].stop) == (STOP, None)


def test_grammars_and_budgets_beside_free_requests(engine):
    pytest.importorskip("llguidance")
    free = wanted("free")
    alone = ids(engine.run([free])[0])
    pattern, thought = Grammar(kind="regex", text="[xy]{3}z(ab)?"), wanted("q<think>", 20, budget=Budget(tokens=4))
    found = engine.run([wanted("abc", grammar=pattern), free, thought, wanted("abcd", 2, grammar=pattern), free])
    assert re.fullmatch(pattern.text, text(found[0])) and found[0][-1].finish == STOP
    assert ids(found[1]) == ids(found[4]) == alone
    assert text(found[2])[4:12] == "</think>" and "</think>" not in text(found[2])[:11]
    assert re.fullmatch("[xy]{2}", text(found[3])) and found[3][-1].finish == LENGTH
    with pytest.raises(ConfigError, match="expected a regex that can be matched"):
        engine.submit(wanted("abc", grammar=Grammar(kind="regex", text="(")))
    assert not engine.busy and leaked(engine) == [0, 0]
