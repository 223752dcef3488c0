"""Constrained output: every text that random choices within the masks make matches, and hostile grammars end alone."""

import contextlib
import json
import os
import re
import resource
import subprocess
import threading

import numpy as np
import pytest
from tests.data import vocabularies

from orogen.config.checks import ConfigError
from orogen.data.tokenizer import Tokenizer
from orogen.data.vocabulary import byte_tokenizer, train_bpe
from orogen.infer.constrain import MOST_TEXT, Constraints
from orogen.infer.grammar_check import _asked
from orogen.infer.knobs import words_of_mask
from orogen.infer.request import Grammar

pytest.importorskip("llguidance")

TOKENIZERS = {
    "byte": byte_tokenizer(),
    "bpe": train_bpe(['{"name": "ab", "count": 12, "more": true}'] * 20, vocab_size=275),
    "fallback": Tokenizer(vocabularies.pipelines()["dummy prefix"], pad="</s>", bos="<s>", eos="</s>"),
}


@pytest.fixture(scope="module")
def grammars():
    opened = {name: Constraints(tokenizer, tokenizer.vocab_size + 70) for name, tokenizer in TOKENIZERS.items()}
    yield opened
    for each in opened.values():
        each.close()


def regex(text: str) -> Grammar:
    return Grammar(kind="regex", text=text)


def schema(schema: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema))


def allowed(matcher, size: int) -> list[int]:
    """The ids in the mask, whose row has old bits before; a model has rows beyond its tokenizer's."""
    row = np.full(words_of_mask(size + 70), 0xFFFFFFFF, np.uint32)
    matcher.mask_into(row)
    ids = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
    assert not (ids >= size).any()
    return ids.tolist()


def drawn(matcher, tokenizer: Tokenizer, seed: int, most: int = 400) -> tuple[str, bool]:
    """A text of random allowed tokens, which ends as soon as it may after a few; and whether it did."""
    random, ids = np.random.default_rng(seed), []
    for _ in range(most):
        choices = allowed(matcher, tokenizer.vocab_size)
        end_ids = [i for i in choices if i in tokenizer.end_ids]
        if matcher.finished or end_ids and random.random() < 0.3:
            assert end_ids, "the end may follow a finished text"
            return tokenizer.decode(ids, after=[tokenizer.encode("a")[0]]), True
        ids.append(int(random.choice([i for i in choices if i not in end_ids])))
        assert matcher.advance(ids[-1]) is None
    return tokenizer.decode(ids), False


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("pattern", ["ab*c?", "(yes|no|maybe), [0-9]{2,3}", r'é+"/\n<s> x', "[a-c]{0,6}"])
def test_texts_match_the_expression_as_a_whole(grammars, name, pattern):
    for seed in range(6):
        text, ended = drawn(grammars[name].matcher(regex(pattern)), TOKENIZERS[name], seed)
        assert ended and re.fullmatch(pattern, text), text


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4, "pattern": "^[a-z]*$"},
        "count": {"type": "integer", "minimum": 3, "maximum": 250},
        "kind": {"enum": ["a", "</s>", None, 7]},
        "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "count", "kind", "list"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_are_objects_of_the_schema(grammars, name):
    for seed in range(6):
        text, ended = drawn(grammars[name].matcher(schema(PERSON)), TOKENIZERS[name], seed)
        found = json.loads(text)
        assert ended and list(found) == list(PERSON["properties"])
        assert re.fullmatch("[a-z]{0,4}", found["name"]) and 3 <= found["count"] <= 250
        assert found["kind"] in PERSON["properties"]["kind"]["enum"]
        assert 1 <= len(found["list"]) <= 2 and {type(x) for x in found["list"]} == {bool}


@pytest.mark.parametrize(
    "text",
    [
        'root ::= "a" b+\nb ::= [0-9] | "é"',
        'start: "a" B+\nB: /[0-9]/ | "é"',
        '// a comment\n ?start: "a" B+\nB: /[0-9]/ | "é"',
    ],
)
def test_texts_follow_a_grammar(grammars, text):
    for seed in range(6):
        found, ended = drawn(grammars["bpe"].matcher(Grammar(kind="grammar", text=text)), TOKENIZERS["bpe"], seed)
        assert re.fullmatch("a[0-9é]+", found) if ended else re.fullmatch("a[0-9é]*.?", found)


def test_space_within_json_ends():
    """Random choices would else write spaces for most of a text."""
    text = json.dumps({"list": [{"count": 1}]}, indent="\t")
    tokenizer = TOKENIZERS["byte"]
    constraints = Constraints(tokenizer, 300)
    for layout in (text, json.dumps({"list": [{"count": 1}]}, indent=8), '{"list":[{"count":1}]}', '{"list": []}'):
        matcher = constraints.matcher(schema({"type": "object"}))
        assert [matcher.advance(token) for token in tokenizer.encode(layout).tolist()] == [None] * len(layout)
        assert tokenizer.eos_id in allowed(matcher, 230)
    matcher = constraints.matcher(schema({"type": "object"}))
    for byte in b"{ ":
        assert matcher.advance(byte + 3) is None
    assert not {ord(space) + 3 for space in " \n\t\r"} & {*allowed(matcher, 230)}


def test_what_another_object_compiled_is_there_at_once(grammars, monkeypatch):
    """A server's thread compiles for its engine, which must not wait."""
    tokenizer = TOKENIZERS["bpe"]
    one, other = Constraints(tokenizer, 300), Constraints(tokenizer, 345)
    one.prepare(regex("a{3}b"))
    monkeypatch.setattr("orogen.infer.grammar_check.GrammarCheck.check", None)
    assert allowed(other.matcher(regex("a{3}b")), 275) == [tokenizer.encode("a")[0]]
    with pytest.raises(TypeError):
        other.matcher(regex("a{4}b"))


def test_a_grammar_that_is_held_is_found_though_many_come_after_it(grammars, monkeypatch):
    one, other = (Constraints(TOKENIZERS["bpe"], size) for size in (300, 345))
    monkeypatch.setattr("orogen.infer.constrain.KEPT", 2)
    held = one.prepare(regex("a{5}b"))
    for others in ((6, 7, 8), (9, 10)):
        for number in others:
            one.prepare(regex(f"a{{{number}}}b"))
        with monkeypatch.context() as patch:
            patch.setattr("orogen.infer.grammar_check.GrammarCheck.check", None)
            with contextlib.nullcontext() if held else pytest.raises(TypeError):
                assert allowed(other.matcher(regex("a{5}b")), 275) == [TOKENIZERS["bpe"].encode("a")[0]]
        held = None


def test_a_text_that_cannot_go_on_is_finished_and_may_only_end(grammars):
    matcher = grammars["byte"].matcher(regex("ab?"))
    assert allowed(matcher, 259) == [97 + 3]
    matcher.advance(97 + 3)
    assert not matcher.finished
    assert allowed(matcher, 259) == [TOKENIZERS["byte"].eos_id, 98 + 3]
    matcher.advance(98 + 3)
    assert matcher.finished
    assert allowed(matcher, 259) == [TOKENIZERS["byte"].eos_id]


def test_matchers_of_one_grammar_are_apart_and_a_wrong_token_ends_one(grammars):
    first, second = (grammars["byte"].matcher(regex("a(b|c)d")) for _ in range(2))
    assert first.advance(97 + 3) is None
    assert re.match(r"the text cannot go on in its grammar: .*token", first.advance(97 + 3))
    assert not first.finished
    for byte in b"acd":
        assert byte + 3 in allowed(second, 259)
        second.advance(byte + 3)
    assert second.finished


def test_a_grammar_waits_for_the_end_of_a_thought(grammars):
    tokenizer = TOKENIZERS["byte"]
    thinking = tokenizer.encode("ab<think>\n").tolist()
    matcher = grammars["byte"].matcher(regex("xy"), prompt=thinking)
    for token in tokenizer.encode("Let me see.</think>").tolist():
        row = np.zeros(words_of_mask(259 + 70), np.uint32)
        matcher.mask_into(row)
        assert (row == 0xFFFFFFFF).all()
        assert not matcher.finished
        assert matcher.advance(token) is None
    assert allowed(matcher, 259) == [ord("x") + 3]
    for prompt in ("<think></think>", "<thi"):
        ids = tokenizer.encode(prompt).tolist()
        assert allowed(grammars["byte"].matcher(regex("xy"), prompt=ids), 259) == [ord("x") + 3]


def chain(length: int, link) -> dict:
    """Definitions of which each refers to the next."""
    links = {f"a{i}": link({"$ref": f"#/$defs/a{i + 1}"}) for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "string"}}}


BAD = [
    (regex("a("), r"Grammar.text 'a\(': .*unclosed group.*; expected a regex that can be matched"),
    (regex("a(?=b)"), "look-around"),
    (regex("[^\x00-\U0010ffff]"), "expected a regex that can be matched"),
    (regex("(a{1000}){1000}"), "too many expressions"),
    (regex("a" * (MOST_TEXT + 1)), f"Grammar.text has {MOST_TEXT + 1} characters; expected at most {MOST_TEXT}"),
    (Grammar(kind="json_schema", text='{"type": '), "EOF while parsing a value at line 1"),
    (Grammar(kind="json_schema", text="3"), "schema must be an object or boolean"),
    (schema({"type": "foo"}), "Invalid type: foo"),
    (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
    (schema({"$ref": "http://example.com/schema"}), "not present"),
    (schema({"$ref": "#"}), "expected a json_schema that can be matched"),
    (schema({"not": {"type": "string"}}), "Unimplemented keys"),
    (Grammar(kind="grammar", text="root ::= ((("), r"Grammar.text 'root ::= \(\(\(': Expected '\)' at line 1"),
    (Grammar(kind="grammar", text="start: other"), "unknown name.*; expected a grammar that can be matched"),
    (Grammar(kind="grammar", text="root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "recursion|takes more than"),
]


@pytest.mark.parametrize(("grammar", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None)
def test_bad_grammars_are_refused_in_one_line(grammars, grammar, message):
    with pytest.raises(ConfigError, match=message) as raised:
        grammars["byte"].matcher(grammar)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600


HOSTILE = {
    "stack": schema(chain(900, lambda link: {"anyOf": [link, {"type": "integer"}]})),
    "time": schema({"type": "object", "properties": {f"k{i}": {} for i in range(4000)}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_grammars_that_take_too_much_are_refused_and_others_go_on(grammars, name, monkeypatch):
    monkeypatch.setattr("orogen.infer.grammar_check.SECONDS", 0.7)
    before = grammars["byte"].matcher(regex("ab"))
    with pytest.raises(ConfigError, match=r"takes more than 0.7 s, 1024 MiB, or 2 MiB of stack to compile"):
        grammars["byte"].matcher(HOSTILE[name])
    assert allowed(before, 259) == [97 + 3]
    monkeypatch.undo()
    assert allowed(grammars["byte"].matcher(regex(f"b{len(name)}")), 259) == [98 + 3]


def test_an_interrupted_question_leaves_no_answer_to_the_next(grammars, monkeypatch):
    check = grammars["byte"]._compiler.check

    def interrupted(process, question, seconds):
        process.stdin.write('["regex", "("]\n')
        process.stdin.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("orogen.infer.grammar_check._asked", interrupted)
        with pytest.raises(KeyboardInterrupt):
            check.check("regex", "a")
    check.check("regex", "abc")


def test_threads_check_one_after_another(grammars):
    failed = []

    def ask(pattern: str, bad: bool) -> None:
        try:
            grammars["byte"]._compiler.check.check("regex", pattern)
            failed.append(bad)
        except ConfigError:
            failed.append(not bad)

    threads = [threading.Thread(target=ask, args=("a(" if i % 2 else "a", bool(i % 2))) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == [False] * 12


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"has no tokenizer.json; expected one, for a grammar"):
        Constraints(None, 300)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llguidance is not installed; .*pip install 'orogen\[serve\]'"):
        Constraints(TOKENIZERS["byte"], 300)


def test_a_server_with_many_connections_still_asks():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[1], 4096), limits[1]))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as echo:
            assert echo.stdout.fileno() > 1024
            assert _asked(echo, '"x"', 5.0) == "x"
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
