"""Pairs of answers: read from the forms that data sets have, rendered, packed and given out in batches."""

import json

import numpy as np
import pytest
from tests.infer.chats import ids_of, tokenizer

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.preference import PreferenceConfig
from orogen.infer.chat import own_template
from orogen.posttrain import chats
from orogen.posttrain.pair_batches import ROW, PairSource, packed, pair_batch
from orogen.posttrain.pairs import open_pairs
from orogen.posttrain.preference import REFERENCE

NANO = own_template("nemotron_3_nano")


@pytest.fixture(autouse=True)
def one_renderer(monkeypatch):
    """Templates are rendered by one process: starting four takes longer than what they do here."""
    monkeypatch.setattr(chats, "RENDERERS", 1)


USER = {"role": "user", "content": "which?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("this one", "no idea at all"))


def pair(number, *, good="yes", bad="no"):
    return {"prompt": f"question {number}", "chosen": f"{good} {number}", "rejected": f"{bad} {number}"}


def write(folder, *records):
    folder.mkdir(exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def opened(folder, *, length=120, heldout=0.0, **fields):
    data = DataConfig(corpus=str(folder), tokenizer="byte", heldout_fraction=heldout, tuning_fraction=0.0)
    return open_pairs(data, PreferenceConfig(template="x", **fields), NANO, tokenizer(), length=length)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": "which?", "chosen": "this one", "rejected": "no idea at all"},
        {"messages": [USER], "chosen": [GOOD], "rejected": [BAD], "tools": None},
        {"prompt": "which?", "messages": [USER, GOOD], "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 3},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"context": [USER], "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}]},
    ],
    ids=["message", "texts", "lists", "with the prompt", "no prompt", "ranks"],
)  # fmt: skip
def test_every_form_of_a_pair_gives_the_same_sequences(tmp_path, record):
    (found,) = opened(write(tmp_path, record)).pairs["train"]
    before = ids_of("<|im_start|>", "system\n", "<|im_end|>", "\n", "<|im_start|>", "user\nwhich?", "<|im_end|>", "\n",
                    "<|im_start|>", "assistant\n", "<think>", "</think>")  # fmt: skip
    for side, text in zip(found, ("this one", "no idea at all"), strict=True):
        answer = ids_of(text, "<|im_end|>")
        assert side.tokens_t.tolist()[: len(before) + len(answer)] == before + answer
        # Learned from where the answer departs from the turn that the model is given, `<think>` and a line end.
        learned = np.flatnonzero(side.weights_t)
        assert set(learned.tolist()) == set(range(len(before) - 1, len(before) + len(answer)))


def test_only_the_answer_is_learned_however_many_turns_there_are(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    result = {"role": "tool", "content": "42"}
    prompt = [USER, {"role": "assistant", "content": "earlier words"}, USER, call, result]
    record = {"prompt": prompt, "chosen": [call, result, GOOD], "rejected": [BAD]}
    (found,) = opened(write(tmp_path, record), length=600).pairs["train"]
    texts = [tokenizer().decode_bytes(side.tokens_t[side.weights_t > 0]) for side in found]
    assert texts[0].count(b"<function=f>") == 1 and b"this one" in texts[0] and b"no idea at all" in texts[1]
    assert not any(b"earlier" in text or b"42" in text or b"which" in text for text in texts)
    assert b"<function=f>" not in texts[1]


def test_arguments_of_calls_are_objects_in_every_form_of_a_pair(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    ranks = [{"rank": 1, "completion": "no"}, {"rank": 0, "completion": call}]
    sides = {"prompt": "which?", "chosen": call, "rejected": "no"}
    one, other = opened(write(tmp_path, sides, {"prompt": "which?", "completions": ranks}), length=600).pairs["train"]
    for side, same in zip(one, other, strict=True):
        np.testing.assert_array_equal(side.tokens_t, same.tokens_t)
    assert b"<function=f>" in tokenizer().decode_bytes(other.chosen.tokens_t)


def test_pairs_that_are_too_long_or_equal_are_counted(tmp_path):
    records = [pair(n) for n in range(6)] + [pair(6, good="x" * 200), pair(7, good="a", bad="a")]
    corpus = opened(write(tmp_path, *records))
    assert corpus.told == (8, 1, 1) and len(corpus.pairs["train"]) == 6
    assert corpus.describe()["dropped"] == 1 and corpus.describe()["documents"]["train"] == 12
    with pytest.raises(ConfigError, match=r"pairs.jsonl:7 has two sequences of \d+ tokens; expected at most"):
        opened(tmp_path, too_long="refuse")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "pairs.jsonl:1: rejected is missing"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt, and chosen and rejected do not begin alike"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "pairs.jsonl:1: chosen[0] is empty; expected content"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "pairs.jsonl:1: rejected: messages is []"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "pairs.jsonl:1: chosen is 3; expected a string or an object"),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "pairs.jsonl:1: prompt: messages is []"),
        ({"prompt": [USER, GOOD], "chosen": "a", "rejected": "b"}, "the prompt ends with the assistant"),
        ({"prompt": "a", "chosen": [GOOD, USER], "rejected": "b"}, "chosen has messages of assistant, user"),
        ({"prompt": "a", "completions": [{"rank": 1, "completion": "b"}] * 2}, "it has 2 completions; expected two of"),
        ({"prompt": "a", "completions": 3}, "completions is 3; expected a list"),
        ({"prompt": "a", "completions": [3]}, "completions[0] is 3; expected an object"),
        ({"prompt": "a", "completions": [{"rank": "1", "completion": "b"}]}, "completions[0].rank is '1'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"type": "function"}]}, "tools[0].function"),
    ],
)
def test_a_malformed_pair_is_named(tmp_path, record, message):
    with pytest.raises(ConfigError) as caught:
        opened(write(tmp_path, record))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def documents(batch):
    """The token ids of each row's documents."""
    return [
        [tuple(tokens[segments == n]) for n in range(1, segments.max() + 1)]
        for tokens, segments in zip(batch.tokens_bt, batch.segments_bt, strict=True)
    ]


def test_both_answers_of_a_pair_are_neighbours_and_an_epoch_has_each_pair_once(tmp_path):
    pairs = opened(write(tmp_path, *(pair(n, good="y" * (n % 5)) for n in range(11)))).pairs["train"]
    references = np.arange(22, dtype=np.float32).reshape(11, 2) - 50
    known = {(tuple(p.chosen.tokens_t), tuple(p.rejected.tokens_t)): n for n, p in enumerate(pairs)}
    seen = []
    rows = packed(pairs, length=120)
    for start in range(0, len(rows), 2):
        batch = pair_batch(rows[start : start + 2], pairs, references, size=2, length=120, pad_id=0)
        assert batch.tokens_bt.shape == (2, 120) and batch.extras[ROW].tolist() == [[0] * 120, [1] * 120]
        for row, found in enumerate(documents(batch)):
            numbers = [known[tuple(found[n : n + 2])] for n in range(0, len(found), 2)]
            seen += numbers
            # The reference is at the first token of each document, and nowhere else.
            firsts = np.flatnonzero((batch.positions_bt[row] == 0) & (batch.segments_bt[row] > 0))
            assert batch.extras[REFERENCE][row, firsts].tolist() == references[numbers].ravel().tolist()
            assert np.count_nonzero(batch.extras[REFERENCE][row]) == len(firsts)
            assert not batch.weights_bt[row, firsts].any()
    assert sorted(seen) == list(range(11))


def source(pairs, *, seed=1, size=3, **identity):
    return PairSource(pairs, None, size=size, length=120, pad_id=0, seed=seed, identity=identity)


def test_batches_go_on_to_the_bit_in_another_order_each_epoch(tmp_path):
    pairs = opened(write(tmp_path, *(pair(n) for n in range(9)))).pairs["train"]
    whole, again = source(pairs), source(pairs)
    taken = []
    for _ in range(7):
        taken.append(whole.take(None))
    position = json.loads(json.dumps(whole.state()))
    again.restore(position)
    assert position["position"]["epoch"] > 0
    for _ in range(5):
        one, other = whole.take(None), again.take(None)
        for a, b in zip(one[:4], other[:4], strict=True):
            np.testing.assert_array_equal(a, b)
    rows = [row for batch in taken for row in documents(batch)]
    each, left = divmod(len(rows) - position["position"]["row"], position["position"]["epoch"])
    first, second = (sum(rows[start : start + each], []) for start in (0, each))
    assert not left and len(first) == 18 and sorted(first) == sorted(second) and first != second
    with pytest.raises(ConfigError, match="has corpus = None; expected 'other'"):
        source(pairs, corpus="other").restore(position)
    with pytest.raises(ConfigError, match="expected an epoch and a row"):
        source(pairs).restore({**position, "position": {"epoch": -1, "row": 0}})
    with pytest.raises(ConfigError, match="there is no pair"):
        source([])
