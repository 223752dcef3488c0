"""Blends and phases: shares counted by hand, each document as often as it should be, positions to the bit."""

import collections
import dataclasses
import itertools
import json

import numpy as np
import pytest

from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig, SourceConfig
from orogen.config.phases import PhaseConfig, stretches
from orogen.data.batches import make_blend
from orogen.data.blend import at_step, measures
from orogen.data.loader import open_corpus

# Every text of a source is written in its own letter, so that each token of a row says where it comes from.
LETTERS = {"a": "a", "b": "b", "c": "c"}
COUNTS = {"a": 90, "b": 40, "c": 25}
PHASES = (
    PhaseConfig(after=31, weights={"a": 0.1, "b": 0.3, "c": 0.6}),
    PhaseConfig(after=54, sequence_length=48, batch_size=4),
    PhaseConfig(after=80, weights={"b": 2.0}),
)
RUN = {"steps": 400, "batch_size": 6, "sequence_length": 24, "ramp": (2, 2, 40)}
SMALL = {"window_tokens": 1}  # windows of 64 rows


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for name, count in COUNTS.items():
        lines = [json.dumps({"text": name * int(90 * rng.random() ** 2 + 1)}) for _ in range(count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    weights = {"a": 0.55, "b": 0.4, "c": 0.05}
    sources = tuple(SourceConfig(name=n, corpus=str(root / f"{n}.jsonl"), weight=w) for n, w in weights.items())
    return DataConfig(sources=sources, tokenizer="byte", heldout_fraction=0.2, tuning_fraction=0.0)


@pytest.fixture(scope="module")
def corpus(config):
    return open_corpus(config)


def asked(config, phases=PHASES, **changes):
    return stretches(**{**RUN, **changes}, phases=phases, weights={s.name: s.weight for s in config.sources})


def take(loader, count):
    return list(itertools.islice(loader, count))


def same(one, other):
    return all(np.array_equal(x, y) for x, y in zip(one[:4], other[:4], strict=True))


def seen(batch):
    """Tokens of each source, bos and eos of its documents included: rows hold one source each."""
    found = collections.Counter()
    for tokens_t, segments_t in zip(batch.tokens_bt, batch.segments_bt, strict=True):
        letters = {chr(t - 3) for t in tokens_t[tokens_t > 2].tolist()} or {None}
        assert len(letters) == 1
        found[letters.pop()] += int((segments_t > 0).sum())
    return found


def test_shares_are_within_two_rows_at_every_step_of_every_phase(config, corpus):
    loader, counts, before = corpus.blend_loader(asked(config)), collections.Counter(), None
    plan = asked(config)
    for step in range(400):
        batch = next(loader)
        now = [one for one in plan if one.after <= step][-1]
        assert batch.tokens_bt.shape == (now.batch_size, now.sequence_length)
        if before is not None and now.phase != before:
            counts.clear()
        before = now.phase
        counts += seen(batch)
        total = sum(counts.values())
        for name, weight in now.weights.items():
            assert abs(counts[name] - weight * total) <= 2 * now.sequence_length
        told = measures(loader.state())
        assert told["phase"] == now.phase
        assert {n: told[f"share/{n}"] for n in COUNTS} == {n: counts[n] / total for n in COUNTS}
    assert now.phase == 3 and counts["b"] == total


def test_shares_are_within_a_thousandth_after_a_thousand_rows(config, corpus):
    loader = corpus.blend_loader(asked(config, phases=(), ramp=None))
    counts = sum((seen(batch) for batch in take(loader, 300)), collections.Counter())
    for name, weight in {"a": 0.55, "b": 0.4, "c": 0.05}.items():
        assert counts[name] / sum(counts.values()) == pytest.approx(weight, abs=1e-3)


@pytest.fixture(scope="module")
def whole(config, corpus):
    """150 batches across all phases, and the position before each."""
    loader, positions, batches = corpus.blend_loader(asked(config)), [], []
    for _ in range(150):
        positions.append(json.loads(json.dumps(loader.state())))
        batches.append(next(loader))
    return batches, positions


@pytest.mark.parametrize("step", [0, 1, 9, 30, 31, 32, 53, 54, 55, 79, 80, 81, 120])
def test_a_restored_loader_goes_on_to_the_bit(config, whole, step):
    batches, positions = whole
    loader = open_corpus(config).blend_loader(asked(config))
    take(loader, 3)
    loader.restore(positions[step])
    for number, batch in enumerate(take(loader, 27), step):
        assert same(batch, batches[number])
    assert loader.state() == positions[step + 27]


@pytest.mark.parametrize("step", [10, 31, 54, 60, 80, 100])
def test_another_number_of_processes_goes_on_with_the_same_rows(config, corpus, whole, step):
    batches, positions = whole
    parts = []
    for index in range(2):
        loader = corpus.blend_loader(asked(config), process_index=index, process_count=2)
        loader.restore(positions[step])
        parts.append(take(loader, 20))
        assert loader.state() == positions[step + 20]
    for number, (one, other) in enumerate(zip(*parts, strict=True), step):
        joined = [np.concatenate(pair) for pair in zip(one[:4], other[:4], strict=True)]
        assert same(joined, batches[number])


def test_a_roll_back_moves_the_data_and_not_the_phases(config, corpus, whole):
    """Back from step 60 to step 50: the data goes on, and the longer sequences still begin after step 54."""
    _, positions = whole
    loader = corpus.blend_loader(asked(config))
    loader.restore(at_step(positions[60], 50))
    lengths = [batch.tokens_bt.shape[1] for batch in take(loader, 8)]
    assert lengths == [24] * 4 + [48] * 4
    assert at_step({"position": {"next_index": 3}}, 7) == {"position": {"next_index": 3}} and at_step(None, 7) is None


def test_every_document_is_seen_once_an_epoch_and_no_more_often_than_the_cap(config):
    """b may be read 1.5 times and c twice; a gives the rest."""
    caps = {"a": None, "b": 1.5, "c": 2.0}
    sources = tuple(dataclasses.replace(s, max_epochs=caps[s.name], weight=1.0) for s in config.sources)
    corpus = open_corpus(dataclasses.replace(config, sources=sources))
    loader = corpus.blend_loader(asked(config, phases=(), ramp=None))
    counts = sum((seen(batch) for batch in take(loader, 300)), collections.Counter())
    for name, epochs in (("b", 1.5), ("c", 2.0)):
        documents = corpus.sources[name].splits["train"]
        length = sum(len(stream.tokens_t) for stream in documents)
        limit = round(epochs * len(documents))
        told = measures(loader.state())
        assert told[f"epochs/{name}"] == limit / len(documents)
        # A document longer than a row has one more token for each further piece.
        assert epochs == 1.5 or length * epochs <= counts[name] <= length * epochs * 24 / 23
    assert measures(loader.state())["share/a"] == 1.0 and counts["a"] > counts["b"] > 0


def test_a_run_that_has_used_everything_up_says_so(config):
    sources = tuple(dataclasses.replace(s, max_epochs=0.5) for s in config.sources)
    loader = open_corpus(dataclasses.replace(config, sources=sources)).blend_loader(asked(config))
    with pytest.raises(ConfigError, match=r"finds no more documents in \['a', 'b', 'c'\]; expected SourceConfig.max"):
        take(loader, 400)


def test_one_source_with_phases_begins_with_the_batches_of_a_run_without(config):
    alone = dataclasses.replace(config, corpus=config.sources[0].corpus, sources=())
    corpus = open_corpus(alone)
    plan = stretches(**{**RUN, "ramp": None}, phases=(PhaseConfig(after=9, sequence_length=30),), weights={})
    blended = take(corpus.blend_loader(plan, shuffle_seed=4), 12)
    plain = take(corpus.train_loader(batch_size=6, sequence_length=24, shuffle_seed=4), 9)
    assert all(same(one, other) for one, other in zip(blended, plain, strict=False))
    assert {batch.tokens_bt.shape for batch in blended[9:]} == {(6, 30)}


def test_documents_are_shuffled_as_a_whole(tmp_path):
    """The first documents of an epoch come from everywhere, not from the first window."""
    text = "\n".join(json.dumps({"text": f"{number} "}) for number in range(4000))
    (tmp_path / "x.jsonl").write_text(text)
    config = DataConfig(corpus=str(tmp_path / "x.jsonl"), tokenizer="byte", heldout_fraction=0.0, tuning_fraction=0.0)
    corpus = open_corpus(config)
    plan = stretches(**{**RUN, "ramp": None}, phases=(), weights={"corpus": 1.0})
    loader = make_blend(
        {"corpus": corpus.splits["train"]}, plan, pad_id=0, shuffle_seed=1, max_epochs={}, window_tokens=1
    )  # fmt: skip
    rows = np.concatenate([batch.tokens_bt for batch in take(loader, 10)])
    numbers = np.array([int(n) for row in rows for n in bytes((row[row > 2] - 3).tolist()).decode().split()])
    assert len(numbers) > 150 and np.histogram(numbers, bins=4, range=(0, 4000))[0].min() > len(numbers) / 6


def test_a_position_of_another_blend_is_refused(config, whole):
    _, positions = whole
    for change in ({"sources": config.sources[:2]}, {"sources": config.sources[::-1]}, {"seed": 7}):
        other = dataclasses.replace(config, **change)
        loader = open_corpus(other).blend_loader(asked(other, phases=()))
        with pytest.raises(ConfigError, match="the saved data position"):
            loader.restore(positions[20])


def test_a_blend_describes_its_sources_and_scores_each(config, corpus):
    facts = corpus.describe()
    assert {
        name: one["documents"]["train"] + one["documents"]["heldout"] for name, one in facts["sources"].items()
    } == COUNTS
    assert facts["documents"]["train"] == sum(one["documents"]["train"] for one in facts["sources"].values())
    heldout = [corpus.heldout_batches("heldout", batch_size=2, sequence_length=24, source=name) for name in COUNTS]
    for name, one in zip(COUNTS, heldout, strict=True):
        assert set(sum((seen(batch) for batch in one), collections.Counter()) - collections.Counter({None: 10**6})) == {
            name
        }
    together = corpus.heldout_batches("heldout", batch_size=2, sequence_length=24)
    assert together.byte_count == sum(one.byte_count for one in heldout)
    assert json.loads(json.dumps(facts)) == facts
