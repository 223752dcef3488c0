"""`orogen launch`. Importing this does not import jax, and neither does running it: the GPUs are for the task."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from orogen.command import Command, positive
from orogen.launch import kubernetes, slurm
from orogen.launch.local import Watcher, shared_gpus
from orogen.launch.task import FAKE, command, job_name, log_folder, read_task

RECIPE = "train --gin_file gin_configs/recipes/quickstart.gin --run runs/quickstart"
EXAMPLES = (
    f"orogen launch local --processes 2 --restarts 3 -- {RECIPE} --fake_devices 4",
    f"orogen launch slurm --processes 4 --gpus 8 --time 24:00:00 --partition gpu -- {RECIPE}",
    f"orogen launch slurm --processes 4 --gpus 8 --setup 'module load cuda' --dry_run -- {RECIPE}",
    f"orogen launch kubernetes --processes 4 --gpus 8 --image registry/orogen:0.8 --volume runs:/runs -- {RECIPE}",
)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number")
    return int(text)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_subparsers(required=True, metavar="WHERE", dest="where")
    helps = {
        "local": "processes of this host, with its GPUs shared out among them",
        "slurm": "a batch job of SLURM, with one process per node unless --per_node says otherwise",
        "kubernetes": "a JobSet of Kubernetes, with one pod per process",
    }
    for name, add in (("local", _add_logs), ("slurm", _add_slurm), ("kubernetes", _add_kubernetes)):
        one = where.add_parser(
            name, help=helps[name], description=f"Runs a task on {helps[name]}.",
            epilog="\n  ".join(("examples:", *(line for line in EXAMPLES if f"launch {name}" in line))),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        one.add_argument("--processes", type=positive, required=True, metavar="N", help="processes in all")
        one.add_argument("--restarts", type=_not_negative, default=0, metavar="N",
                         help="how often to start again, with --resume, after a failure; 0 by default")  # fmt: skip
        one.add_argument("--dry_run", action="store_true", help="print what would be started or submitted, and do not")
        add(one)
        one.add_argument("task", nargs=argparse.REMAINDER, metavar="-- TASK …", help="train and its options")


def _add_logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--logs", type=Path, metavar="DIR", help="where output goes; by default RUN.logs")


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    _add_logs(parser)
    parser.add_argument("--per_node", type=positive, default=1, metavar="N",
                        help="processes per node, each with one GPU; 1 by default, with all of them")  # fmt: skip
    parser.add_argument("--gpus", type=positive, metavar="N", help="GPUs per node")
    parser.add_argument("--cpus", type=positive, metavar="N", help="CPUs per process")
    parser.add_argument("--memory", metavar="SIZE", help="memory per node, such as 200G")
    parser.add_argument("--time", metavar="LIMIT", help="time limit, such as 24:00:00; the job goes on after it")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE",
                        help="a line of shell to run before the task; repeatable")  # fmt: skip
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION",
                        help="another option of sbatch, as in --sbatch=--qos=high; repeatable")  # fmt: skip


def _add_kubernetes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, help="the container image, with orogen installed")
    parser.add_argument("--name", help="of the JobSet; by default made from the run folder's")
    parser.add_argument("--namespace", metavar="NAME")
    parser.add_argument("--gpus", type=positive, metavar="N", help="GPUs per pod")
    parser.add_argument("--cpus", metavar="N", help="CPUs per pod")
    parser.add_argument("--memory", metavar="SIZE", help="memory per pod, such as 200Gi")
    parser.add_argument("--volume", action="append", default=[], metavar="CLAIM:PATH",
                        help="a persistent volume claim that all pods mount; repeatable")  # fmt: skip


def launch(options: argparse.Namespace) -> int:
    """`orogen launch`."""
    task = read_task(options.task)
    return {"local": _local, "slurm": _slurm, "kubernetes": _kubernetes}[options.where](options, task)


def _local(options: argparse.Namespace, task: list[str]) -> int:
    fake = any(word.partition("=")[0] == FAKE for word in task)
    environments = [{}] * options.processes if fake else shared_gpus(options.processes, os.environ)
    if options.dry_run:
        for number, extra in enumerate(environments):
            words = [*(f"{name}={value}" for name, value in extra.items()), *command(task)]
            print(f"process {number}: {shlex.join(words)}")
        return 0
    logs = options.logs or log_folder(task)
    return Watcher(lambda resume: command(task, resume=resume), environments, logs).run(options.restarts)


def _slurm(options: argparse.Namespace, task: list[str]) -> int:
    fields = {name: getattr(options, name) for name in slurm.Job._fields if name != "options"}
    logs = options.logs or log_folder(task)
    script = slurm.render(slurm.Job(**fields, options=options.sbatch), task, logs)
    if options.dry_run:
        sys.stdout.write(script)
    else:
        print(f"job {slurm.submit(script, logs)}; output goes to {logs}")
    return 0


def _kubernetes(options: argparse.Namespace, task: list[str]) -> int:
    fields = {name: getattr(options, name) for name in kubernetes.Pods._fields if name not in ("name", "claims")}
    pods = kubernetes.Pods(**fields, name=options.name or job_name(task), claims=options.volume)
    text = kubernetes.manifest(pods, task)
    if options.dry_run:
        sys.stdout.write(text)
    else:
        print(kubernetes.submit(text))
    return 0


LAUNCH = Command(
    name="launch",
    help="run a task on many processes: of this host, of SLURM or of Kubernetes",
    examples=EXAMPLES,
    add_arguments=_add_arguments,
    run=launch,
    bare=True,
)
