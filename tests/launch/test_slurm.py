"""The script of a batch job. bash reads it here; SLURM itself is stood in for by its commands' names."""

import contextlib
import os
import shlex
import signal
import stat
import subprocess
import sys
import time

import pytest

from orogen.cli import main
from orogen.config.checks import ConfigError
from orogen.launch.slurm import Job, render, submit
from orogen.parallel.roll_call import AbsentError

TASK = ["train", "--gin_file", "a b.gin", "--run", "runs/x", "--gin_bindings", "DataConfig.corpus='it''s $HOME `id`'"]


def test_what_is_asked_of_slurm(tmp_path):
    job = Job(processes=8, per_node=4, gpus=4, cpus=6, time="1-02:00:00", account="lab", partition="gpu", memory="90G",
              options=["--qos=high"])  # fmt: skip
    lines = render(job, TASK, tmp_path).splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert asked == [
        "--job-name=orogen-train-x", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=6",
        "--time=1-02:00:00", "--mem=90G", "--account=lab", "--partition=gpu", f"--output={tmp_path}/slurm-%j.log",
        "--open-mode=append", "--signal=B:USR1@120", "--requeue", "--qos=high",
    ]  # fmt: skip
    assert lines[0] == "#!/bin/bash" and max(k for k, line in enumerate(lines) if "#SBATCH" in line) == len(asked)


# As scancel does without --batch, it signals the tasks alone; their number is in a file.
ENDS = 'kill -TERM "$(cat "$(dirname "$0")/../task")"'


@pytest.fixture
def ran(tmp_path):
    """(job, task, environment, srun's body) -> the batch script, running, with stand-ins for SLURM's commands, which
    write their arguments to files."""

    def run(job: Job, task: list[str], body: str, **environment: str) -> subprocess.Popen:
        bin_dir = tmp_path / "bin"
        bin_dir.mkdir(exist_ok=True)
        for earlier in tmp_path.glob("*.said"):
            earlier.unlink()
        for name, rest in {"srun": body, "scontrol": "", "scancel": ENDS}.items():
            file = bin_dir / name
            file.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {shlex.quote(str(tmp_path))}/{name}.said\n{rest}\n')
            file.chmod(file.stat().st_mode | stat.S_IXUSR)
        path = f"{bin_dir}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "-c", render(job, task, tmp_path)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PATH": path, "SLURM_JOB_ID": "17", **environment},
        )  # fmt: skip

    return run


def said(tmp_path, name: str) -> list[str] | None:
    """The arguments of a stand-in; None if it was not called."""
    file = tmp_path / f"{name}.said"
    return file.read_text().split("\0")[:-1] if file.exists() else None


def test_the_task_arrives_as_it_was_written(ran, tmp_path):
    batch = ran(
        Job(processes=1, setup=["export FROM_SETUP='x  y'"]),
        TASK,
        f'echo "$OROGEN_CLUSTER $FROM_SETUP" > {tmp_path}/env',
        SLURM_CPUS_PER_TASK="3",
    )
    assert batch.wait(20) == 0
    options = ["--kill-on-bad-exit=1", "--label", "--cpus-per-task=3"]
    assert said(tmp_path, "srun") == [*options, sys.executable, "-m", "orogen.cli", *TASK]
    assert (tmp_path / "env").read_text() == "slurm x  y\n"
    assert said(tmp_path, "scontrol") is None


def test_a_job_that_was_put_back_resumes(ran, tmp_path):
    assert ran(Job(processes=1), TASK, "", SLURM_RESTART_COUNT="1").wait(20) == 0
    assert said(tmp_path, "srun")[-1] == "--resume" and said(tmp_path, "srun")[2] == sys.executable


def failures(tmp_path) -> int:
    """Those that the job has counted."""
    file = tmp_path / "slurm-17.failures"
    return int(file.read_text()) if file.exists() else 0


@pytest.mark.parametrize(
    ("status", "failed", "back"), [(1, 0, True), (137, 1, True), (1, 2, False), (2, 1, False), (0, 0, False)]
)
def test_failures_go_back_to_the_queue_a_limited_number_of_times(ran, tmp_path, status, failed, back):
    """SLURM's own count includes time limits and failed nodes."""
    if failed:
        (tmp_path / "slurm-17.failures").write_text(f"{failed}\n")
    batch = ran(Job(processes=1, restarts=2), TASK, f"exit {status}", SLURM_RESTART_COUNT="9")
    assert batch.wait(20) == status
    assert said(tmp_path, "scontrol") == (["requeue", "17"] if back else None)
    assert failures(tmp_path) == failed + back


def telling(status: int) -> str:
    """What a task does that fails with this status; srun then kills the others."""
    return f'"{sys.executable}" -c "from orogen.launch.verdict import tell; tell({status})"; exit 137'


def test_bad_input_of_one_process_never_goes_back(ran, tmp_path):
    (tmp_path / "slurm-17.status").write_text("2")  # of an attempt before, which does not count
    job = Job(processes=2, restarts=2)
    assert ran(job, TASK, "exit 137").wait(20) == 137
    assert said(tmp_path, "scontrol") == ["requeue", "17"]
    assert ran(job, TASK, telling(2)).wait(20) == 2
    assert said(tmp_path, "scontrol") is None and failures(tmp_path) == 1


def test_a_command_tells_how_the_first_process_failed(tmp_path, monkeypatch, capsys):
    told = tmp_path / "told"
    monkeypatch.setenv("OROGEN_VERDICT", str(told))
    assert main(["params", "--gin_file", "gin_configs/recipes/quickstart.gin"]) == 0
    assert not told.exists()
    for words in (["params", "--gin_file", str(tmp_path / "none.gin")], ["params", "--no_such_option"]):
        with contextlib.suppress(SystemExit):
            assert main(words) == 2
        assert told.read_text() == "2\n"
        told.unlink()
    told.write_text("1\n")
    assert main(["params", "--gin_file", str(tmp_path / "none.gin")]) == 2
    assert told.read_text() == "1\n"
    monkeypatch.setenv("OROGEN_VERDICT", str(tmp_path / "no folder" / "told"))
    assert main(["params", "--gin_file", str(tmp_path / "none.gin")]) == 2
    assert "told cannot be written (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "status"), [(AbsentError("a peer"), 1), (ConfigError("a peer"), 2)])
def test_a_peer_that_is_not_there_is_no_bad_input(monkeypatch, capsys, error, status):
    """It may be there when the task is started again."""

    def start(cluster):
        raise error

    monkeypatch.setattr("orogen.cli.distributed.start", start)
    assert main(["train", "--gin_file", "x", "--run", "y", "--cluster", "127.0.0.1:9,2,1"]) == status
    assert capsys.readouterr().err == "orogen: a peer\n"


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_before_the_time_limit_the_step_saves_and_the_job_goes_back(ran, tmp_path):
    """Whatever SLURM's own count says, and without counting as a failure."""
    body = f"""
    trap 'sleep 0.3; touch {tmp_path}/saved; exit 0' TERM
    echo $$ > {tmp_path}/task
    touch {tmp_path}/ready
    while :; do sleep 0.05; done
    """
    batch = ran(Job(processes=1), TASK, body, SLURM_RESTART_COUNT="9")
    until((tmp_path / "ready").exists)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(20) == 0
    assert said(tmp_path, "scancel") == ["--signal=TERM", "17"]
    assert (tmp_path / "saved").exists() and said(tmp_path, "scontrol") == ["requeue", "17"]
    assert failures(tmp_path) == 0


def test_tasks_that_had_not_started_are_told_again(ran, tmp_path, monkeypatch):
    """The first signal finds no task; the second one ends it as a program that has no handler yet."""
    monkeypatch.setattr("orogen.launch.slurm.AGAIN_SECONDS", 1)
    body = f"""
    until [ -e {tmp_path}/scancel.said ]; do sleep 0.05; done
    echo $$ > {tmp_path}/task
    touch {tmp_path}/ready
    while :; do sleep 0.05; done
    """
    batch = ran(Job(processes=1), TASK, body)
    until((tmp_path / "srun.said").exists)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(20) == 143
    assert (tmp_path / "ready").exists() and said(tmp_path, "scontrol") == ["requeue", "17"]
    assert failures(tmp_path) == 0


def test_a_failure_near_the_time_limit_counts(ran, tmp_path):
    """Such as a disk on which nothing can be saved."""
    batch = ran(Job(processes=1), TASK, f"until [ -e {tmp_path}/scancel.said ]; do sleep 0.05; done; {telling(1)}")
    until((tmp_path / "srun.said").exists)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(20) == 1
    assert said(tmp_path, "scontrol") is None


def test_a_signal_before_the_step_puts_the_job_back_without_it(ran, tmp_path):
    setup = [f"touch {tmp_path}/ready", "sleep 0.5"]
    batch = ran(Job(processes=1, setup=setup), TASK, "")
    until((tmp_path / "ready").exists)
    batch.send_signal(signal.SIGUSR1)
    assert batch.wait(20) == 0
    assert said(tmp_path, "srun") is None and said(tmp_path, "scontrol") == ["requeue", "17"]


@pytest.mark.parametrize(
    "wrong", [{"account": "a b"}, {"partition": "x\n#SBATCH --wrap=id"}, {"options": ["--comment='a"]}]
)
def test_options_that_nothing_could_quote(wrong, tmp_path):
    with pytest.raises(ConfigError, match="of sbatch; expected letters"):
        render(Job(processes=1, **wrong), TASK, tmp_path)


def test_processes_fill_nodes(tmp_path):
    with pytest.raises(ConfigError, match="--processes is 6; expected a multiple of --per_node = 4"):
        render(Job(processes=6, per_node=4), TASK, tmp_path)


def test_submission(tmp_path, monkeypatch):
    program = tmp_path / "sbatch"
    fails = '[ -z "$FAIL" ] || { echo no such partition >&2; exit 1; }'
    program.write_text(f"#!/bin/bash\ncat > {tmp_path}/script\n{fails}\necho '123;cluster'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert submit("text", tmp_path / "logs") == "123"
    assert (tmp_path / "script").read_text() == "text" and (tmp_path / "logs").is_dir()
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(ConfigError, match="sbatch --parsable ended with status 1: no such partition"):
        submit("text", tmp_path / "logs")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="sbatch is not on the PATH; expected it, or --dry_run"):
        submit("text", tmp_path / "logs")
