"""Rollouts beside the trainer: ahead of it in a thread, by a server, and the reference that adapters leave in place."""

import concurrent.futures
import contextlib
import dataclasses
import json
import shutil
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import bound, hybrid, run_config
from tests.infer.serve.live import serving
from tests.posttrain.faulty import Fault, front
from tests.posttrain.test_rl import RECIPE, run

from orogen.checkpoint.open import Opened
from orogen.cli import main
from orogen.config.load import load
from orogen.config.lora import LoraConfig
from orogen.config.plan import PlanConfig
from orogen.config.rl import EnvironmentConfig, RLConfig
from orogen.cost.assemble import assemble
from orogen.data.vocabulary import make_tokenizer
from orogen.infer.engine import Engine
from orogen.infer.serve.weights import Weights
from orogen.layers.adapter import apart, merged
from orogen.model.lm import initial_state
from orogen.posttrain import heldout_tasks, rl
from orogen.posttrain.ahead import Ahead
from orogen.posttrain.groups import Written
from orogen.posttrain.likelihood import Likelihoods
from orogen.posttrain.remote import API_KEY
from orogen.posttrain.rollout import _engine_config
from orogen.train.sides import packed_batch

SHORT = ("RLConfig.updates = 1", "TrainConfig.evaluate_every = 3", "RLConfig.workers = 1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "rl.gin"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    """A run of three steps whose rollouts are written in turn with them."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, *run(recipe, folder, *SHORT, "TrainConfig.steps = 3")


def tasks_of(folder):
    """By table, what its samples were asked."""
    read = lambda file: [json.loads(line) for line in file.read_text().splitlines()]  # noqa: E731
    tables = sorted((folder / "rollouts").iterdir())
    return [[(row["environment"], row["number"]) for row in read(file)] for file in tables]


def test_rollouts_ahead_are_at_most_one_batch_old_and_count_no_sample_twice(recipe, plain, tmp_path):
    """Also after a kill that lost the last checkpoint: a batch that was being written is written again."""
    ahead = (*SHORT, "RLConfig.staleness = 1")
    _, lines = run(recipe, tmp_path, *ahead, "TrainConfig.steps = 2")
    assert lines[0]["staleness_max"] == 0 and lines[1]["staleness_max"] in (0, 1)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    _, lines = run(recipe, tmp_path, *ahead, "TrainConfig.steps = 3", resume=True)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 <= line["staleness_mean"] <= line["staleness_max"] <= 1 for line in lines)
    assert lines[1]["staleness_max"] == 0 and "heldout_reward" in lines[2]
    assert tasks_of(tmp_path) == tasks_of(plain[0])


class Rollouts:
    """What Ahead needs, with a clock of its own: it writes one batch per permission."""

    def __init__(self):
        self.lock, self.version, self.stops = threading.RLock(), None, []
        self.given_at, self.swapped, self.rounds = [], [], 0

    def on_close(self, stop):
        self.stops.append(stop)

    def copied(self, params, buffers):
        return params, buffers

    def given(self, weights, *, version, progress):
        self.version = version
        self.given_at.append(version)

    def swap(self, weights, *, version, progress):
        self.version = version
        self.swapped.append(version)

    def forget(self):
        self.version = None


class Slow:
    """Batches of which each takes three calls of the engine, between which it waits for permission."""

    def __init__(self, rollouts):
        self.rollouts, self.may, self.begun = rollouts, threading.Semaphore(0), []

    def write(self, number, engine, progress):
        self.begun.append(number)
        versions = []
        for _ in range(3):
            assert self.may.acquire(timeout=20)
            progress()
            versions.append(self.rollouts.version)
        return Written(versions, {}, {"after": number})


def test_no_batch_begins_before_the_weights_that_bound_its_age():
    """With one batch ahead: batch 1 begins by weights 0, gets weights 1 between two calls, and batch 2 waits."""
    rollouts = Rollouts()
    groups = Slow(rollouts)
    ahead = Ahead(rollouts, groups, most=1, total=4)
    groups.may.release(4)  # all of batch 0 and one call of batch 1
    assert ahead.take(0, "w0", None, lambda: None).samples == [0, 0, 0]
    until(lambda: groups.begun == [0, 1] and groups.may._value == 0)
    assert rollouts.given_at == [0, 0] and not rollouts.swapped
    groups_later = threading.Timer(0.05, lambda: groups.may.release(2))
    groups_later.start()
    assert ahead.take(1, "w1", None, lambda: None).samples == [0, 1, 1]
    assert rollouts.swapped == [1]
    until(lambda: groups.begun == [0, 1, 2])
    groups.may.release(9)
    time.sleep(0.05)
    assert groups.begun == [0, 1, 2]  # batch 3 waits for weights 2
    assert ahead.take(2, "w2", None, lambda: None).curriculum == {"after": 2}
    ahead.take(3, "w3", None, lambda: None)
    assert groups.begun == [0, 1, 2, 3]
    ahead.stop()


def test_a_run_that_rolled_back_takes_more_batches_than_it_has_steps():
    """As many as it needs, of which none is written that it may not need."""
    rollouts = Rollouts()
    groups = Slow(rollouts)
    ahead = Ahead(rollouts, groups, most=2, total=3)
    groups.may.release(30)
    for number in range(3):
        ahead.take(number, "w", None, lambda: None)
    ahead.stop()  # as a position that is restored does
    for number in (3, 4):
        taken = in_time(lambda n=number: ahead.take(n, "w", None, lambda: None))
        assert taken.curriculum == {"after": number}
    assert groups.begun == [0, 1, 2, 3, 4]
    ahead.stop()


def test_a_thread_that_is_gone_is_not_waited_for():
    rollouts = Rollouts()
    ahead = Ahead(rollouts, Slow(rollouts), most=1, total=3)
    ahead._thread = threading.Thread(target=lambda: None)
    with pytest.raises(RuntimeError, match="has ended; expected it to write batch 1"):
        in_time(lambda: ahead.take(1, "w", None, lambda: None))


def in_time(call):
    """What the call returns or raises, unless it takes too long."""
    found = concurrent.futures.Future()

    def run():
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result(timeout=5)


def test_an_evaluation_that_waits_for_the_thread_tells_its_progress(monkeypatch):
    """And none of a thread that hangs."""
    monkeypatch.setattr(heldout_tasks, "WAIT", 0.01)
    rollouts, told = Rollouts(), []
    groups = Slow(rollouts)
    ahead = Ahead(rollouts, groups, most=1, total=2)
    groups.may.release(3)
    ahead.take(0, "w", None, lambda: None)
    until(lambda: groups.begun == [0, 1])  # which holds the lock
    heldout = heldout_tasks.HeldoutTasks(rollouts, {"a": [1]}, count=1)
    heldout.progress = lambda: told.append(rollouts.rounds)
    rollouts.take = lambda *weights_and_progress: "engine"
    monkeypatch.setattr(heldout, "_means", lambda engine, tasks: [0.5])
    waiting = threading.Thread(target=lambda: heldout.full(SimpleNamespace(params=0, buffers=0)))
    waiting.start()
    time.sleep(0.3)
    assert told == []
    for calls in (1, 2):
        groups.may.release()
        until(lambda n=calls: len(told) == n)
    groups.may.release()
    waiting.join(20)
    assert not waiting.is_alive()
    ahead.stop()


@pytest.mark.parametrize("call", ["given", "swap"])
def test_a_thread_that_waits_for_a_server_ends_when_it_is_to(call):
    """And tells the trainer, which waits for it, that it has not hung."""

    class Waiting(Rollouts):
        waits = False

        def given(self, weights, *, version, progress):
            self.wait("given", progress)

        def swap(self, weights, *, version, progress):
            self.wait("swap", progress)

        def wait(self, kind, progress):
            end = time.monotonic() + 15 * (kind == call)
            while time.monotonic() < end:  # as `Calls.post` does
                self.waits = True
                time.sleep(0.02)
                progress()

    rollouts, told = Waiting(), []
    groups = Slow(rollouts)
    groups.may.release(4)  # all of batch 0 and one call of batch 1
    ahead = Ahead(rollouts, groups, most=1, total=4)

    def train():
        with contextlib.suppress(RuntimeError):  # the thread has ended
            for number in range(2):
                ahead.take(number, f"w{number}", None, lambda: told.append(0))

    trainer = threading.Thread(target=train, daemon=True)
    trainer.start()
    if call == "swap":
        until(lambda: ahead._newest is not None and ahead._newest.version == 1)
        groups.may.release()
    until(lambda: rollouts.waits)
    told.clear()
    until(lambda: told)
    began = time.monotonic()
    ahead.stop()
    assert time.monotonic() - began < 3
    trainer.join(20)


def test_what_a_batch_raises_is_raised_where_it_is_waited_for():
    class Broken(Slow):
        def write(self, number, engine, progress):
            raise FloatingPointError("a rollout failed")

    rollouts = Rollouts()
    ahead = Ahead(rollouts, Broken(rollouts), most=1, total=4)
    with pytest.raises(FloatingPointError, match="a rollout failed"):
        ahead.take(0, "w0", None, lambda: None)
    rollouts.stops[0]()


def until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_run_by_a_server_is_the_run_in_one_process(recipe, tmp_path, monkeypatch):
    """To the bit: weights there, tokens and log-probabilities back, though requests are refused, dropped and lost. One
    request at a time: which ones an engine reads together depends on when they arrive, and sums over other numbers of
    rows round otherwise."""
    monkeypatch.setenv(API_KEY, "secret")
    monkeypatch.setattr("orogen.posttrain.calls.FIRST_WAIT", 0.02)
    (tmp_path / "weights").mkdir()
    alike = (*SHORT, "TrainConfig.steps = 3", "RLConfig.slots = 1")
    alone, expected = run(recipe, tmp_path / "alone", *alike)
    config, _ = load([recipe], alike)
    laid, built = assemble(config.model, config.plan)
    params, buffers = map(built.laid, initial_state(config.model, 99))
    words = make_tokenizer(config.data, ())
    settings = _engine_config(config, config.plan)
    engine = Engine(Opened(config.model, laid, built, params, buffers, words), settings)
    weights = Weights(engine, tmp_path / "weights", config.model, PlanConfig(), settings)
    busy = Fault(status=429, headers={"retry-after": "0"})
    faults = {0: Fault(status=503), 4: busy, 5: Fault("drop"), 7: Fault("lost")}
    with (
        serving(engine, most=96, key="secret", weights=weights) as (port, _),
        front(port, faults) as server,
    ):
        bindings = (
            *alike, f"RLConfig.server = '{server.url}'",
            f"RLConfig.server_weights = {str(tmp_path / 'weights')!r}",
        )  # fmt: skip
        found, lines = run(recipe, tmp_path / "run", *bindings)
    assert [line.pop("server_retries") for line in lines] == [4, 0, 0]
    assert lines == expected and not list((tmp_path / "weights").iterdir())
    for one, other in zip(jax.tree.leaves(found.state.params), jax.tree.leaves(alone.state.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


SERVED = ("RLConfig.server = 'http://x'", "RLConfig.server_weights = '/no'")


@pytest.mark.parametrize(
    ("bindings", "message"),
    [
        (["RLConfig.server = 'ftp://x'", "RLConfig.server_weights = '.'"], "RLConfig.server is 'ftp://x'; expected"),
        *(
            ([f"RLConfig.server = {url!r}", "RLConfig.server_weights = '/no'"], f"RLConfig.server is {url!r}; expected")
            for url in (
                "https://x",
                "http://a..b:80",
                f"http://{'a' * 64}",
                "http://x:99999",
                "http://x:no",
                "http://",
                "http://x/a b",
                "http://x/\n",
                "http://ä",
            )
        ),
        *(
            ([*SERVED, f"RLConfig.server_timeout = {n}", f"RLConfig.server_deadline = {n}"], message)
            for n, message in (
                ("1e999", "RLConfig.server_timeout is inf; expected a number above 0"),
                ("1e10", "RLConfig.server_deadline is 10000000000.0; expected at most 31536000"),
            )
        ),
        (["RLConfig.server = 'http://x'"], "RLConfig.server_weights is None; expected a folder with server"),
        (["RLConfig.server = 'http://x'", "RLConfig.server_weights = '/no'"], "RLConfig.server_weights is '/no'"),
        (["RLConfig.staleness = 1", "RLConfig.exact = True"], "RLConfig.staleness is 1; expected nothing where exact"),
        (["RLConfig.staleness = -1"], "RLConfig.staleness is -1"),
        (["RLConfig.router_replay = True"], "RLConfig.router_replay is True; expected False: the model has no experts"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(recipe, tmp_path, capsys, monkeypatch, bindings, message):
    monkeypatch.setenv(API_KEY, "secret")
    command = ["rl", "--gin_file", str(recipe), "--run", str(tmp_path / "run"), *bound(*bindings)]
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_with_adapters_the_reference_is_the_run_without_them(monkeypatch):
    """To the bit, and with no second model read; where more than adapters is trained, the first checkpoint is."""
    base = hybrid(pattern="*-", mtp_depths=0)
    settings = RLConfig(
        environments=(EnvironmentConfig(name="a", kind="workplace"),), prompts=1, samples=2, max_tokens=4,
        template="plain", kl=0.1,
    )  # fmt: skip
    without = run_config(base, batch_size=2, sequence_length=16)
    config = dataclasses.replace(without, lora=LoraConfig(rank=2), rl=settings).check()
    built = assemble(config.model, config.plan)[1]
    params, buffers = map(built.laid, initial_state(config.model, 0))
    params = jax.tree.map(lambda a: a + 0.01, params)  # of the factors too
    monkeypatch.setattr(rl, "open_folder", None)
    reference = rl._reference(config, None, built, Likelihoods(config, built))
    assert reference is not None
    state = type("State", (), {"params": params, "buffers": buffers})
    batch = packed_batch(config, config.train)
    one = Likelihoods(config, built).of(*reference(state), batch)
    adapted = Likelihoods(config, built).of(params, buffers, batch)
    plain = assemble(base, config.plan)[1]
    weights, factors = apart(params)
    bare = merged(weights, jax.tree.map(jnp.zeros_like, factors), 1.0)
    other = Likelihoods(without, plain).of(bare, buffers, batch)
    assert one.tobytes() == other.tobytes() and abs(one - adapted).max() > 1e-3
    trained = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, trained=("norm",)))
    with pytest.raises(Exception, match="--checkpoint"):
        rl._reference(trained, None, built, Likelihoods(config, built))
