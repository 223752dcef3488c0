"""A teacher's log-probabilities on disk: every target has those of its place, whatever the order; stops and refusals.

The teacher is a formula of each token and the one before it in its piece.
"""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tests.helpers import RUN

from orogen.config.checks import ConfigError
from orogen.config.files import write_atomically
from orogen.config.load import load
from orogen.config.phases import PhaseConfig
from orogen.posttrain import stored_logits
from orogen.posttrain.stored_logits import StoredLogits, write_logits
from orogen.posttrain.teacher import IDS, LOG
from orogen.train.pretraining import PRETRAINING, train_loader

TOP = "DistillConfig.divergence = 1.0\nDistillConfig.top_k = 3\n"


def said(batch):
    """ids and log-probabilities (b, t, 3) of the formula."""
    before_bt = np.where(batch.positions_bt > 0, np.roll(batch.tokens_bt, 1, axis=1), 0)
    ids = (batch.tokens_bt[..., None] * 3 + before_bt[..., None] * 5 + np.arange(3)) % 259
    return {IDS: ids.astype(np.int32), LOG: -np.sqrt(1 + ids).astype(np.float32)}


def teacher_that_stops_after(batches):
    def extras(batch):
        nonlocal batches
        batches -= 1
        if batches < 0:
            raise KeyboardInterrupt
        return said(batch)

    return SimpleNamespace(fingerprint="a formula", extras=extras)


@pytest.fixture
def opened(tmp_path):
    """A run of documents that are shorter and longer than a row, and its corpus."""
    (tmp_path / "corpus").mkdir()
    for number in range(12):
        (tmp_path / "corpus" / f"{number}.txt").write_text("".join(map(str, range(number, 7 * number + 3))))
    (tmp_path / "run.gin").write_text(RUN.format(corpus=str(tmp_path / "corpus")) + TOP)
    config, _ = load([tmp_path / "run.gin"])
    return config, PRETRAINING.open(config, None)


def write(opened, out, teacher):
    return write_logits(teacher, *opened, out, log=lambda line: None)


def test_every_target_has_what_the_teacher_said_there(opened, tmp_path):
    config, corpus = opened
    write(opened, tmp_path / "logits", teacher_that_stops_after(1000))
    stored = StoredLogits(tmp_path / "logits", config, corpus)
    loader, targets = train_loader(config, stored.numbered(corpus)), 0
    assert max(len(stream.tokens_t) for stream in corpus.splits["train"]) > 2 * config.train.sequence_length
    for _ in range(12):  # more than an epoch, shuffled
        batch = next(loader)
        added = stored.add(batch)
        inside = np.roll(batch.weights_bt > 0, -1, axis=1)
        assert set(added.extras) == {IDS, LOG} and added.extras[IDS].shape == (*batch.tokens_bt.shape, 3)
        np.testing.assert_array_equal(added.extras[IDS][inside], said(batch)[IDS][inside])
        np.testing.assert_array_equal(added.extras[LOG][inside], said(batch)[LOG][inside].astype(np.float16))
        targets += inside.sum()
    assert targets > 400


def test_a_pass_that_was_stopped_goes_on(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(stored_logits, "FLUSHED", 2)
    whole = write(opened, tmp_path / "whole", teacher_that_stops_after(1000))
    with pytest.raises(KeyboardInterrupt):
        write(opened, tmp_path / "parts", teacher_that_stops_after(5))
    assert not (tmp_path / "parts").exists()
    other = SimpleNamespace(fingerprint="another", extras=said)
    with pytest.raises(ConfigError, match="begun with another teacher or other data"):
        write(opened, tmp_path / "parts", other)
    seen = []
    counting = SimpleNamespace(fingerprint="a formula", extras=lambda batch: seen.append(1) or said(batch))
    assert write(opened, tmp_path / "parts", counting) == whole
    first = SimpleNamespace(fingerprint="a formula", extras=lambda batch: seen.append(-1) or said(batch))
    write(opened, tmp_path / "again", first)
    assert sum(seen) == -4  # those of the first call were kept
    for name in ("ids.npy", "log.npy", "starts.npy", "manifest.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ConfigError, match="exists; expected a new one"):
        write(opened, tmp_path / "parts", counting)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (4, 3)])
def test_a_pass_goes_on_with_another_batch_size(opened, tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(stored_logits, "FLUSHED", 2)
    seen = []
    counting = SimpleNamespace(fingerprint="a formula", extras=lambda batch: seen.append(batch) or said(batch))
    sequences = lambda: int(sum((batch.segments_bt != 0).any(1).sum() for batch in seen))  # noqa: E731
    write(opened, tmp_path / "whole", counting)
    every = sequences()
    first, second = (load([tmp_path / "run.gin"], [f"TrainConfig.batch_size = {size}"])[0] for size in sizes)
    with pytest.raises(KeyboardInterrupt):
        write((first, opened[1]), tmp_path / "parts", teacher_that_stops_after(5))
    seen.clear()
    write((second, opened[1]), tmp_path / "parts", counting)
    assert 0 < sequences() < every - 4 * sizes[0] + sizes[1]  # what was kept, but for a batch that it ends within
    for name in ("ids.npy", "log.npy", "starts.npy", "manifest.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("at", ["manifest", "rename"])
def test_a_pass_that_is_stopped_at_its_end_keeps_all_of_it(opened, tmp_path, monkeypatch, at):
    def stop(*arguments):
        raise KeyboardInterrupt

    def write_but_the_manifest(path, content):
        return stop() if path.name == stored_logits.MANIFEST else write_atomically(path, content)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if at == "manifest":
            patched.setattr(stored_logits, "write_atomically", write_but_the_manifest)
        else:
            patched.setattr(type(tmp_path), "rename", stop)
        write(opened, tmp_path / "logits", teacher_that_stops_after(1000))
    write(opened, tmp_path / "logits", teacher_that_stops_after(0))  # it is not asked again
    assert StoredLogits(tmp_path / "logits", *opened).teacher == "a formula"
    names = {"ids.npy", "log.npy", "starts.npy", "manifest.json"}
    assert {path.name for path in (tmp_path / "logits").iterdir()} == names


def test_phases_with_sequences_of_another_length_are_refused(opened, tmp_path):
    """Their pieces of a document begin elsewhere, so the teacher would have seen other tokens."""
    write(opened, tmp_path / "logits", teacher_that_stops_after(1000))
    longer = dataclasses.replace(opened[0].train, steps=4, phases=(PhaseConfig(after=2, sequence_length=48),))
    config = dataclasses.replace(opened[0], train=longer)
    with pytest.raises(ConfigError, match="a phase has sequence_length = 48; expected 24, that of the logits in"):
        StoredLogits(tmp_path / "logits", config, opened[1])
    with pytest.raises(ConfigError, match="a phase has sequence_length = 48; expected 24, that of all steps"):
        write((config, opened[1]), tmp_path / "more", teacher_that_stops_after(1000))
    assert not (tmp_path / "more.partial").exists()


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["TrainConfig.sequence_length = 20"], "sequence_length = 24; expected 20, that of this run"),
        (["DistillConfig.top_k = 4"], "top_k is 4; expected at most 3, as many as are stored"),
        (["DataConfig.heldout_fraction = 0.5"], "have documents = .*; expected .*, that of this run"),
        (["DataConfig.seed = 1"], "have documents = .*; expected .*, that of this run"),
    ],
)
def test_logits_of_other_data_are_refused(opened, tmp_path, bindings, message):
    write(opened, tmp_path / "logits", teacher_that_stops_after(1000))
    config, _ = load([tmp_path / "run.gin"], bindings)
    with pytest.raises(ConfigError, match=message):
        StoredLogits(tmp_path / "logits", config, PRETRAINING.open(config, None))


def test_a_damaged_folder_is_refused(opened, tmp_path):
    write(opened, tmp_path / "logits", teacher_that_stops_after(1000))
    with pytest.raises(ConfigError, match="expected a folder of --write_logits"):
        StoredLogits(tmp_path, *opened)
    ids = tmp_path / "logits" / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:200])
    with pytest.raises(ConfigError, match="expected an array that --write_logits wrote"):
        StoredLogits(tmp_path / "logits", *opened)
    manifest = json.loads((tmp_path / "logits" / "manifest.json").read_text())
    (tmp_path / "logits" / "manifest.json").write_text(json.dumps({**manifest, "corpus": "other"}))
    with pytest.raises(ConfigError, match="have corpus = 'other'"):
        StoredLogits(tmp_path / "logits", *opened)
