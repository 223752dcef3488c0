"""A run on two processes is the run on one: the same metrics and checkpoints, to the bit; and what else takes two.

The processes are compiled with less optimisation than users' are. Under all of the flags with which other tests compile
fast, XLA:CPU does not compile the optimizer's update to the same code in both kinds of run (observed with jax 0.10.1).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tests.launch import pair
from tests.train.kills import write_recipe

from orogen.cli import main
from orogen.launch import command as launcher
from orogen.report.lost import read_lost

MODEL = """
ModelConfig.pattern = 'E'
ModelConfig.n_routed_experts = 4
ModelConfig.num_experts_per_tok = 2
ModelConfig.moe_intermediate_size = 10
"""
TIMED = ("_ms", "_seconds", "_per_second", "_processes")  # how the names of metrics of time end
ROOT = Path(__file__).parents[2]
FLAGS = "--xla_backend_optimization_level=1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where both programs of `pair` have left what they did. The two processes are started by `orogen launch local`."""
    folder = tmp_path_factory.mktemp("pair")
    recipe = write_recipe(folder, MODEL)
    program = lambda name: [sys.executable, "-m", "tests.launch.pair", name, str(recipe), str(folder)]  # noqa: E731
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XLA_FLAGS", FLAGS)
        patched.delenv("NPROC", raising=False)
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patched.setattr(launcher, "command", lambda task, resume=False: program("together"))
        one = subprocess.Popen(program("alone"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        words = ["--processes", "2", "--logs", str(folder / "logs"), "--", "train", "--fake_devices=2"]
        status = main(["launch", "local", *words])
        said = one.communicate()[1]
    assert status == 0, (folder / "logs" / "process_0.err").read_text() + said
    assert one.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def facts(folder) -> list[dict]:
    """What each process saw."""
    return [json.loads((folder / f"facts.{number}").read_text()) for number in (0, 1)]


def metrics(run: Path) -> list[dict]:
    """The metrics that do not depend on time."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.endswith(TIMED)} for record in records]


def arrays(run: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint."""
    found = {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("model", "trainer"):
        handler, folder = ocp.StandardCheckpointHandler(), run / "checkpoints" / str(step) / item
        saved = handler.metadata(folder)
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            for name, leaf in getattr(saved, "tree", saved).items()
        }
        restored = handler.restore(folder, args=ocp.args.StandardRestore(target))
        found |= {f"{item}.{name}": np.asarray(leaf).tobytes() for name, leaf in restored.items()}
    return found


def assert_same(one: Path, two: Path, step: int) -> None:
    """Whole scores of the last step of a part are left out: an uninterrupted run does not have them."""
    sampled = lambda run: [{k: v for k, v in one.items() if not k.startswith("whole")} for one in metrics(run)]  # noqa: E731
    assert sampled(one) == sampled(two) and len(sampled(one)) == step
    a, b = arrays(one, step), arrays(two, step)
    assert [name for name in a if a[name] != b[name]] == [] and a.keys() == b.keys()


def test_two_processes_begin_as_one_and_one_goes_on(folder, facts):
    assert [one["began"] for one in facts] == [0, 0]
    assert_same(folder / "crossing.alone", folder / "crossing", 3)
    assert facts[0]["wrote"] == [True, True]  # the report and the samples, before the other program went on


def test_one_process_answers_and_gloo_is_silent(folder):
    assert json.loads((folder / "logs" / "process_0.out").read_text())["step"] == 2
    assert (folder / "logs" / "process_1.out").read_text() == ""


def test_a_plan_that_leaves_a_process_without_a_part(folder, facts):
    assert [one["refused"] for one in facts] == [2, 2]
    said = (folder / "logs" / "process_0.err").read_text()
    assert "PlanConfig asks for 2 devices; expected the 4 that the 2 processes have" in said


def test_one_process_begins_and_two_go_on_and_back_past_a_bad_batch(folder, facts):
    assert json.loads((folder / "mixed" / "env.json").read_text())["processes"] == 2
    assert_same(folder / "mixed.alone", folder / "mixed", 4)
    (loss,), (expected,) = read_lost(folder / "mixed"), read_lost(folder / "mixed.alone")
    assert (loss.to, loss.until, loss.cause) == (2, 3, "roll_back")
    assert loss.position == expected.position is not None
    back = "going back to checkpoint 2, past the batches of steps 3 to 3"
    assert all(sum(line.endswith(back) for line in one["lines"]) == 1 for one in facts)


def test_the_slow_process_is_named(folder):
    *_, last = [json.loads(line) for line in (folder / "mixed" / "metrics.jsonl").read_text().splitlines()]
    assert last["slow_processes"] == [pair.SLOW] and len(last["device_ms"]) == 2
    assert last["host_ms"][pair.SLOW] > 1e3 * pair.SLOW_SECONDS > last["host_ms"][0]


def test_the_minutes_of_the_first_process_count(folder):
    """The other's clock stands. `checkpoint_every` does not name step 3; the last two checkpoints are kept."""
    assert sorted(int(path.name) for path in (folder / "mixed" / "checkpoints").iterdir()) == [3, 4]


@pytest.mark.parametrize(("name", "process"), pair.FAULTS.items())
def test_a_write_that_fails_on_one_process_fails_on_both_at_once(facts, name, process):
    """And the next checkpoint is whole."""
    for number, one in enumerate(facts):
        found = one["saves"][name]
        assert "could not be written" in found["error"] and found["seconds"] < 20
        elsewhere = "another process could not do its part" in found["error"]
        assert elsewhere == (number != process and name != "the folder")
        assert found["whole"] and found["folders"] == [str(found["step"])]


def test_no_thread_of_a_failed_write_is_left(facts):
    assert [one["saves"]["threads"] for one in facts] == [[], []]
