"""A task as a JobSet of Kubernetes (jobset.x-k8s.io/v1alpha2, https://jobset.sigs.k8s.io).

The JobSet is one indexed Job with a pod for each process; the first pod, by its name in the headless service that the
JobSet creates, is the coordinator. If a pod fails, all are recreated and continue, a limited number of times, unless
the input is bad. A pod that Kubernetes ends saves with the others and then counts as failed, since the run is not over.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orogen.command import EXIT_BAD_INPUT
from orogen.config.checks import ConfigError
from orogen.launch.slurm import output_of
from orogen.launch.task import RESUME, resuming
from orogen.parallel.cluster import COORDINATOR, COUNT, KUBERNETES, VARIABLE
from orogen.parallel.distributed import START_VARIABLE

SUBMIT = ("kubectl", "create", "-f", "-")
PORT = 55527  # the one that JAX uses in Kubernetes
GROUP = "workers"
GRACE_SECONDS = 120  # to save in, before Kubernetes kills a pod
START_SECONDS = 1800  # of waiting for the other pods: a node may have to be started and to pull the image
STOPPED = 75  # the exit status of a process that stopped because its pod was told to (EX_TEMPFAIL of sysexits.h)
NAME = re.compile(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?")  # pods add to it, and have names of 63 letters at most
CLAIM = re.compile(r"([a-z0-9][a-z0-9.-]*):(/[^:]*)")

# `$@` is the task. sh passes SIGTERM on, also one that comes before the task runs; it ends `wait`, so that sh waits
# again. A signal that meets the task between fork and exec is lost, hence the second one after a moment.
SHELL = f"""\
asked=0
trap 'asked=1; [ -z "$!" ] || kill -TERM "$!"' TERM
[ "${{RESTART_ATTEMPT:-0}}" = 0 ] || set -- "$@" ${{CONTINUE:-}}
[ "$asked" = 0 ] || exit {STOPPED}
"$@" &
sleep 1
[ "$asked" = 0 ] || kill -TERM "$!"
task=$!
wait "$task"
status=$?
while kill -0 "$task" 2>/dev/null; do
  wait "$task"
  status=$?
done
[ "$asked" = 1 ] && [ "$status" = 0 ] && exit {STOPPED}
exit "$status"
"""


class Pods(NamedTuple):
    """The pods of a task. processes: pods in all; gpus, cpus, memory: per pod; claims: CLAIM:PATH of volumes that all
    pods share."""

    name: str
    image: str
    processes: int
    restarts: int = 0
    gpus: int | None = None
    cpus: str | None = None
    memory: str | None = None
    namespace: str | None = None
    claims: Sequence[str] = ()


def render(pods: Pods, task: Sequence[str]) -> dict[str, Any]:
    """The JobSet, as plain data. Raises ConfigError."""
    if NAME.fullmatch(pods.name) is None:
        raise ConfigError(f"--name is {pods.name!r}; expected at most 42 letters a to z, digits and -, a letter first")
    metadata = {"name": pods.name, **({"namespace": pods.namespace} if pods.namespace else {})}
    bad_input = {"containerName": "task", "operator": "In", "values": [EXIT_BAD_INPUT]}
    job = {
        "parallelism": pods.processes,
        "completions": pods.processes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": bad_input}]},
        "template": {"spec": _pod(pods, task)},
    }
    hopeless = {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": pods.restarts, "rules": [hopeless]},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": GROUP, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pod(pods: Pods, task: Sequence[str]) -> dict[str, Any]:
    claims = [_claim(text) for text in pods.claims]
    limits = {"nvidia.com/gpu": pods.gpus, "cpu": pods.cpus, "memory": pods.memory}
    container = {
        "name": "task",
        "image": pods.image,
        "command": ["/bin/sh", "-c", SHELL, "sh", "orogen", *task],
        "env": _environment(pods, task),
        "resources": {"limits": {name: str(value) for name, value in limits.items() if value is not None}},
        "volumeMounts": [{"name": f"volume-{k}", "mountPath": path} for k, (_, path) in enumerate(claims)],
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
        "volumes": [
            {"name": f"volume-{k}", "persistentVolumeClaim": {"claimName": claim}}
            for k, (claim, _) in enumerate(claims)
        ],
    }


def _environment(pods: Pods, task: Sequence[str]) -> list[dict[str, Any]]:
    """The variables of the container. Kubernetes adds JOB_COMPLETION_INDEX."""
    values: Mapping[str, str] = {
        VARIABLE: KUBERNETES,
        COORDINATOR: f"{pods.name}-{GROUP}-0-0.{pods.name}:{PORT}",
        COUNT: str(pods.processes),
        START_VARIABLE: str(START_SECONDS),
        "CONTINUE": RESUME if len(resuming(task)) > len(task) else "",
    }
    attempt = {"fieldRef": {"fieldPath": "metadata.annotations['jobset.sigs.k8s.io/restart-attempt']"}}
    written = [{"name": name, "value": value} for name, value in values.items()]
    return [*written, {"name": "RESTART_ATTEMPT", "valueFrom": attempt}]


def _claim(text: str) -> tuple[str, str]:
    parts = CLAIM.fullmatch(text)
    if parts is None:
        raise ConfigError(f"--volume is {text!r}; expected CLAIM:PATH, with an absolute path")
    return parts[1], parts[2]


def manifest(pods: Pods, task: Sequence[str]) -> str:
    """The JobSet as YAML."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes text of several lines as such."""

    def written(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    Dumper.add_representer(str, written)
    return yaml.dump(render(pods, task), Dumper=Dumper, sort_keys=False, width=120)


def submit(text: str) -> str:
    """Submits the manifest to Kubernetes. Returns kubectl's output. Raises ConfigError if kubectl is missing or
    fails."""
    return output_of(SUBMIT, text)
