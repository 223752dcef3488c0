"""Stages that judge one document at a time, each at its borders."""

import pytest
from datatrove.data import Document

from orogen.config.curate import C4Config, ExtractConfig, GopherConfig, LanguageConfig
from orogen.data.curate import rules
from orogen.data.curate.inputs import HTML
from orogen.data.curate.rules import C4, Extract, Gopher, Language, Words
from orogen.data.curate.tally import Tally

ENGLISH = (
    "The people of the town have to be with that river, and the old bridge is what they like to walk over to reach it. "
)
GERMAN = "Der schnelle Fuchs springt über den Hund und freut sich, dass heute die Sonne scheint. "


def judge(rule, text, **metadata):
    document = Document(text, "id", metadata=metadata)
    try:
        return rule(document, Tally(0)), document
    finally:
        rule.close()


def test_words_and_sentences():
    words = Words()
    assert words.word_tokenize("Don't stop-gap; it's… ok?!") == ["Don't", "stop-gap", ";", "it's", "…", "ok", "?!"]
    text = "One. Two?! Three…  four"
    assert words.sent_tokenize(text) == ["One.", "Two?!", "Three…", "four"]
    assert "".join(text[a:b] for a, b in words.span_tokenize(text)) == text
    assert words.span_tokenize("") == []


def test_other_languages_and_uncertain_ones_are_removed():
    rule = Language(LanguageConfig())
    assert judge(rule, ENGLISH)[0] is None
    reason, document = judge(rule, GERMAN)
    assert reason == "language de" and document.metadata["language"] == "de"
    assert judge(Language(LanguageConfig(languages=())), GERMAN)[0] is None
    assert judge(Language(LanguageConfig(languages=(), min_probability=1.0)), "ok 17")[0] == "language uncertain"


def test_gopher_counts_words_without_punctuation():
    text = "the be " + "word " * 47 + "last ... !"
    rule = Gopher(GopherConfig(repetition=False))
    assert judge(rule, text)[0] is None  # 50 words
    assert judge(rule, text.removeprefix("the "))[0] == "short doc"
    assert judge(Gopher(GopherConfig(repetition=False, max_words=49, min_words=1)), text)[0] == "long doc"
    assert judge(rule, text.replace("be ", "x "))[0] == "enough stop words"  # one stop word is left
    assert judge(Gopher(GopherConfig()), text)[0] == "top 2 gram"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the of " + "a " * 60, "below avg threshold"),
        ("the of " + "internationalisation " * 60, "above avg threshold"),
        ("the of word " * 20 + "# " * 10, "too many hashes"),
        ("the of word " * 20 + "12345 " * 30, "below alpha threshold"),
        ("\n".join(f"- the word{i} of long list" for i in range(20)), "too many bullets"),
    ],
)
def test_gopher_names_its_rule(text, reason):
    assert judge(Gopher(GopherConfig(repetition=False)), text)[0] == reason


def test_c4_removes_lines_and_documents():
    line = "This is a good line of text. "
    text = "\n".join([line * 3, "no mark at the end", "Two words.", "Enable javascript to read this page.", line * 2])
    reason, document = judge(C4(C4Config()), text)
    assert reason is None and document.text == (line * 3).strip() + "\n" + (line * 2).strip()
    assert judge(C4(C4Config()), line * 4)[0] == "too few sentences"
    assert judge(C4(C4Config()), line * 5 + "{ x }.")[0] == "curly bracket"
    assert judge(C4(C4Config(curly_brackets=False)), line * 5 + "{ x }.")[0] is None
    assert judge(C4(C4Config(min_sentences=0)), "Two words.")[0] == "no line left"


def test_the_text_of_a_page_is_its_main_content():
    page = "<html><body><nav><a href=/>Home</a></nav><main><p>Hello, this is the text.</p></main></body></html>"
    reason, document = judge(Extract(ExtractConfig()), page, **{HTML: True})
    assert reason is None and document.text == "Hello, this is the text." and HTML not in document.metadata
    assert judge(Extract(ExtractConfig()), page)[1].text == page  # not marked as HTML
    assert judge(Extract(ExtractConfig()), "<html><body></body></html>", **{HTML: True})[0] == "no text"


def test_a_page_that_takes_too_long_or_fails_is_removed(monkeypatch):
    def stuck(page):
        import time

        time.sleep(60 if page == "stuck" else 0)
        return page

    def fails(page, main_content):
        raise KeyError(page, main_content)

    monkeypatch.setattr(rules, "_resiliparse", stuck)
    rule = Extract(ExtractConfig(seconds=0.5))
    document = Document("stuck", "id", metadata={HTML: True})
    assert rule(document, Tally(0)) == "took more than 0.5 seconds"
    assert judge(rule, "goes on", **{HTML: True})[0] is None  # with a new process
    monkeypatch.undo()
    monkeypatch.setattr("resiliparse.extract.html2text.extract_plain_text", fails)
    assert judge(Extract(ExtractConfig()), "x", **{HTML: True})[0] == "the extractor failed: KeyError"


@pytest.mark.peer
def test_trafilatura_takes_the_main_content_too():
    pytest.importorskip("trafilatura", reason="pip install 'orogen[curate]'")
    page = f"<html><body><nav><a href=/>Home</a></nav><article><p>{ENGLISH * 4}</p></article></body></html>"
    reason, document = judge(Extract(ExtractConfig(extractor="trafilatura")), page, **{HTML: True})
    assert reason is None and document.text.strip() == (ENGLISH * 4).strip()
