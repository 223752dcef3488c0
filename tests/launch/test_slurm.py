"""The script of a batch job. bash reads it here; SLURM itself is stood in for by its commands' names."""

import os
import shlex
import stat
import subprocess
import sys
import time

import pytest

from orogen.config.checks import ConfigError
from orogen.launch.slurm import Job, render, submit

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
        bin_dir.mkdir()
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
    )
    assert batch.wait(20) == 0
    assert said(tmp_path, "srun") == ["--kill-on-bad-exit=1", "--label", sys.executable, "-m", "orogen.cli", *TASK]
    assert (tmp_path / "env").read_text() == "slurm x  y\n"
    assert said(tmp_path, "scontrol") is None


def test_a_job_that_was_put_back_resumes(ran, tmp_path):
    assert ran(Job(processes=1), TASK, "", SLURM_RESTART_COUNT="1").wait(20) == 0
    assert said(tmp_path, "srun")[-1] == "--resume"


@pytest.mark.parametrize(
    ("status", "count", "back"), [(1, 0, True), (137, 1, True), (1, 2, False), (2, 0, False), (0, 0, False)]
)
def test_failures_go_back_to_the_queue_a_limited_number_of_times(ran, tmp_path, status, count, back):
    batch = ran(Job(processes=1, restarts=2), TASK, f"exit {status}", SLURM_RESTART_COUNT=str(count))
    assert batch.wait(20) == status
    assert said(tmp_path, "scontrol") == (["requeue", "17"] if back else None)


def test_before_the_time_limit_the_step_saves_and_the_job_goes_back(ran, tmp_path):
    body = f"""
    trap 'sleep 0.3; touch {tmp_path}/saved; exit 0' TERM
    echo $$ > {tmp_path}/task
    touch {tmp_path}/ready
    while :; do sleep 0.05; done
    """
    batch = ran(Job(processes=1), TASK, body)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    batch.send_signal(10)  # USR1
    assert batch.wait(20) == 0
    assert said(tmp_path, "scancel") == ["--signal=TERM", "17"]
    assert (tmp_path / "saved").exists() and said(tmp_path, "scontrol") == ["requeue", "17"]


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
