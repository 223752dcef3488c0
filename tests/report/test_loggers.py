"""Weights & Biases and Trackio: with fakes that record, fail or hang, and the libraries themselves where installed."""

import importlib.machinery
import json
import sqlite3
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest
from tests.helpers import bound, write_recipe

from orogen.config.checks import ConfigError
from orogen.report import loggers
from orogen.report.loggers import require_loggers, run_id
from orogen.report.metrics import MetricsWriter, read_metrics

BOTH = pytest.mark.parametrize("name", ["wandb", "trackio"])


class Fake(ModuleType):
    """Stands for either library. calls: everything that was asked of it, in order. fails: the call that raises."""

    def __init__(self, name: str, fails: str | None = None):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls, self.fails, self.key = [], fails, True
        self.Settings = lambda **settings: settings
        self.setup = lambda settings: SimpleNamespace(settings=SimpleNamespace(mode="online"))
        self.login = lambda prompt: self.key
        self.waits = threading.Event()
        self.waits.set()

    def _called(self, name, *facts):
        self.waits.wait(30)
        if name == self.fails:
            raise ConnectionError(f"no route\nto {name}")
        self.calls.append((name, *facts))

    def init(self, **facts):
        self._called("init", facts)
        return self

    def log(self, metrics, *, step):
        self._called("log", step, metrics)

    def finish(self):
        self._called("finish")


@pytest.fixture
def fake(monkeypatch, name) -> Fake:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    module = Fake(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def write(folder, name, steps, *, resume_step=None, said=None, config=None):
    said = [] if said is None else said
    settings = {"loggers": (name,), "config": config, "log": said.append}
    with MetricsWriter(folder, resume_step=resume_step, **settings) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 10.0 - step, "mtp_loss": [1.0, float("nan")]})
    return said


@BOTH
def test_steps_arrive_in_order_with_the_run_and_its_settings(tmp_path, fake, name):
    folder = tmp_path / "runs" / "first"
    assert write(folder, name, range(1, 40), config={"train": {"steps": 39}}) == []
    (kind, facts), *logged, finish = fake.calls
    assert (kind, finish) == ("init", ("finish",))
    assert logged == [("log", step, {"loss": 10.0 - step, "mtp_loss/0": 1.0}) for step in range(1, 40)]
    own = (folder / "run_id").read_text().strip()
    assert facts["project"] == "runs" and facts["config"] == {"train": {"steps": 39}} and facts["resume"] == "allow"
    if name == "wandb":
        assert (facts["name"], facts["id"], facts["dir"]) == ("first", own, str(folder))
    else:  # which has nothing but the name
        assert facts["name"] == f"first-{own}"
    assert not (folder / "tensorboard").exists()


@BOTH
def test_a_resumed_run_goes_on_under_its_id_and_a_new_start_has_a_new_one(tmp_path, fake, name):
    write(tmp_path, name, range(1, 6))
    write(tmp_path, name, range(4, 7), resume_step=3)
    (tmp_path / "metrics.jsonl").unlink()
    write(tmp_path, name, range(1, 3), resume_step=0)
    names = [call[1].get("id", call[1]["name"]) for call in fake.calls if call[0] == "init"]
    assert names[0] == names[1] != names[2]
    steps = [call[1] for call in fake.calls if call[0] == "log"]
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6, 1, 2]


@BOTH
@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failure_is_one_line_and_stops_nothing(tmp_path, fake, name, fails):
    fake.fails = fails
    said = write(tmp_path, name, range(1, 30))
    assert said == [f"{name} gets no more metrics of this run: no route to {fails}"]
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 30))


@BOTH
def test_a_step_does_not_wait_and_the_end_does_not_for_ever(tmp_path, fake, name, monkeypatch):
    monkeypatch.setattr(loggers, "FINISH_SECONDS", 0.1)
    fake.waits.clear()  # as behind a network that answers nothing
    before = time.monotonic()
    said = write(tmp_path, name, range(1, 30))
    assert time.monotonic() - before < 5
    assert said == [f"{name} gets no more metrics of this run: not everything is sent after 0.1 s"]
    fake.waits.set()


@pytest.mark.parametrize("name", ["wandb"])
def test_too_many_waiting_steps_are_one_line(tmp_path, fake, name, monkeypatch):
    monkeypatch.setattr(loggers, "WAITING", 3)
    fake.waits.clear()
    said = write(tmp_path, name, range(1, 30))
    assert said == ["wandb gets no more metrics of this run: 3 steps are waiting to be sent"]
    fake.waits.set()


@pytest.mark.parametrize("name", ["wandb"])
def test_without_a_key_nobody_is_asked_for_one(tmp_path, fake, name):
    fake.key = False
    assert write(tmp_path, name, range(1, 3)) == [
        "wandb gets no more metrics of this run: no API key; expected WANDB_API_KEY, `wandb login`, or "
        "WANDB_MODE=offline"
    ]
    assert fake.calls == []


def test_ids_are_new_unless_the_run_is_resumed(tmp_path):
    first = run_id(tmp_path, resumed=False)
    assert run_id(tmp_path, resumed=True) == first != run_id(tmp_path, resumed=False)
    (tmp_path / "run_id").unlink()
    assert run_id(tmp_path, resumed=True) == run_id(tmp_path, resumed=True)  # a run that had no logger before


@BOTH
def test_a_library_that_is_missing_is_refused_before_anything_is_written(tmp_path, refused, name, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda wanted: None)
    recipe = write_recipe(tmp_path)
    command = ["train", "--gin_file", recipe, "--run", tmp_path / "run"]
    assert refused(*command, *bound(f"TrainConfig.loggers = ('tensorboard', '{name}')")) == (
        f"TrainConfig.loggers has '{name}', which is not installed; expected it from `pip install 'orogen[{name}]'`"
    )
    require_loggers(("tensorboard",))
    with pytest.raises(ConfigError, match="is not installed"):
        require_loggers((name,))


# The libraries themselves.


def offline_records(file):
    """The records of a wandb file: after 7 bytes, each has a checksum of 4, a length of 2 and a kind, 1 if whole. A
    process of wandb's own writes them, and may still do so after `finish` until the last one, `exit`, is there."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(300):
        content, records = file.read_bytes()[7:], []
        while len(content) >= 7 and len(content) >= 7 + (size := int.from_bytes(content[4:6], "little")):
            assert content[6] == 1
            records.append(Record.FromString(content[7 : 7 + size]))
            content = content[7 + size :]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} does not end")


def test_wandb_offline(tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb", reason="needs `pip install 'orogen[wandb]'`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert write(tmp_path / "run", "wandb", range(1, 4)) == []
    assert write(tmp_path / "run", "wandb", range(3, 5), resume_step=2) == []
    own = (tmp_path / "run" / "run_id").read_text().strip()
    logged, names = [], set()
    for file in sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{own}.wandb")):
        for record in offline_records(file):
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                logged.append((values["_step"], values["loss"], values["mtp_loss/0"]))
            elif record.WhichOneof("record_type") == "run":
                names.add((record.run.run_id, record.run.display_name))
    assert names == {(own, "run")}
    assert logged == [(step, 10.0 - step, 1.0) for step in (1, 2, 3, 3, 4)]
    assert capfd.readouterr().out == ""


def test_trackio_on_this_machine(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported, which no other test does
    pytest.importorskip("trackio", reason="needs `pip install 'orogen[trackio]'`")
    folder = tmp_path / "project" / "run"
    assert write(folder, "trackio", range(1, 4)) == []
    assert write(folder, "trackio", range(4, 6), resume_step=3) == []
    own = (folder / "run_id").read_text().strip()
    with sqlite3.connect(tmp_path / "trackio" / "project.db") as database:
        records = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    assert len({row[0] for row in records}) == 1
    assert [(name, step, json.loads(metrics)["loss"]) for _, name, step, metrics in records] == [
        (f"run-{own}", step, 10.0 - step) for step in range(1, 6)
    ]
    assert capfd.readouterr().out == ""
