"""Runs of a sweep: each once, whatever ends in between. The program is a script that writes a run's files."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.helpers import bound, run_config, write_recipe

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.config.run import OptimizerConfig
from orogen.config.sweep import Arm, SweepConfig
from orogen.sweep.command import best_rates
from orogen.sweep.plan import Run
from orogen.sweep.results import Results, read_run
from orogen.sweep.runner import Runner, environments
from orogen.train.health import SPIKE

# What a run leaves behind, one line per start in the file `starts`; the name of the run says how it ends.
PROGRAM = """
import json, pathlib, sys, time
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--run") + 1])
with open(folder.parents[1] / "starts", "a") as starts:
    starts.write(folder.name + "\\\\n")
if words[0] == "launch":
    sys.exit(0)
if "bad" in folder.name:
    sys.exit("a reason")
if "slow" in folder.name:
    time.sleep(60)
folder.mkdir(exist_ok=True)
facts = {"parameters": {"total": 7}, "commit": None, "packages": {}, "devices": {}}
(folder / "env.json").write_text(json.dumps(facts))
if "lost" in folder.name:
    lines = [json.dumps({"step": step, "skipped_steps": max(step - 3, 0)}) for step in range(1, 14)]
    (folder / "metrics.jsonl").write_text("\\n".join(lines) + "\\n")
    sys.exit("step 13: 10 steps in a row were skipped")
record = {"step": 10, "loss": 2.0, "score": len(folder.name), "step_ms": 500.0, "expert_load": [[1, 3], [4, 0]]}
if "--checkpoint" in words:
    record["origin"] = len(words[words.index("--checkpoint") + 1])
(folder / "metrics.jsonl").write_text(json.dumps(record) + "\\\\n")
facts = {"parameters": {"total": 7}, "commit": None, "packages": {}, "devices": {}}
(folder / "env.json").write_text(json.dumps(facts))
(folder / "report.html").write_text("")
"""


def runs(*names):
    return [Run(Arm((name,), ()), name, run_config(steps=10, seed=n)) for n, name in enumerate(names)]


@pytest.fixture
def runner(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("\\\\", "\\"))

    def make(at_once=2, **options):
        return Runner(
            tmp_path, Results(tmp_path), numbers=("score",), at_once=at_once, environments=[{}], log=lambda line: None,
            program=(sys.executable, "-S", str(program)), **options,
        )  # fmt: skip

    make.starts = lambda: (tmp_path / "starts").read_text().split()
    return make


def test_each_run_is_run_once(runner, tmp_path):
    first, both = runs("a", "bb"), runs("a", "bb", "ccc")
    runner().run(first)
    runner().run(both)
    assert sorted(runner.starts()) == ["a", "bb", "ccc"]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["run"]: line["value"] for line in lines} == {"a": 1, "bb": 2, "ccc": 3}
    assert lines[0]["seconds"] == 0.5 and lines[0]["parameters"] == 7 and lines[0]["tokens"] == 10 * 4 * 24


def test_a_run_that_ended_unwatched_is_not_run_again(runner, tmp_path):
    runner().run(runs("a"))
    (tmp_path / "results.jsonl").unlink()
    again = runner()
    again.run(runs("a"))
    assert runner.starts() == ["a"] and Results(tmp_path).of(*runs("a"))["value"] == 1


def test_half_a_line_of_a_killed_sweep_is_no_result(runner, tmp_path):
    runner().run(runs("a", "bb"))
    file = tmp_path / "results.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    results = Results(tmp_path)
    assert file.read_bytes() == whole[: whole.index(b"\n") + 1]
    assert sum(results.of(run) is not None for run in runs("a", "bb")) == 1


def test_further_numbers_are_kept_and_read_again_where_they_lack(runner, tmp_path):
    runner().run(runs("a", "bb"))
    numbers = ("loss", "load_violation", "score")
    again = Runner(
        tmp_path, Results(tmp_path, numbers), numbers=numbers, at_once=1, environments=[{}], log=lambda line: None,
        program=("false",),
    )  # fmt: skip
    again.run(runs("a", "bb"))
    assert not again.failures  # nothing was started
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines] == ["a", "bb"]
    # 3 of an even 2, and 4 of an even 2: 0.5 and 1 too many
    assert lines[1]["value"] == 2.0 and lines[1]["further"] == {"load_violation": 0.75, "score": 2}
    assert Results(tmp_path, ("score",)).of(runs("a", "bb")[1])["value"] == 2


def test_a_run_begins_with_its_checkpoint(runner, tmp_path):
    (run,) = runs("a")
    made = runner()
    made._numbers = ("origin",)
    made.run([run._replace(checkpoint="runs/dense")])
    (line,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert line["value"] == len("runs/dense") and line["checkpoint"] == "runs/dense"


def test_a_failure_is_named_and_the_others_go_on(runner):
    made = runner(at_once=1)
    made.run(runs("bad", "a"))
    assert made.failures == [("bad", "status 1: a reason")] and runner.starts() == ["bad", "a"]
    runner().run(runs("bad", "a"))
    assert runner.starts() == ["bad", "a", "bad"]


def test_a_search_that_diverges_is_an_answer_and_a_run_that_does_is_a_failure(runner, tmp_path):
    arm, told = Arm(("a",), ()), []
    rated = lambda rate: OptimizerConfig(learning_rate=rate, schedule="constant")  # noqa: E731
    searches = [Run(arm, name, dataclasses.replace(run_config(), optimizer=rated(rate)), True)
                for name, rate in (("lost", 1.0), ("kept", 0.1), ("poorer", 0.01))]  # fmt: skip
    first = runner(at_once=1)
    first._log = told.append
    first.run(searches)
    again = runner()
    again.run([*searches, *runs("lost-seed")])
    assert runner.starts() == ["lost", "kept", "poorer", "lost-seed"] and any("lost: diverged" in line for line in told)
    assert not first.failures and [failure.name for failure in again.failures] == ["lost-seed"]
    results = Results(tmp_path, ["score"])
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["value"] is None
    settings = {"matrix": {"x": {"a": []}}, "control": ("a",), "seeds": (0,), "learning_rates": (1.0, 0.1, 0.01)}
    assert best_rates(SweepConfig(**settings), searches, results) == ({"a": 0.1}, [])
    with pytest.raises(ConfigError, match="arm a diverges with SweepConfig.learning_rates 1, 0.1, 0.01; expected one"):
        best_rates(SweepConfig(**settings), searches[:1], results)
    results._lines["lost"]["value"] = float("nan")  # compares as no smaller and no larger
    assert best_rates(SweepConfig(**settings), searches, results)[0] == {"a": 0.1}


def test_a_search_that_ends_by_its_last_roll_back_diverged(tmp_path):
    """Not if a step between was good, nor with a roll-back left, nor if they went back to an earlier checkpoint."""
    config = run_config(steps=100)
    train = dataclasses.replace(config.train, checkpoint_every=5, roll_back_after=2, max_roll_backs=3)
    run = Run(Arm(("a",), ()), "a", dataclasses.replace(config, train=train), True)
    (tmp_path / "env.json").write_text('{"parameters": {"total": 7}, "commit": null, "packages": {}, "devices": {}}')

    def value(skipped, to=(10, 10, 10), more=None):
        records = [{"step": step, "skipped_steps": n} for step, n in enumerate(skipped, 10)]
        records[-1] |= more or {}
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        lost = [{"to": t, "until": t + 2, "seconds": 1.0, "cause": "roll_back", "position": {}} for t in to]
        (tmp_path / "lost.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lost))
        return read_run(tmp_path, run, ["score"])

    assert value([0, 1, 2])["value"] is None and value([0, 1, 1], more={SPIKE: 3.0})["value"] is None
    assert value([0, 1, 1]) is None and value([0, 1, 2], (10, 10)) is None and value([0, 1, 2], (5, 5, 5)) is None


def test_a_result_of_another_config_is_refused(runner):
    runner().run(runs("a"))
    (other,) = runs("a")
    other = other._replace(config=run_config(steps=11))
    with pytest.raises(ConfigError, match="a result of a with another config"):
        runner().run([other])


def test_a_metric_that_no_record_has_is_named(runner):
    made = runner()
    made._numbers = ("wrong",)
    with pytest.raises(ConfigError, match=r"no number 'wrong'; expected one of \['load_violation', 'loss', 'score'"):
        made.run(runs("a"))


def test_a_submitted_run_is_not_submitted_again(runner):
    for _ in range(2):
        made = runner(launcher="slurm --processes 1")
        made.run(runs("a"))
        assert made.submitted == ["a"] and not made.failures
    assert runner.starts() == ["a"]


def test_ctrl_c_ends_the_runs(tmp_path):
    script = tmp_path / "sweep.py"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("\\\\", "\\"))
    script.write_text(
        "import sys; from pathlib import Path; from tests.sweep.test_runner import *\n"
        "folder = Path(sys.argv[1])\n"
        "r = Runner(folder, Results(folder), numbers=('score',), at_once=2, environments=[{}], log=print,\n"
        "           program=(sys.executable, '-S', sys.argv[2]))\n"
        "r.run(runs('slow1', 'slow2'))\n"
    )
    command = [sys.executable, str(script), str(tmp_path), str(program)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                               stderr=subprocess.DEVNULL)  # fmt: skip
    starts = tmp_path / "starts"
    while not (starts.exists() and len(starts.read_text().split()) == 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    left = subprocess.run(["pgrep", "-f", str(program)], capture_output=True, text=True, check=False).stdout
    assert left == ""


def test_runs_at_a_time_share_the_gpus():
    assert environments(3, []) == [{}]
    assert environments(2, ["0", "1"]) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    part = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.460"}
    assert environments(3, ["4", "5"]) == [{"CUDA_VISIBLE_DEVICES": gpu, **part} for gpu in ("4", "5", "4")]


STUDY = """
SweepConfig.matrix = {'rows': {'4': [], '2': ['TrainConfig.batch_size = 2']}}
SweepConfig.control = ('4',)
SweepConfig.seeds = (0,)
SweepConfig.further = ('grad_norm',)
TrainConfig.sample_tokens = 1
"""


def test_a_sweep_trains_and_compares(tmp_path, capsys):
    file = tmp_path / "study.gin"
    file.write_text(f"include '{write_recipe(tmp_path).name}'\n{STUDY}")
    command = ["sweep", "--gin_file", str(file), "--run", str(tmp_path / "sweep"), "--at_once", "2", "--json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["finished"] and [arm["arm"] for arm in answer["arms"]] == ["4", "2"]
    lines = [json.loads(line) for line in (tmp_path / "sweep" / "results.jsonl").read_text().splitlines()]
    assert {(line["arm"][0], line["steps"], line["tokens"]) for line in lines} == {("4", 2, 192), ("2", 4, 192)}
    one = {line["arm"][0]: line["value"] for line in lines}
    assert answer["arms"][1]["difference"] == pytest.approx(one["2"] - one["4"])
    assert answer["arms"][1]["low"] is None  # one pair; JSON has no infinity
    norms = {line["arm"][0]: line["further"]["grad_norm"] for line in lines}
    assert answer["arms"][1]["further"]["grad_norm"]["difference"] == pytest.approx(norms["2"] - norms["4"])
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert f"{one['2'] - one['4']:+.4f} [one pair]" in table and "cannot be told" in table
    assert f"| 4 | {norms['4']:.4f} (1) | – | – | – | – |" in table
    assert (tmp_path / "sweep" / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("SweepConfig.budget = 'time'", "SweepConfig.budget is 'time'; expected one of tokens, flops, steps"),
        ("SweepConfig.seeds = ()", "SweepConfig.seeds is"),
        ("TrainConfig.batch_size = 3", "arm 2: gin bindings: TrainConfig.batch_size is bound twice"),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_line(tmp_path, capsys, binding, message):
    file = tmp_path / "study.gin"
    file.write_text(f"include '{write_recipe(tmp_path).name}'\n{STUDY}")
    assert main(["sweep", "--gin_file", str(file), "--run", str(tmp_path / "sweep"), *bound(binding)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "sweep").exists()
