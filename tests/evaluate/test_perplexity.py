"""Bits per byte of files, from probabilities computed document by document in float64."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import several_devices
from tests.infer.engines import logits_of, opened

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.engine import EngineConfig
from orogen.config.evaluate import EvaluateConfig
from orogen.config.plan import PlanConfig
from orogen.data.vocabulary import make_tokenizer
from orogen.evaluate.perplexity import measure_text, windows
from orogen.evaluate.subject import Subject

TEXTS = ("", "a", "strata → fold\n" * 2, "Größe ", "x" * 15, "The quick brown fox jumps over it all.")
LENGTH, STRIDE = 16, 5


def subject(plan: PlanConfig | None = None, pattern: str = "M*", **changes) -> Subject:
    tokenizer = make_tokenizer(DataConfig(corpus="stdlib", tokenizer="byte"), [])
    config = EvaluateConfig(**{"tasks": (), "texts": ("",) * 0 or ("x",), "max_length": LENGTH, **changes})
    return Subject(opened(pattern, plan, tokenizer, vocab_size=259), config, EngineConfig())


def nats(model, stream: list[int], first: int) -> float:
    """Of the tokens from place `first` on, each given all before it in `stream`."""
    logits_tv = logits_of(model, [stream], 64)[0, : len(stream)].astype(np.float64)
    logits_tv -= logits_tv.max(-1, keepdims=True)
    likelihood_tv = logits_tv - np.log(np.exp(logits_tv).sum(-1, keepdims=True))
    return -float(sum(likelihood_tv[place - 1, stream[place]] for place in range(first, len(stream))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (made / f"{number}.txt").write_text(text)
    with gzip.open(made / "lines.jsonl.gz", "wt") as lines:
        lines.write(json.dumps({"body": TEXTS[-1]}) + "\n\n" + json.dumps({"body": "→"}) + "\n")
    (made / "notes.md").write_text(TEXTS[3])
    return made


def test_windows_ask_for_every_token_once_with_as_much_before_as_fits():
    rows = windows(np.arange(12), length=5, stride=3)
    assert [row.tokens_t.tolist() for row in rows] == [
        [0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [6, 7, 8, 9, 10], [7, 8, 9, 10, 11],
    ]  # fmt: skip
    assert [row.tokens_t[row.asked_t].tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10], [11]]
    assert windows(np.arange(1), length=5, stride=3) == []
    assert [len(row.tokens_t) for row in windows(np.arange(5), length=5, stride=4)] == [5]
    for stride in (0, 5):
        with pytest.raises(ConfigError, match=f"stride is {stride}; expected 1 to 4"):
            windows(np.arange(9), length=5, stride=stride)


def test_windows_by_hand_and_carried_documents_as_one_pass(folder):
    """A byte is a token, after bos; a window of 16 tokens and a stride of 5 leave at least 11 tokens of context."""
    model = subject(stride=STRIDE)
    by_window = by_document = 0.0
    for text in TEXTS:
        stream = [model.tokenizer.bos_id, *model.tokenizer.encode(text).tolist()]
        by_document += nats(model.opened, stream, 1)
        by_window += nats(model.opened, stream[:LENGTH], 1)
        for done in range(LENGTH, len(stream), STRIDE):
            end = min(done + STRIDE, len(stream))
            by_window += nats(model.opened, stream[max(0, end - LENGTH) : end], done - max(0, end - LENGTH))
    size = sum(len(text.encode()) for text in TEXTS)
    assert abs(by_window - by_document) > 0.1
    for number in range(len(TEXTS)):
        (folder / "only").mkdir(exist_ok=True)
        (folder / "only" / f"{number}.txt").write_text(TEXTS[number])
    found = measure_text(model, str(folder / "only"))
    assert found["bits_per_byte"] == pytest.approx(by_window / math.log(2) / size, rel=1e-6)
    assert (found["bytes"], found["tokens"], found["documents"]) == (size, size, len(TEXTS) - 1)
    assert found["perplexity"] == pytest.approx(math.exp(by_window / size), rel=1e-6)
    carried = measure_text(subject(method="carried"), str(folder / "only"))
    assert carried["bits_per_byte"] == pytest.approx(by_document / math.log(2) / size, rel=1e-6)


@several_devices
def test_a_plan_carries_as_one_device(folder):
    alone = measure_text(subject(method="carried", pattern="M*E"), str(folder / "5.txt"))
    plan = PlanConfig(data=2, tensor=2, expert=2)
    folded = measure_text(subject(plan, pattern="M*E", method="carried"), str(folder / "5.txt"))
    assert folded["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    with pytest.raises(ConfigError, match="PlanConfig.stage is 2; expected 1"):
        measure_text(subject(PlanConfig(stage=2, microbatches=2), method="carried"), str(folder / "5.txt"))


def test_formats_fields_and_ends(folder):
    model = subject(text_field="body")
    found = measure_text(model, str(folder / "lines.jsonl.gz"))
    assert (found["documents"], found["bytes"]) == (2, len(TEXTS[-1]) + 3)
    assert measure_text(model, str(folder / "notes.md"))["bytes"] == len("Größe ".encode())
    stream = [*model.tokenizer.encode("a").tolist(), model.tokenizer.eos_id]
    ended = measure_text(subject(score_ends=True), str(folder / "1.txt"))
    expected = nats(model.opened, [model.tokenizer.bos_id, *stream], 1)
    assert (ended["tokens"], ended["bytes"]) == (2, 1)
    assert ended["bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-6)


def test_what_has_no_text_is_refused(folder, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"a\xff")
    (tmp_path / "empty.md").write_text("")
    for name, message in (("bad.txt", "byte 1 is not UTF-8"), ("empty.md", "has no text; expected some")):
        with pytest.raises(ConfigError, match=message):
            measure_text(subject(), str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        measure_text(subject(), str(tmp_path / "none"))
