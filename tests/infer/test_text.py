"""Texts of streams: whole texts in pieces, whatever the split, and the place where a stop string ends them."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.data import vocabularies

from orogen.config.checks import ConfigError
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import byte_tokenizer, train_bpe
from orogen.infer.text import StopSearch, Texts

TOKENIZERS = {
    "byte": byte_tokenizer(),
    "bpe": train_bpe(["aé🙂 the end of the text, の漢字 の漢字" * 3] * 9, vocab_size=280),
    **{
        name: Tokenizer(backend, pad="</s>", bos="<s>", eos="</s>")
        for name, backend in vocabularies.pipelines().items()
        if name in ("dummy prefix", "metaspace never")
    },
}
TEXTS = {name: Texts(tokenizer) for name, tokenizer in TOKENIZERS.items()}
# Bytes of characters, whole and not, special tokens, spaces and pieces.
BYTES = st.sampled_from([b + 3 for b in "é漢🙂 a\n".encode()] + [0xFF + 3, 0xC3 + 3, 0, 1, 2])


def split(ids: list[int], seed: int) -> list[list[int]]:
    """The ids in parts of random sizes, some empty."""
    random = np.random.default_rng(seed)
    offsets = sorted(random.integers(0, len(ids) + 1, random.integers(0, len(ids) + 2)).tolist())
    return [ids[a:b] for a, b in zip([0, *offsets], [*offsets, len(ids)], strict=True)]


def streamed(name: str, parts: list[list[int]], **given) -> tuple[list[str], str | None]:
    stream = TEXTS[name].stream(**given)
    pieces = [*map(stream.push, parts), stream.finish()]
    assert stream.stopped == (stream.stop is not None)
    return pieces, stream.stop


def ended(text: str, stops) -> tuple[str, str | None]:
    """What precedes the stop string that is complete first, the longest of several, by trying every end; and it."""
    for end in range(1, len(text) + 1):
        if found := [s for s in stops if text[:end].endswith(s)]:
            return text[: end - max(map(len, found))], max(found, key=len)
    return text, None


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_pieces_make_the_text_that_the_tokenizer_decodes(name, data, seed):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.one_of(BYTES, st.integers(0, tokenizer.vocab_size - 1)), max_size=24))
    after = data.draw(st.sampled_from([[], [1], [1, 0], [1, 40], [50, 2]]))
    pieces, stopped = streamed(name, split(ids, seed), after=after)
    assert "".join(pieces) == tokenizer.decode(ids, after=after)
    assert not stopped


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_the_text_ends_before_the_first_stop_string_whatever_the_split(name, data, seed):
    tokenizer = TOKENIZERS[name]
    text = data.draw(st.text("ab é\n🙂", max_size=30))
    stops = data.draw(st.lists(st.text("ab é\n🙂", min_size=1, max_size=5), min_size=1, max_size=4))
    ids = tokenizer.encode(text).tolist()
    pieces, stop = streamed(name, split(ids, seed), stops=stops)
    assert ("".join(pieces), stop) == ended(tokenizer.decode(ids), stops)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=20),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1),
    seed=st.integers(0, 99),
)
@example(text="abcd", stops=["bc", "abcd"], seed=0)
@example(text="aab", stops=["aaab", "ab", "b"], seed=1)
@example(text="aaaab", stops=["aab"], seed=1)
def test_searches_find_what_trying_every_end_does(text, stops, seed):
    search, shown = StopSearch(stops), []
    for part in split(list(text), seed):
        shown.append(search.feed("".join(part)))
        if search.found:
            break
    expected, found = ended(text, stops)
    assert ("".join(shown) + ("" if search.found else search.held), search.found) == (expected, found)


def test_no_more_is_held_back_than_must_be():
    stream = TEXTS["byte"].stream(stops=["\n\nUser:", "\n#"])

    def push(text: str, count: int | None = None) -> str:
        return stream.push([b + 3 for b in text.encode()[:count]])

    assert push("é", 1) == ""
    assert stream.push([0xA9 + 3]) == "é"
    assert [push("a\n"), push("b"), push("\n\nUs"), push("X"), push("\n\n\n")] == ["a", "\nb", "", "\n\nUsX", "\n"]
    assert [push("User"), push(":!"), push("more"), stream.finish()] == ["", "", "", ""]
    assert stream.stopped


def test_a_text_after_a_stop_is_dropped_and_what_was_held_comes_at_the_end():
    pieces, stopped = streamed("byte", [[98 + 3, 97 + 3], [0xC3 + 3]], stops=["ax"])
    assert (pieces, stopped) == (["b", "", "a\ufffd"], None)
    pieces, stopped = streamed("byte", [[97 + 3, 0xC3 + 3]], stops=["\ufffd"])
    assert (pieces, stopped) == (["a", ""], "\ufffd"), "the last, incomplete character is part of the text too"


def test_a_run_of_byte_tokens_waits_for_its_end():
    """One wrong byte turns all of it into U+FFFD, as transformers has it."""
    fallback = [b + 3 for b in "漢字".encode()]
    a = 260
    assert streamed("metaspace never", [fallback[:4], fallback[4:], [a]])[0] == ["", "", "漢字a", ""]
    assert streamed("metaspace never", [fallback[:3], fallback[4:], [a]])[0] == ["", "", "\ufffd" * 5 + "a", ""]


@pytest.mark.parametrize("token", [-1, 259, 2**31])
@pytest.mark.parametrize("name", ["byte", "dummy prefix"])
def test_ids_outside_the_vocabulary_are_refused(name, token):
    token = token if token != 259 else TOKENIZERS[name].vocab_size
    with pytest.raises(ConfigError, match=f"token id {token}: expected 0 to"):
        TEXTS[name].stream().push([5, token])


def test_time_is_linear_also_for_stop_strings_that_nearly_match():
    """Twice the text takes about twice the time: quadratic searches would take hundreds of times this limit."""
    size = 100_000
    stream = TEXTS["byte"].stream(stops=["a" * (size // 2) + "b", "a" * size + "c"])
    start = time.process_time()
    pieces = [stream.push([97 + 3]) for _ in range(size)]
    assert "".join(pieces) == "" and stream.finish() == "a" * size
    assert time.process_time() - start < 10


def test_specials_that_are_shown_are_text():
    from tests.infer.chats import backend, tokenizer

    ids = backend().encode("<think>é\n</think>the<|im_end|>", add_special_tokens=False).ids
    shown = [backend().token_to_id(name) for name in ("<think>", "</think>")]
    stream = Texts(tokenizer()).stream(shown=shown, stops=["k>the"])
    assert "".join([*(stream.push([i]) for i in ids), stream.finish()]) == "<think>é\n</thin" and stream.stopped
    assert Texts(tokenizer()).stream(shown=shown).push(ids) == "<think>é\n</think>the"
    assert Texts(tokenizer()).stream().push(ids) == "é\nthe"
