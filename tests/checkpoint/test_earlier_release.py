"""Run folders that release 0.8.0 wrote open to the bit, and resume within rounding.

The hashes of their leaves come from that release's reader, the losses from its run of four steps
(fixtures/checkpoints).
"""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.helpers import several_devices

from orogen.checkpoint.open import open_model
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.report.metrics import read_metrics
from orogen.train.pretraining import PRETRAINING
from orogen.train.run import train

FOLDER = Path(__file__).parent.parent / "fixtures" / "checkpoints"
MADE = json.loads((FOLDER / "leaves.json").read_text())
STAGES = ["PlanConfig.stage=2", "PlanConfig.microbatches=2"]
BINDINGS = {"whole": [], "stages": ["ModelConfig.pattern='-|*'", *STAGES]}

pytestmark = [several_devices, pytest.mark.parametrize("name", BINDINGS)]


@pytest.fixture
def run_dir(name, tmp_path, monkeypatch) -> Path:
    """A copy of the run folder; the working directory is that of the corpus."""
    monkeypatch.chdir(FOLDER)
    return Path(shutil.copytree(FOLDER / name, tmp_path / "run"))


def hashes(tree) -> dict[str, str]:
    """The hash of each leaf's bytes, by the leaf's name in the files."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")  # noqa: E731
    digest = lambda leaf: hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()  # noqa: E731
    return {name(path): digest(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def losses_after(run_dir: Path) -> dict[str, float]:
    """The losses of the steps after the checkpoint."""
    return {str(record["step"]): record["loss"] for record in read_metrics(run_dir) if record["step"] > 2}


@pytest.mark.parametrize("plan", [None, PlanConfig(stage=2, microbatches=2)], ids=["one device", "stages"])
def test_it_opens(name, run_dir, plan):
    opened = open_model(run_dir, plan)
    whole = jax.jit(opened.built.whole)
    assert hashes({"params": whole(opened.params), "buffers": whole(opened.buffers)}) == MADE[name]["opened"]
    assert opened.tokenizer is not None and opened.tokenizer.decode(opened.tokenizer.encode("two")) == "two"


def test_it_resumes(name, run_dir):
    resume = lambda *more: train(  # noqa: E731
        *load([FOLDER / "recipe.gin"], [*BINDINGS[name], *more]), run_dir, PRETRAINING, resume=True, log=print
    )
    restored = resume()
    assert restored.steps == 0
    assert hashes(restored.state._asdict()) == MADE[name]["saved"]
    resume("TrainConfig.steps=4")
    assert losses_after(run_dir) == pytest.approx(MADE[name]["losses"], rel=1e-6)


def test_it_resumes_in_another_layout(name, run_dir):
    """A whole model resumes on stages, and one in stages on one device."""
    plan = STAGES if name == "whole" else []
    bindings = [*(line for line in BINDINGS[name] if line not in STAGES), *plan, "TrainConfig.steps=4"]
    train(*load([FOLDER / "recipe.gin"], bindings), run_dir, PRETRAINING, resume=True, log=print)
    assert losses_after(run_dir) == pytest.approx(MADE[name]["losses"], rel=1e-5)
