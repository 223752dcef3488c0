"""Generated suites: what an example asks can be answered from the example, and it is as long as it can be."""

import re
from collections import Counter

import numpy as np
import pytest

from orogen.config.data import DataConfig
from orogen.config.evaluate import SCORED, WRITTEN, EvaluateConfig
from orogen.data.vocabulary import make_tokenizer
from orogen.evaluate.likelihood import Row, Score
from orogen.evaluate.results import table
from orogen.evaluate.suites import recall, texts
from orogen.evaluate.suites.example import generator
from orogen.evaluate.suites.run import Part, accuracies, drafts_of, rows_of, run_suites, share

BYTES = make_tokenizer(DataConfig(corpus="stdlib", tokenizer="byte"), [])
IDS = np.arange(10, 110)
LONG = {"common_words": 3000}


def config(**changes) -> EvaluateConfig:
    return EvaluateConfig(**{"tasks": ("mqar",), "samples": 4, "seed": 5, **changes})


def made(task: str, length: int | None = None, **changes):
    return drafts_of(Part(task, length or LONG.get(task, 1200)), BYTES, config(tasks=(task,), **changes))


@pytest.mark.parametrize("length", [5, 6, 31, 64, 257])
def test_every_key_has_its_value_when_it_comes_again(length):
    row = recall.mqar(generator(1, "a", length), IDS, start=1, length=length)
    pairs = max(1, length // 16)
    tokens = row.tokens_t.tolist()
    assert len(tokens) == length and tokens[0] == 1 and row.tokens_t.dtype == np.int32
    known = dict(zip(tokens[1 : 1 + 2 * pairs : 2], tokens[2 : 2 + 2 * pairs : 2], strict=True))
    asked = np.flatnonzero(row.asked_t).tolist()
    assert len(known) == len(asked) == pairs and min(asked) > 2 * pairs
    assert {tokens[place - 1] for place in asked} == known.keys()
    assert all(known[tokens[place - 1]] == tokens[place] for place in asked)
    assert max(known) < IDS[50] <= min(tokens[place] for place in asked)
    assert all(Counter(tokens)[key] == 2 for key in known)


def test_queries_are_mostly_near_their_pairs():
    indices = [
        np.flatnonzero(recall.mqar(generator(n), IDS, start=1, length=128).asked_t) for n in range(200)
    ]  # 8 pairs in 16 places; queries at 55 places, of which half the weight is on the first seven
    assert 30 < np.median(np.concatenate(indices)) < 45


def test_induction_and_copying_repeat_what_was_there():
    for length in (5, 6, 50):
        row = recall.induction(generator(2, length), IDS, start=1, length=length)
        tokens = row.tokens_t.tolist()
        first, second = (place for place, token in enumerate(tokens) if token == IDS[0])
        assert (len(tokens), second, row.asked_t.nonzero()[0].tolist()) == (length, length - 2, [length - 1])
        assert tokens[first + 1] == tokens[-1] and 1 <= first < second - 1
    for length, size in ((4, 1), (5, 1), (51, 24)):
        row = recall.copying(generator(2, length), IDS, start=1, length=length)
        tokens = row.tokens_t.tolist()
        assert tokens[1 : 1 + size] == tokens[2 + size :] and tokens[1 + size] == IDS[0] and len(tokens) <= length
        assert row.asked_t.nonzero()[0].tolist() == list(range(2 + size, 2 + 2 * size))


@pytest.mark.parametrize("task", ["phonebook", "phonebook_reversed"])
def test_the_number_of_a_person_is_in_the_book(task):
    for draft in made(task):
        book = dict(re.findall(r"^(\w+ \w+): (\d{3}-\d{3}-\d{4})$", draft.prompt, flags=re.MULTILINE))
        asked = re.findall(r"What is the number of (\w+ \w+)\?", draft.prompt)
        solved = re.findall(r"number of (\w+ \w+)\?\nAnswer: (\S+)", draft.prompt)
        assert len(book) > 10 and len(solved) == 2 and all(book[name] == number for name, number in solved)
        assert draft.answers == (book[asked[-1]],) and asked[-1] not in dict(solved)
        assert (asked[0] == asked[-1]) == (task == "phonebook_reversed") == (not draft.prompt.startswith("Phone book"))


def test_a_needle_is_in_its_haystack_once(tmp_path):
    (tmp_path / "hay.txt").write_text("straw hay grass")
    for hay in (None, str(tmp_path / "hay.txt")):
        drafts = made("needle", haystack=hay)
        depths = set()
        for draft in drafts:
            ((key, value),) = re.findall(r"The secret number of (\w+) is (\d{7})\.", draft.prompt)
            assert draft.answers == (value,) and draft.prompt.count(value) == 1
            assert f"secret number of {key} that" in draft.prompt
            depths.add(draft.prompt.index(value))
        assert len(depths) > 1 and ("straw hay grass straw" in drafts[0].prompt.replace("\n", " ")) == (hay is not None)


def test_variables_that_have_the_value_are_asked_for():
    for draft in made("variable_tracking"):
        values: dict[str, str] = {}
        for name, value in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", draft.prompt, flags=re.MULTILINE):
            values[name] = values.get(value, value)
        (asked,) = re.findall(r"have the value (\d+),", draft.prompt)
        assert set(draft.answers) == {name for name, value in values.items() if value == asked}
        assert len(draft.answers) == 5


def test_common_and_frequent_words_are_those_that_come_most():
    for draft in made("common_words"):
        counts = Counter(re.findall(r"\d+\. (\w+)", draft.prompt))
        most = counts.most_common(11)
        assert set(draft.answers) == {word for word, _ in most[:10]} and most[9][1] > most[10][1]
    assert (
        Counter(Counter(re.findall(r"\d+\. (\w+)", made("common_words", 20_000, samples=1)[0].prompt)).values())[30]
        == 10
    )
    for items in (*range(20, 200), 1000):
        draft = texts.frequent_words(generator(items), items)
        counts = Counter(draft.prompt.splitlines()[2].split()).most_common(5)
        assert counts[0][0] == "..." and tuple(word for word, _ in counts[1:4]) == draft.answers
        assert len({count for _, count in counts}) == 5


def test_a_document_has_the_answer():
    for draft in made("document_qa"):
        ((kind, place),) = re.findall(r"Who built the (\w+) of (\w+)\?", draft.prompt)
        found = re.findall(rf"Document \d+: The {kind} of {place} was built by (\w+) near", draft.prompt)
        assert tuple(found) == draft.answers


@pytest.mark.parametrize("task", ["phonebook", "needle", "document_qa", "variable_tracking"])
def test_examples_are_as_long_as_fits_and_depend_on_nothing_beside_them(task):
    length = 900
    drafts = made(task, length)
    room = lambda d: len(" " + ", ".join(d.answers)) * (2 if task in WRITTEN else 1) + 16 * (task in WRITTEN)  # noqa: E731
    sizes = [1 + len(draft.prompt.encode()) + room(draft) for draft in drafts]
    assert all(length - 110 < size <= length for size in sizes), sizes
    assert made(task, length, samples=2) == drafts[:2] and made(task, length, seed=6) != drafts
    assert drafts[0].prompt != drafts[1].prompt


def test_rows_of_text_ask_for_the_answer():
    part = Part("phonebook", 700)
    for row, draft in zip(rows_of(part, BYTES, config()), drafts_of(part, BYTES, config()), strict=True):
        answer = row.tokens_t[row.asked_t]
        assert BYTES.decode_bytes(answer) == b" " + draft.answers[0].encode()
        assert BYTES.decode_bytes(row.tokens_t).decode() == draft.prompt + " " + draft.answers[0]


class Oracle:
    """A subject that knows every other answer."""

    tokenizer = BYTES

    def __init__(self, config: EvaluateConfig):
        self.config, self.asked = config, []

    def score(self, rows: list[Row]) -> list[Score]:
        return [
            Score(-2.0 * row.asked_t.sum(), int(row.asked_t.sum()) - n % 2, int(row.asked_t.sum()))
            for n, row in enumerate(rows)
        ]

    def write(self, prompts) -> list[str]:
        texts = [BYTES.decode(prompt.ids) for prompt in prompts]
        assert all(len(prompt.ids) + prompt.tokens <= self.config.lengths[-1] for prompt in prompts)
        found = [re.findall(r"^VAR (\w+) =", text, flags=re.MULTILINE) for text in texts]
        return [" ".join(names[: len(names) - n % 2]).lower() for n, names in enumerate(found)]


def test_metrics_are_shares_of_examples_and_of_answers():
    suites = Oracle(config(tasks=("variable_tracking", "induction"), lengths=(600, 900)))
    found = run_suites(suites, suites.config.tasks)
    assert found["induction"] == {
        "accuracy@600": 0.5, "token_accuracy@600": 0.5, "nats@600": 2.0,
        "accuracy@900": 0.5, "token_accuracy@900": 0.5, "nats@900": 2.0,
    }  # fmt: skip
    assert found["variable_tracking"]["recall@900"] == pytest.approx((1 + 0.8) / 2)
    assert found["variable_tracking"]["accuracy@900"] == 0.5
    assert table(found)[1].split() == ["variable_tracking", "recall@600", "0.9000"]
    assert accuracies([Score(-1.0, 2, 2), Score(-5.0, 1, 6)]) == {
        "accuracy": 0.5,
        "token_accuracy": 0.375,
        "nats": 0.75,
    }
    assert share(("Ab", "c"), "xaBx") == 0.5 and share(("a",), "") == 0
    assert set(SCORED).isdisjoint(WRITTEN)
