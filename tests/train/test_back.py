"""Bad steps: the run goes back past their data, and a run that is killed on the way ends with the same bits.

The batches named by BAD make the loss of whatever step takes them not finite, or many times larger.
"""

import dataclasses
import re
import signal
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tests.train.kills import TIMED, write_recipe

from orogen.checkpoint import checksums
from orogen.config.load import load
from orogen.report.lost import read_lost
from orogen.report.metrics import MetricsWriter, read_metrics
from orogen.train import programs
from orogen.train.back import Back, FaultyHardwareError
from orogen.train.goodput import Clock
from orogen.train.health import NonFiniteError
from orogen.train.loop import Loop
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.pretraining import PRETRAINING, batches_until
from orogen.train.run import train

STEPS = 10
FIELDS = ("TrainConfig.steps=10", "TrainConfig.checkpoint_every=3")
AFTER_TWO = (*FIELDS, "TrainConfig.roll_back_after=2")


class Killed(BaseException):
    """Ends a run where it stands, as SIGKILL does to what is on disk."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """Without held-out text, so that no evaluation is compiled."""
    file = write_recipe(tmp_path_factory.mktemp("recipe"))
    text = re.sub(r"^TrainConfig.evaluate_.*\n", "", file.read_text(), flags=re.MULTILINE)
    file.write_text(text.replace("heldout_fraction = 0.2", "heldout_fraction = 0.0"))
    return file


@pytest.fixture(autouse=True, scope="module")
def steps_are_compiled_once():
    """Every run of one objective shares its step."""
    with pytest.MonkeyPatch.context() as patched:
        honest, made = programs.make_step, {}

        def make(built, objective, *arguments, **named):
            if objective not in made:
                made[objective] = honest(built, objective, *arguments, **named)
            return made[objective]

        patched.setattr(programs, "make_step", make)
        yield


def number_of(batch):
    rows, length = batch.tokens_bt.shape
    return (batch.tokens_bt * (1 + np.arange(rows * length, dtype=np.int32).reshape(rows, length))).sum()


@pytest.fixture(scope="module")
def numbers(recipe) -> list[int]:
    """By batch from 0, a number that tells it from the others."""
    config, _ = load([recipe])
    found = [int(number_of(b)) for b in batches_until(config, PRETRAINING.open(config, None), 20)]
    assert len(set(found)) == len(found)
    return found


def _poisoned(model, hidden, batch, plan):
    """The sums of the next token, times the factor with which a bad batch is marked: the weight, negated, of its first
    token, which nothing predicts."""
    mark = -batch.weights_bt[0, 0]
    times = jnp.where(mark > 0, mark, 1.0)
    return {name: times * x for name, x in NEXT_TOKENS.sums(model, hidden, batch, plan).items()}


POISONED = dataclasses.replace(NEXT_TOKENS, sums=_poisoned)


def task_with(factor: float, *bad: int):
    """Pretraining whose loss is multiplied by `factor` on batches with one of the numbers `bad`."""

    def source(config, corpus):
        loader = PRETRAINING.source(config, corpus)
        honest = loader.take

        def take(state):
            batch = honest(state)
            if int(number_of(batch)) in bad:
                weights_bt = batch.weights_bt.copy()
                weights_bt[0, 0] = -factor
                batch = batch._replace(weights_bt=weights_bt)
            return batch

        loader.take = take
        return loader

    return dataclasses.replace(PRETRAINING, objective=POISONED, source=source)


def skipping(task, after: int, count: int):
    """The task, with a source that leaves out `count` batches after the first `after`."""

    def source(config, corpus):
        loader = task.source(config, corpus)
        honest, taken = loader.take, []

        def take(state):
            if len(taken) == after:
                for _ in range(count):
                    honest(state)
            taken.append(1)
            return honest(state)

        loader.take = take
        return loader

    return dataclasses.replace(task, source=source)


def run(recipe, folder, task, *bindings, lines=None):
    log = lines.append if lines is not None else lambda line: None
    return train(*load([recipe], bindings), folder, task, resume=True, log=log)


def curve(folder: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMED} for r in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(recipe, numbers, tmp_path_factory) -> Path:
    """A run that goes back once: batches 7 and 8 are bad, steps 7 and 8 of the first try."""
    folder, lines = tmp_path_factory.mktemp("whole") / "run", []
    run(recipe, folder, task_with(np.inf, *numbers[6:8]), *AFTER_TWO, lines=lines)
    assert lines == [
        "step 7 was skipped and changed nothing: the loss is inf",
        "step 8: the loss is inf; going back to checkpoint 6, past the batches of steps 7 to 8",
    ]
    return folder


def test_a_run_goes_on_behind_the_bad_batches(recipe, numbers, whole, tmp_path):
    """As a run that never saw them."""
    run(recipe, tmp_path / "run", skipping(task_with(np.inf, *numbers[6:8]), 6, 2), *AFTER_TWO)
    assert curve(tmp_path / "run") == curve(whole)
    assert [record["step"] for record in curve(whole)] == list(range(1, STEPS + 1))
    assert curve(whole)[-1]["skipped_steps"] == 0
    (loss,) = read_lost(whole)
    assert (loss.to, loss.until, loss.cause) == (6, 8, "roll_back") and loss.seconds > 0


def killed_at(monkeypatch, moment: str) -> None:
    """Makes the run end at a moment around its roll-back."""
    owner, name, call, before = {
        "before": (Back, "go", 1, True),
        "between": (Back, "go", 1, False),
        "a step later": (MetricsWriter, "write", 9, False),
    }[moment]
    honest, calls = getattr(owner, name), [0]

    def watched(*arguments, **named):
        calls[0] += 1
        if calls[0] == call and before:
            raise Killed
        result = honest(*arguments, **named)
        if calls[0] == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize("moment", ["before", "between", "a step later"])
def test_a_kill_around_a_roll_back_changes_no_bit(recipe, numbers, whole, tmp_path, monkeypatch, moment):
    task, folder = task_with(np.inf, *numbers[6:8]), tmp_path / "run"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        killed_at(patched, moment)
        run(recipe, folder, task, *AFTER_TWO)
    assert [r["step"] for r in read_metrics(folder)][-1] == (7 if moment == "a step later" else 8)
    run(recipe, folder, task, *AFTER_TWO)
    assert curve(folder) == curve(whole)
    assert not [path for path in (folder / "checkpoints").iterdir() if not path.name.isdecimal()]
    skips = [loss for loss in read_lost(folder) if loss.position is not None]
    assert len(skips) == 1 and skips[0].position == read_lost(whole)[0].position


@pytest.mark.parametrize("step", [2, 8])
def test_a_stop_does_not_change_where_a_run_goes_back_to(recipe, numbers, whole, tmp_path, monkeypatch, step):
    """Stopped at step 2 it has a checkpoint of its own there; stopped among bad steps, none."""
    task, folder, honest = task_with(np.inf, *numbers[6:8]), tmp_path / "run", Loop._record

    def record(run, number, *arguments):
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return honest(run, number, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_record", record)
        assert not run(recipe, folder, task, *AFTER_TWO).finished
    run(recipe, folder, task, *AFTER_TWO)
    assert curve(folder) == curve(whole)


def test_before_the_first_checkpoint_a_run_goes_back_to_its_beginning(recipe, numbers, tmp_path):
    task = task_with(np.inf, *numbers[1:2])
    once = (*FIELDS, "TrainConfig.roll_back_after=1")
    run(recipe, tmp_path / "run", task, *once)
    run(recipe, tmp_path / "without", skipping(task, 0, 2), *once)
    assert curve(tmp_path / "run") == curve(tmp_path / "without")
    assert [(loss.to, loss.until) for loss in read_lost(tmp_path / "run")] == [(0, 2)]


def test_a_run_that_would_start_over_keeps_its_checkpoints(recipe, numbers, tmp_path):
    """None of them is of a step that `checkpoint_every` names now."""
    task, folder = task_with(np.inf, *numbers[7:8]), tmp_path / "run"
    fields = lambda steps, every: (  # noqa: E731
        f"TrainConfig.steps={steps}", f"TrainConfig.checkpoint_every={every}", "TrainConfig.roll_back_after=1"
    )  # fmt: skip
    run(recipe, folder, task, *fields(7, 3))
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    with pytest.raises(NonFiniteError, match=r"step 8: .*; there is checkpoint 7, .*checkpoint_every = 4"):
        run(recipe, folder, task, *fields(10, 4))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    assert not (folder / "lost.jsonl").exists()


def test_a_spike_is_gone_back_from_too(recipe, numbers, tmp_path):
    task, lines = task_with(40.0, *numbers[7:8]), []
    spikes = ("TrainConfig.roll_back_after=1", "TrainConfig.spike_deviations=20.0", "TrainConfig.spike_window=4")
    run(recipe, tmp_path / "run", task, *FIELDS, *spikes, lines=lines)
    assert [line.partition(":")[0] for line in lines] == ["step 8 is bad", "step 8"]
    assert "a spike above" in lines[1] and "going back to checkpoint 6" in lines[1]
    run(recipe, tmp_path / "without", skipping(task, 6, 2), *FIELDS, *spikes)
    assert curve(tmp_path / "run") == curve(tmp_path / "without")


def test_bad_steps_that_repeat_to_the_bit_are_the_datas_fault(recipe, numbers, whole, tmp_path):
    lines = []
    task, repeat = task_with(np.inf, *numbers[6:8]), "TrainConfig.repeat_bad_steps=True"
    run(recipe, tmp_path / "run", task, *AFTER_TWO, repeat, lines=lines)
    assert curve(tmp_path / "run") == curve(whole)
    assert [loss.cause for loss in read_lost(tmp_path / "run")] == ["repeat", "roll_back"]
    assert lines[1].endswith("going back to checkpoint 6 to see whether steps 7 to 8 repeat to the bit")


def test_a_step_that_repeats_with_other_bits_is_the_hardwares_fault(recipe, numbers, tmp_path, monkeypatch):
    honest, seen = Loop._record, []

    def record(run, number, *arguments):
        found = honest(run, number, *arguments)
        seen.append(number)
        last_bit = np.nextafter(np.float32(found["grad_norm"]), np.float32(np.inf))
        return found | {"grad_norm": float(last_bit)} if seen.count(7) == 2 and number == 7 else found

    monkeypatch.setattr(Loop, "_record", record)
    fields = (*AFTER_TWO, "TrainConfig.repeat_bad_steps=True")
    with pytest.raises(FaultyHardwareError, match=r"step 7, repeated .* has grad_norm = .* one of cpu 0 \(process 0\)"):
        run(recipe, tmp_path / "run", task_with(np.inf, *numbers[7:9]), *fields)
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8, 9, 7]


def test_a_run_that_stays_bad_is_given_up(recipe, numbers, tmp_path):
    task = task_with(np.inf, *numbers[3:])
    fields = (*FIELDS, "TrainConfig.roll_back_after=1", "TrainConfig.max_roll_backs=2")
    with pytest.raises(NonFiniteError, match="step 4: the loss is inf, after 2 roll-backs to checkpoint 3; expected"):
        run(recipe, tmp_path / "run", task, *fields)
    assert len(read_lost(tmp_path / "run")) == 2


def test_the_last_checkpoint_counts_as_time_spent_saving(recipe, tmp_path, monkeypatch):
    """The step's own record is written before."""

    def write(folder):
        time.sleep(0.4)
        honest(folder)

    honest = checksums.write
    monkeypatch.setattr(checksums, "write", write)
    run(recipe, tmp_path / "run", task_with(np.inf), "TrainConfig.steps=2", "TrainConfig.checkpoint_every=3")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert [record.get("save_seconds", 0) >= 0.4 for record in read_metrics(tmp_path / "run")] == [False, True]
    run(recipe, tmp_path / "run", task_with(np.inf), "TrainConfig.steps=2", "TrainConfig.checkpoint_every=3")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before  # nothing was done


def test_seconds_that_become_known_later_are_added():
    clock = Clock()
    with clock.aside("evaluate_seconds"), clock.aside("save_seconds"):
        time.sleep(0.01)
    spent = clock.spent({"step": 1, "evaluate_seconds": 5.0, "start_seconds": 1.0})
    assert spent.keys() == {"evaluate_seconds", "save_seconds"}
    assert spent["evaluate_seconds"] > 5.009 and 0.009 < spent["save_seconds"] < 5
    assert clock.spent({"evaluate_seconds": 5.0}) == {}


def test_the_batches_of_a_run_are_those_that_it_was_trained_on(recipe, numbers, whole):
    config, _ = load([recipe])
    jump = {read_lost(whole)[0].to: read_lost(whole)[0].position}
    found = [int(number_of(b)) for b in batches_until(config, PRETRAINING.open(config, None), STEPS, jump)]
    assert found == numbers[:6] + numbers[8:12]
