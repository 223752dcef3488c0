"""When checkpoints are written, and that a run outlives one that cannot be."""

import concurrent.futures
import threading

import jax.numpy as jnp
import pytest
from orbax.checkpoint._src.futures import future
from orbax.checkpoint._src.path import atomicity
from tests.helpers import run_config

from orogen.checkpoint import checksums
from orogen.checkpoint.steps import Checkpoints, NotSavedError
from orogen.model.layout import Whole
from orogen.train import saving
from orogen.train.goodput import Clock
from orogen.train.saving import Saver
from orogen.train.state import TrainState

WHOLE = Whole("", "")


def state(step):
    number = jnp.asarray(step, jnp.int32)
    return TrainState(number, number * 0, number * 0, {"w": jnp.ones(3) * step}, {}, {"m": jnp.zeros(2)})


def saver(checkpoints, *, lines=None, **train):
    log = lines.append if lines is not None else pytest.fail
    return Saver(run_config(**train).train, checkpoints, score="heldout_loss", clock=Clock(), log=log)


def saved(checkpoints):
    checkpoints.wait()
    return sorted(int(path.name) for path in checkpoints.folder.iterdir())


def scored(step, loss):
    return {"step": step, "heldout_loss": loss}


def test_the_best_checkpoint_stays_beside_the_last_ones(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        one = saver(checkpoints, keep_best=True, checkpoint_every=4)
        one.start([])
        seen = []
        for step, loss in ((2, 5.0), (4, 4.0), (6, 4.5), (8, 4.5), (10, float("nan")), (12, 3.0)):
            best = one.is_best(scored(step, loss))
            if best or one.due(step):
                one.save_on_the_way(state(step), {"at": step}, WHOLE, best=best)
            seen.append((best, saved(checkpoints)))
        assert seen == [(True, [2]), (True, [4]), (False, [4]), (False, [4, 8]), (False, [4, 8]), (True, [12])]


def test_a_resumed_run_knows_the_best_checkpoint_that_is_there(tmp_path):
    records = [scored(2, 2.0), scored(4, 4.0), {"step": 5}, scored(6, 3.0), scored(8, 5.0)]
    with Checkpoints(tmp_path) as checkpoints:
        for step in (4, 6, 8):
            checkpoints.save(step, {"model": {"w": jnp.ones(2)}}, {}, WHOLE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        one = saver(checkpoints, keep_best=True)
        one.start(records)
        assert checkpoints.best == 6  # that of step 2 is gone
        assert not one.is_best(scored(9, 3.5)) and one.is_best(scored(10, 2.5))
        one.save(state(11), {}, WHOLE)
        assert saved(checkpoints) == [6, 11]


def test_without_keep_best_no_score_counts(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        one = saver(checkpoints)
        one.start([scored(2, 2.0)])
        assert checkpoints.best is None and not one.is_best(scored(4, 1.0))


def test_minutes_count_from_the_last_checkpoint(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    with Checkpoints(tmp_path) as checkpoints:
        one = saver(checkpoints, checkpoint_minutes=2.5, checkpoint_every=10)
        one.start([])
        due = []
        for now[0], step in ((149.0, 1), (150.0, 2), (299.0, 3), (300.0, 4), (301.0, 10)):
            due.append(one.due(step))
            if due[-1]:
                one.save(state(step), {}, WHOLE)
        assert due == [False, True, False, True, True]
        assert saver(checkpoints, checkpoint_every=10).due(9) is False


def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    def fail(*arguments, **named):
        raise OSError(30, "Read-only file system")

    lines = []
    with Checkpoints(tmp_path) as checkpoints:
        one = saver(checkpoints, lines=lines)
        one.start([])
        one.save_on_the_way(state(1), {}, WHOLE, best=False)
        checkpoints.wait()
        with monkeypatch.context() as patched:
            patched.setattr(checksums, "write", fail)
            one.save_on_the_way(state(2), {}, WHOLE, best=False)  # fails in the background
            with pytest.raises(NotSavedError):
                checkpoints.wait()
            one.save_on_the_way(state(3), {}, WHOLE, best=False)
            concurrent.futures.wait([checkpoints._finishing])
        one.save(state(4), {}, WHOLE)  # finds that the write of step 3 failed
        assert saved(checkpoints) == [1, 4]
        with monkeypatch.context() as patched:
            patched.setattr(checkpoints._writer, "save", fail)
            one.save_on_the_way(state(5), {}, WHOLE, best=False)
            with pytest.raises(NotSavedError, match="checkpoint 6 could not be written"):
                one.save(state(6), {}, WHOLE)
    reason = "Read-only file system; checkpoint {} is the last; training goes on"
    assert lines == [
        f"checkpoint {step} could not be written to {tmp_path / 'checkpoints'}: {reason.format(last)}"
        for step, last in ((3, 1), (5, 4))
    ]


def test_folders_that_cannot_be_made_leave_neither_threads_nor_files(tmp_path, monkeypatch):
    """orbax's own would wait for the folders for minutes, and hold up the end of the process."""

    async def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        one = saver(checkpoints)
        one.start([])
        with monkeypatch.context() as patched, pytest.raises(NotSavedError, match="No space left on device"):
            patched.setattr(atomicity, "_create_paths", full)
            one.save(state(1), {}, WHOLE)
            checkpoints.wait()
        assert not [thread for thread in threading.enumerate() if isinstance(thread, future._SignalingThread)]
        assert list(checkpoints.folder.iterdir()) == []
        one.save(state(2), {}, WHOLE)
        assert saved(checkpoints) == [2]
