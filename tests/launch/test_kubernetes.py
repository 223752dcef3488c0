"""The JobSet: its Job against Kubernetes' own schemas, the rest against what the JobSet API says, its shell by sh."""

import os
import subprocess
import time

import pytest
import yaml

from orogen.config.checks import ConfigError
from orogen.launch.kubernetes import Pods, manifest, render
from orogen.parallel.cluster import Cluster, read_cluster

TASK = ["train", "--gin_file", "a.gin", "--run", "/runs/x", "--gin_bindings", "DataConfig.corpus='it''s $HOME `id`'"]
PODS = Pods("a-run", "registry/orogen:1", 4, restarts=3, gpus=8, cpus="16", memory="200Gi", namespace="lab",
            claims=["runs:/runs", "texts:/data/texts"])  # fmt: skip


@pytest.fixture
def jobset():
    return yaml.safe_load(manifest(PODS, TASK))


def job_of(jobset: dict) -> dict:
    (group,) = jobset["spec"]["replicatedJobs"]
    return group["template"]["spec"]


def test_the_yaml_is_the_jobset(jobset):
    assert jobset == render(PODS, TASK)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    assert jobset["metadata"] == {"name": "a-run", "namespace": "lab"}


def test_kubernetes_accepts_the_job(jobset):
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": job_of(jobset)}
    version = validate.latest_version()
    validate.validate(job, version, strict=True)
    job["spec"]["backofLimit"] = 0  # the schema sees a misspelt field
    with pytest.raises(validate.ValidationError):
        validate.validate(job, version, strict=True)


def test_every_process_has_a_pod_and_knows_the_first(jobset):
    job = job_of(jobset)
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    (container,) = job["template"]["spec"]["containers"]
    given = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    # <jobset>-<group>-<job's index>-<pod's index>.<jobset>, by network.enableDNSHostnames
    found = read_cluster(given["OROGEN_CLUSTER"], {**given, "JOB_COMPLETION_INDEX": "2"})
    assert found == Cluster("a-run-workers-0-0.a-run:55527", 4, 2)
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "cpu": "16", "memory": "200Gi"}
    volumes = {one["name"]: one["persistentVolumeClaim"]["claimName"] for one in job["template"]["spec"]["volumes"]}
    assert [(volumes[one["name"]], one["mountPath"]) for one in container["volumeMounts"]] == [
        ("runs", "/runs"), ("texts", "/data/texts"),
    ]  # fmt: skip


def test_failures_restart_all_pods_and_bad_input_does_not(jobset):
    policy, job = jobset["spec"]["failurePolicy"], job_of(jobset)
    assert policy["maxRestarts"] == 3 and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    assert policy["rules"] == [
        {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]


@pytest.fixture
def shell(jobset, tmp_path):
    """(body of a stand-in for orogen, environment) -> the container's command, running."""

    def run(body: str, **environment: str) -> subprocess.Popen:
        program = tmp_path / "orogen"
        program.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {tmp_path}/said\n{body}\n')
        program.chmod(0o755)
        (container,) = job_of(jobset)["template"]["spec"]["containers"]
        given = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.Popen(container["command"], env={**os.environ, **given, "PATH": path, **environment})

    return run


@pytest.mark.parametrize(("attempt", "more"), [("0", []), ("1", ["--resume"])])
def test_the_task_arrives_as_it_was_written_and_resumes(shell, tmp_path, attempt, more):
    assert shell("exit 7", RESTART_ATTEMPT=attempt).wait(20) == 7
    assert (tmp_path / "said").read_text().split("\0")[:-1] == [*TASK, *more]


def test_a_pod_that_is_told_to_end_saves_and_counts_as_failed(shell, tmp_path):
    body = (
        f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 0' TERM\ntouch {tmp_path}/ready\nwhile :; do sleep 0.05; done"
    )
    pod = shell(body)
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    pod.terminate()
    assert pod.wait(20) == 75
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_while_the_task_is_started_is_not_lost(shell, jobset, moment):
    """The shell sends it to itself, and the task would run for long."""
    start = '"$@" &\n'
    signal = "kill -TERM $$\n"
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    text = container["command"][2]
    assert text.count(start) == 1
    container["command"][2] = text.replace(start, signal + start if moment == "before" else start + signal)
    pod = shell("exec sleep 60")
    assert pod.wait(20) == 143  # the task ended by the signal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "A run"}, "--name is 'A run'; expected at most 42"),
        ({"name": "x" * 43}, "--name is 'x"),
        ({"claims": ["runs"]}, "--volume is 'runs'; expected CLAIM:PATH"),
        ({"claims": ["runs:relative"]}, "--volume is 'runs:relative'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ConfigError, match=message):
        render(PODS._replace(**changes), TASK)
