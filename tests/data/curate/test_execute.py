"""Passes submitted to SLURM: one array of jobs per pass, each after the one before."""

import re

import pytest
from datatrove.executor import slurm

from orogen.config.curate import CurateConfig, DedupConfig
from orogen.data.curate.execute import Resources
from orogen.data.curate.run import curate, prepare

from .corpora import texts, write_jsonl


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """What sbatch would get: (script, options) of each job."""
    jobs = []

    def launch(script, retriever, *options):
        jobs.append((script, options))
        return str(100 + len(jobs))

    monkeypatch.setattr(slurm, "launch_slurm_job", launch)
    monkeypatch.chdir(tmp_path)
    return jobs


def test_every_pass_is_an_array_of_jobs_after_the_one_before(submitted, tmp_path):
    for name in "abc":
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", texts(2))
    config = CurateConfig(
        sources=(("in", str(tmp_path / "in")),), stages=(DedupConfig(bands=4, rows=2),), shard_bytes=1
    )
    resources = Resources("slurm", workers=2, partition="cpu", time="01:00:00", memory_gb=3, setup="module load x")
    job = curate(config, prepare(config, "", tmp_path / "out"), resources, lambda out, facts: None)
    # Beside each pass, datatrove submits a job that joins its statistics, which nothing waits for.
    passes = [(number, *job) for number, job in enumerate(submitted, 101) if "launch_pickled_pipeline" in job[0]]
    names = [re.search(r"--job-name=curate-(\w+)", script)[1] for _, script, _ in passes]
    tasks = [int(re.search(r"--array=0-(\d+)%2", script)[1]) + 1 for _, script, _ in passes]
    assert list(zip(names, tasks, strict=True)) == [
        ("filter", 3), ("gather", 1), ("match", 5), ("choose", 1), ("write", 3), ("finish", 1),
    ]  # fmt: skip
    before = [None, *(number for number, _, _ in passes[:-1])]
    expected = [[f"--dependency=afterok:{number}"] if number else [] for number in before]
    assert [[o for o in options if "dependency" in o] for _, _, options in passes] == expected
    assert job == str(passes[-1][0]) and not (tmp_path / "out" / "manifest.json").exists()
    script = submitted[0][0]
    for line in ("--partition=cpu", "--time=01:00:00", "--mem-per-cpu=3G"):
        assert f"#SBATCH {line}" in script
    assert "module load x" in script and "launch_pickled_pipeline" in script and "--qos" not in script
