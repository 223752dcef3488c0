"""What is told of a request's tokens, however many come at a time."""

import numpy as np
import pytest

from orogen.config.data import DataConfig
from orogen.data.vocabulary import make_tokenizer
from orogen.infer.forward import NONE, Report
from orogen.infer.request import ERROR, LENGTH, STOP, Chosen, Request
from orogen.infer.slot import Slot, plain, reported
from orogen.infer.text import Texts

TOKENIZER = make_tokenizer(DataConfig(corpus="text", tokenizer="byte"), [])


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).tolist()


def slot(*, tokens: int = 9, stop: tuple[str, ...] = (), end_ids: tuple[int, ...] = (), matcher=None, **fields) -> Slot:
    request = Request(prompt=(1, *ids("p")), max_tokens=tokens, stop=stop, **fields)
    return Slot(4, request, (0,), end_ids, Texts(TOKENIZER).stream(after=request.prompt, stops=stop), matcher)


def told(one: Slot, text: str, *, each: int, bad: bool = False) -> tuple[str, str, str | None, str | None]:
    """The ids, as text, and the text that are told where `each` tokens come at a time, and why it ended."""
    kept, texts, all_ids = [], "", ids(text)
    for first in range(0, len(all_ids), each):
        last = first + each >= len(all_ids)
        output = one.advance(plain(all_ids[first : first + each]), bad=bad and last)
        kept += [token.id for token in output.tokens]
        texts += output.text
        if output.finish is not None:
            return TOKENIZER.decode(kept), texts, output.finish, output.error
    return TOKENIZER.decode(kept), texts, None, None


@pytest.mark.parametrize("each", [1, 2, 5])
def test_the_end_is_the_same_however_many_tokens_come_at_a_time(each):
    assert told(slot(), "abcd", each=each) == ("abcd", "abcd", None, None)
    assert told(slot(tokens=5), "abcde", each=each) == ("abcde", "abcde", LENGTH, None)
    assert told(slot(stop=("cd",)), "abcdef", each=each)[1:] == ("ab", STOP, None)
    assert told(slot(tokens=4, stop=("de",)), "abcd", each=each) == ("abcd", "abcd", LENGTH, None)


@pytest.mark.parametrize("each", [1, 2, 5])
def test_no_stop_string_is_looked_for_in_the_first_tokens(each):
    assert told(slot(stop=("b", "bc"), min_tokens=3), "abcabcd", each=each)[1:] == ("abca", STOP, None)
    assert told(slot(stop=("cd",), min_tokens=3), "abcd", each=each)[1:] == ("abcd", None, None), "it begins before"


def test_what_ended_a_text_is_told():
    (stop_id,) = ids("c")
    assert slot(stop=("x", "bc")).advance(plain(ids("abc")), bad=False).stop == "bc"
    assert slot(end_ids=(stop_id,), stop_ids=(stop_id,)).advance(plain(ids("abc")), bad=False).stop == stop_id
    assert slot(end_ids=(stop_id,)).advance(plain(ids("abc")), bad=False).stop is None, "an end of the model's own"
    assert slot(tokens=2).advance(plain(ids("ab")), bad=False).stop is None


def test_a_token_that_ends_the_text_is_no_part_of_it():
    assert told(slot(end_ids=tuple(ids("c"))), "abc", each=3) == ("abc", "ab", STOP, None)


def test_bad_logits_end_it_before_their_token():
    one = slot(tokens=4)
    error = "the logits of token 2 are not numbers, or allow no token"
    assert told(one, "abc", each=3, bad=True) == ("ab", "ab", ERROR, error)
    assert one.generated == ids("ab")
    assert told(slot(), "a", each=1, bad=True)[0::2] == ("", ERROR)
    assert told(slot(stop=("a",)), "ab", each=2, bad=True)[1:3] == ("", STOP), "it had ended before"


def test_half_a_character_is_told_at_the_end():
    one = slot(tokens=3)
    assert one.advance(plain(ids("aé")[:2]), bad=False).text == "a"
    assert one.advance(plain(ids("é")[:1]), bad=False).text.endswith("\ufffd")


class Matcher:
    """A grammar that ends after `finished_after` tokens, or breaks at the token `refused`."""

    def __init__(self, finished_after: int = 99, refused: int = -1):
        self.seen, self.after, self.refused = [], finished_after, refused

    @property
    def finished(self) -> bool:
        return len(self.seen) >= self.after

    def advance(self, token: int) -> str | None:
        self.seen.append(token)
        return "cannot go on" if token == self.refused else None


def test_a_grammar_sees_every_token_until_it_ends():
    one = slot(matcher=Matcher(finished_after=2))
    assert told(one, "abc", each=3) == ("ab", "ab", STOP, None)
    assert one.matcher.seen == ids("ab")
    assert told(slot(matcher=Matcher(refused=ids("b")[0])), "abc", each=3)[1:] == ("ab", ERROR, "cannot go on")


def test_log_probabilities_go_with_their_tokens():
    """Two steps of up to two tokens of two slots; the first step of slot 1 gave one token."""
    token = np.array([[[5, 6], [7, 8]], [[3, NONE], [4, 2]]], np.int32)
    logprob = -token.astype(np.float32) / 2
    top_ids = np.stack([token, token + 10], -1)
    report = Report(token, logprob, top_ids, -top_ids.astype(np.float32))
    expected = [Chosen(i, -i / 2, ((i, -i), (i + 10, -i - 10))) for i in (3, 4, 2)]
    assert reported(report, 1, 2) == expected
    assert reported(report, 1, 1) == [Chosen(c.id, c.logprob, c.top[:1]) for c in expected]
    assert reported(Report(token, logprob, None, None), 1, 0) == [Chosen(c.id, c.logprob) for c in expected]
