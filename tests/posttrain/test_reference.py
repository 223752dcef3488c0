"""The reference's log-probabilities in their files: written by parts, continued, and told from another model's."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, several_devices

from orogen.config.checks import ConfigError
from orogen.cost.assemble import assemble
from orogen.data.packing import Stream
from orogen.model.lm import initial_state
from orogen.parallel import placement
from orogen.posttrain import reference
from orogen.posttrain.documents import answer_log_probs
from orogen.posttrain.pairs import Pair
from orogen.posttrain.reference import DocumentNumbers, Reference

FIRST, LATER = SimpleNamespace(step=0), SimpleNamespace(step=3)


class Numbers:
    """Pair n has the numbers (n + model, n - model); records which pairs it computed."""

    def __init__(self, model=0.5, dies_after=None):
        self.model, self.dies_after, self.computed = model, dies_after, []

    def __call__(self, state, pairs, progress, *, batches=None):
        if batches is None:
            if self.dies_after is not None and len(self.computed) >= self.dies_after:
                raise KeyboardInterrupt
            self.computed.append(tuple(pairs))
        found = np.array([[n + self.model, n - self.model] for n in pairs], np.float32)
        if batches is not None:
            found[2:] = np.nan
        progress()
        return found


@pytest.fixture
def open_reference(tmp_path, monkeypatch):
    """Opens the references of 8 pairs of training and 2 held-out ones, in files of 3 pairs. None reads those of the
    tuning split, which are not computed."""
    monkeypatch.setattr(reference, "PART", 3)
    pairs = {"train": range(8), "heldout": range(100, 102), "tuning": range(7)}
    corpus = SimpleNamespace(pairs=pairs, content_hash="0123456789abcdef99")
    return lambda numbers: Reference(tmp_path, corpus, numbers, log=lambda line: None)


def quiet():
    pass


def test_parts_are_written_as_they_are_done_and_a_killed_run_goes_on_behind_the_last(open_reference, tmp_path):
    killed = Numbers(dies_after=2)
    with pytest.raises(KeyboardInterrupt):
        open_reference(killed).of("train", FIRST, quiet)
    folder = tmp_path / "reference" / "0123456789abcdef"
    assert sorted(file.name for file in folder.iterdir()) == ["train-00000.npy", "train-00001.npy"]
    numbers, calls = Numbers(), []
    found = open_reference(numbers).of("train", FIRST, lambda: calls.append(1))
    assert numbers.computed == [(6, 7), (100, 101)] and calls
    np.testing.assert_array_equal(found, [[n + 0.5, n - 0.5] for n in range(8)])
    # A later step reads the files; no state could give these numbers any more.
    silent = Numbers()
    opened = open_reference(silent)
    np.testing.assert_array_equal(opened.of("heldout", LATER, quiet), [[100.5, 99.5], [101.5, 100.5]])
    np.testing.assert_array_equal(opened.of("train", LATER, quiet), found)
    assert silent.computed == []


def test_a_run_that_starts_over_from_another_model_computes_all_of_a_split_again(open_reference):
    open_reference(Numbers()).of("train", FIRST, quiet)
    other = Numbers(model=0.25)
    found = open_reference(other).of("train", FIRST, quiet)
    assert other.computed == [(0, 1, 2), (3, 4, 5), (6, 7), (100, 101)]
    np.testing.assert_array_equal(found, [[n + 0.25, n - 0.25] for n in range(8)])


@pytest.mark.parametrize("content", [None, b"", b"no array", b"\x93NUMPY\x01\x00v\x00"])
def test_a_missing_or_broken_file_is_computed_again_at_first_and_refused_later(open_reference, tmp_path, content):
    whole = open_reference(Numbers()).of("train", FIRST, quiet)
    file = tmp_path / "reference" / "0123456789abcdef" / "train-00001.npy"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="train-00001.npy is missing or broken, and the run has left the model"):
        open_reference(Numbers()).of("train", LATER, quiet)
    numbers = Numbers()
    np.testing.assert_array_equal(open_reference(numbers).of("train", FIRST, quiet), whole)
    assert numbers.computed == [(3, 4, 5)]


def answers(rng, size):
    weights_t = (np.arange(size) >= size // 2).astype(np.float32)
    return Stream(rng.integers(0, 96, size).astype(np.int32), weights_t)


@several_devices
@pytest.mark.parametrize(
    "split",
    [
        {"data": 2, "context": 2, "tensor": 2, "microbatches": 2, "fsdp": "parameters"},
        {"stage": 2, "context": 2, "microbatches": 2, "shift": "alltoall"},
    ],
    ids=["data, context, tensor", "stages, context"],
)
def test_numbers_of_answers_under_a_plan_equal_those_of_one_device(split):
    """Ranks of tensor and context share a row, whose numbers must count once."""
    rng, model = np.random.default_rng(0), hybrid(pattern="-|-", mtp_depths=0)
    pairs = [Pair(*(answers(rng, int(size)) for size in rng.integers(4, 20, 2))) for _ in range(11)]
    start = jax.device_get(initial_state(model, 3))

    def numbers(**plan):
        config = run_config(model, plan=plan, sequence_length=48)
        laid, built = assemble(model, config.plan, length=48)
        there = placement.shardings((built.params, built.buffers), laid)
        params, buffers = jax.device_put(tuple(built.laid(part) for part in start), there)
        state, calls = SimpleNamespace(params=params, buffers=buffers), []
        return DocumentNumbers(config, built, answer_log_probs, pad_id=0)(state, pairs, lambda: calls.append(1))

    alone = numbers()
    assert np.all(alone < -1)
    np.testing.assert_allclose(numbers(**split), alone, rtol=1e-5)
