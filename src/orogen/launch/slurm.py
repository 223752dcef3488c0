"""A task as a batch job of SLURM.

The job's script starts one process per node, or more that share its GPUs, by srun. It lets SLURM tell it 120 seconds
before the time limit, tells the processes, which save and end, and puts the job back into the queue, where it
continues. A job that fails goes back too, a limited number of times, unless its input is bad; one whose node fails is
put back by SLURM. Failures are counted in a file beside the logs, since SLURM's own count includes the time limits.

Tried with SLURM 22.05, two nodes on one machine (`slurmd -N n1` and `-N n2`, each with a port of its own, the names n1
and n2 in /etc/hosts): after SIGKILL of a task, and after the signal that comes before the time limit, whether it came
during `setup` or while the tasks ran, the run went on; bad input of one task ended the job.
"""

import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from orogen.command import EXIT_BAD_INPUT
from orogen.config.checks import ConfigError
from orogen.launch.task import command, job_name, resuming
from orogen.launch.verdict import VARIABLE as VERDICT
from orogen.parallel.cluster import SLURM, VARIABLE

SUBMIT = "sbatch"
BEFORE_LIMIT_SECONDS = 120
# Characters of options that sbatch reads from comments of the script, where nothing quotes.
PLAIN = re.compile(r"[\w.,:@%/+=\[\]*-]+")

# USR1 comes from --signal alone; TERM would also come from scancel, after which a job should not come back. The handler
# only notes it, so that it may come at any time. The loop tells the tasks, by scancel since srun would kill them, and
# more than once since srun may not have started them yet. A task that TERM ends (143) was starting, or had saved.
SCRIPT = """\
#!/bin/bash
{options}

ending=0
trap 'ending=1' USR1
failures={logs}/slurm-$SLURM_JOB_ID.failures
export {verdict}={logs}/slurm-$SLURM_JOB_ID.status  # of the first task that failed by itself
rm -f "${verdict}"
export {variable}={system}
{setup}task=({task})
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then
  task=({continued})
fi

status=0
if [ "$ending" = 0 ]; then
  # Since 22.05, srun does not take this number over from sbatch.
  srun --kill-on-bad-exit=1 --label ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} "${{task[@]}}" &
  step=$!
  next=0
  while kill -0 "$step" 2>/dev/null; do
    if [ "$ending" = 1 ] && [ "$SECONDS" -ge "$next" ]; then
      scancel --signal=TERM "$SLURM_JOB_ID"
      next=$((SECONDS + {again}))
    fi
    sleep 1
  done
  wait "$step"
  status=$?
fi

if [ -e "${verdict}" ]; then
  status=$(cat "${verdict}")
fi
if [ "$ending" = 1 ] && {{ [ "$status" = 0 ] || [ "$status" = 143 ]; }}; then
  echo "orogen: the time limit is near; the job goes back to the queue"
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" != 0 ] && [ "$status" != {bad_input} ]; then
  failed=$(( $(cat "$failures" 2>/dev/null || echo 0) + 1 ))
  if [ "$failed" -le {restarts} ] && echo "$failed" >"$failures"; then
    echo "orogen: the step ended with status $status; the job goes back to the queue, failure $failed of {restarts}"
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
"""
AGAIN_SECONDS = 30  # longer than a task that has saved takes to end


class Job(NamedTuple):
    """The resources of a job. processes: in all; per_node: processes on each node; gpus: per node; cpus: per process;
    time, memory: as sbatch reads them; setup: lines of shell that run before the task; options: more options of
    sbatch."""

    processes: int
    per_node: int = 1
    restarts: int = 0
    gpus: int | None = None
    cpus: int | None = None
    time: str | None = None
    memory: str | None = None
    account: str | None = None
    partition: str | None = None
    setup: Sequence[str] = ()
    options: Sequence[str] = ()


def render(job: Job, task: Sequence[str], logs: Path) -> str:
    """The script that sbatch takes. Raises ConfigError."""
    if job.processes % job.per_node:
        raise ConfigError(f"--processes is {job.processes}; expected a multiple of --per_node = {job.per_node}")
    asked = {
        "job-name": job_name(task),
        "nodes": job.processes // job.per_node,
        "ntasks-per-node": job.per_node,
        "gpus-per-node": job.gpus,
        "cpus-per-task": job.cpus,
        "time": job.time,
        "mem": job.memory,
        "account": job.account,
        "partition": job.partition,
        "output": logs.absolute() / "slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{BEFORE_LIMIT_SECONDS}",
    }
    lines = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    for line in (*lines, *job.options):
        if PLAIN.fullmatch(line) is None:
            raise ConfigError(f"option {line!r} of {SUBMIT}; expected letters, digits and {'.,:@%/+=[]*-_'!r} alone")
    return SCRIPT.format(
        logs=shlex.quote(str(logs.absolute())),
        again=AGAIN_SECONDS,
        verdict=VERDICT,
        bad_input=EXIT_BAD_INPUT,
        options="\n".join(f"#SBATCH {line}" for line in (*lines, "--requeue", *job.options)),
        variable=VARIABLE,
        system=SLURM,
        setup="".join(f"{line}\n" for line in job.setup),
        task=shlex.join(command(task)),
        continued=shlex.join(command(resuming(task))),
        restarts=job.restarts,
    )


def submit(script: str, logs: Path) -> str:
    """Submits the script to SLURM. Returns the job's number. Raises ConfigError if SLURM is missing or refuses it."""
    logs.mkdir(parents=True, exist_ok=True)  # SLURM does not make it
    return output_of([SUBMIT, "--parsable"], script).partition(";")[0]


def output_of(program: Sequence[str], text: str) -> str:
    """The output of a program that gets `text` on stdin. Raises ConfigError if it is missing or fails."""
    try:
        done = subprocess.run(program, input=text, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{program[0]} is not on the PATH; expected it, or --dry_run") from None
    if done.returncode:
        raise ConfigError(f"{shlex.join(program)} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()
