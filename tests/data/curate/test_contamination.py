"""Evaluation text is found word by word and cut out with MT-NLG's margins, worked out by hand."""

import pytest

from orogen.config.curate import DecontaminateConfig
from orogen.data.curate.contamination import Hit, Index, ngrams_of, split

CONFIG = DecontaminateConfig(evaluation=("unused",))
THIRTEEN = [f"w{i}" for i in range(13)]


def test_ngrams_slide_over_long_texts_and_short_ones_are_whole():
    assert ngrams_of([" ".join([*THIRTEEN, "End."])], CONFIG) == [
        " ".join(THIRTEEN),
        " ".join([*THIRTEEN[1:], "end"]),
    ]
    assert ngrams_of(["A, b c d e f g H!"], CONFIG) == ["a b c d e f g h"]  # eight words
    assert ngrams_of(["a b c d e f g"], CONFIG) == []  # seven


def test_a_match_ignores_case_and_punctuation_and_knows_its_place():
    index = Index(ngrams_of([" ".join(THIRTEEN), "one two three four five six seven eight"], CONFIG))
    text = "Before: " + ", ".join(THIRTEEN).upper() + "! After"
    (hit,) = index.hits(text)
    assert text[hit.start : hit.end] == ", ".join(THIRTEEN).upper()
    assert [h.ngram for h in index.hits("One two three, four: five six seven EIGHT nine")] == [
        "one two three four five six seven eight"
    ]
    assert index.hits(" ".join(THIRTEEN[:12])) == [] and index.hits("") == []


def test_places_are_right_behind_letters_that_lower_case_lengthens():
    text = "İİİ " + " ".join(THIRTEEN)  # lower case has two characters for each İ
    (hit,) = Index([" ".join(THIRTEEN)]).hits(text)
    assert hit.start == 4 and hit.end == len(text)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        # The mark at 199 is 201 characters before the hit at 400: it ends the first piece, of 200 characters.
        ("a" * 199 + "." + "b" * 200, [(0, 200)]),
        # One character nearer, it lies within the margin: there is no end of a sentence before it.
        ("a" * 200 + "." + "b" * 199, [(0, 201)]),
        ("a" * 201 + "." + "b" * 198, []),
        # The piece before it has 199 characters: too short.
        ("a" * 198 + "." + "b" * 201, []),
    ],
)
def test_the_piece_before_ends_with_the_sentence_before_the_margin(before, expected):
    text = before + "HIT"
    assert split(text, [Hit(400, 403, "hit")], CONFIG).pieces == expected


def test_the_piece_after_starts_with_the_sentence_after_the_margin():
    text = "HIT" + "a" * 199 + "." + "b" * 50 + "?" + "c" * 200  # the full stop is character 200 behind the hit: within
    assert split(text, [Hit(0, 3, "hit")], CONFIG).pieces == [(254, 454)]
    text = "HIT" + "a" * 200 + "." + "c" * 200  # character 201: the first behind the margin
    assert split(text, [Hit(0, 3, "hit")], CONFIG).pieces == [(204, 404)]
    assert split(text[:-1], [Hit(0, 3, "hit")], CONFIG).pieces == []  # 199 characters


def test_hits_within_what_is_removed_are_no_further_splits():
    config = DecontaminateConfig(evaluation=("unused",), margin=2, min_characters=0)
    text = "aaaa. xxHITxx. bbb HIT c. dddd"
    #       0123456789...
    hits = [Hit(8, 11, "hit"), Hit(9, 12, "hit"), Hit(19, 22, "hit")]
    found = split(text, hits, config)
    assert [text[a:b] for a, b in found.pieces] == ["aaaa.", " dddd"]
    assert found.splits == 2


def test_splits_are_counted_up_to_the_limit():
    """Eleven hits far apart make eleven splits; the stage removes documents with more than ten."""
    part = "x" * 300 + ". HIT " + "y" * 300 + "."
    text = part * 11
    hits = [Hit(i * len(part) + 302, i * len(part) + 305, "hit") for i in range(11)]
    assert split(text, hits, CONFIG).splits == 11
    assert split(text, hits[:10], CONFIG).splits == 10
