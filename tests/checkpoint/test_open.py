"""Every kind of checkpoint folder opens on every plan, in every dtype, with the numbers that it holds."""

import dataclasses
import itertools
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tests.convert.synthetic import short_nemotron_h, write
from tests.helpers import several_devices

from orogen.checkpoint.leaves import dotted, leaves_of
from orogen.checkpoint.open import open_folder, open_model
from orogen.checkpoint.steps import Checkpoints
from orogen.checkpoint.transfer import from_hf
from orogen.config.checks import ConfigError
from orogen.config.load import load
from orogen.config.plan import PlanConfig
from orogen.config.text import model_text
from orogen.cost.assemble import assemble
from orogen.model.lm import build
from orogen.model.vocabulary import vocab_dim
from orogen.parallel import placement

WORDS = 95  # odd: every plan that splits the vocabulary adds a row
PLANS = {
    "one device": None,
    "tensor and data": PlanConfig(tensor=2, data=2, expert=2, fsdp="parameters"),
    "stages": PlanConfig(stage=2, microbatches=2),
    "stages with more rows": PlanConfig(stage=2, tensor=2, microbatches=2),
}
KINDS = ("run", "staged run", "orogen", "hugging face")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One model, in a folder of each kind."""
    root = tmp_path_factory.mktemp("folders")
    found = {kind: root / kind.replace(" ", "_") for kind in KINDS}
    write(found["hugging face"], *short_nemotron_h(WORDS), "float32")
    from_hf(found["hugging face"], found["orogen"])
    for kind, plan in (("run", PlanConfig()), ("staged run", PlanConfig(stage=2, tensor=2, microbatches=2))):
        save_run(found[kind], found["orogen"], plan)
    return found


def numbers(orogen: Path) -> dict[str, np.ndarray]:
    """The numbers that the folders hold, read without Orogen."""
    return load_file(orogen / "model.safetensors")


def save_run(folder: Path, orogen: Path, plan: PlanConfig) -> None:
    """A run folder with the numbers of an Orogen folder, saved after step 3 in the plan's layout."""
    model = load([orogen / "config.gin"])[0].model
    folder.mkdir()
    (folder / "config.gin").write_text(model_text(model))
    held, (_, built) = numbers(orogen), assemble(model, plan)
    whole = build(model)
    filled = [nnx.from_flat_state([(p, x.replace(jnp.asarray(held[dotted(p)]))) for p, x in leaves_of(tree).items()])
              for tree in (whole.params, whole.buffers)]  # fmt: skip
    params, buffers = map(jax.jit(built.laid), filled)
    items = {"model": {"params": params, "buffers": buffers}, "trainer": {"step": jnp.asarray(3)}}
    with Checkpoints(folder, model=model) as checkpoints:
        checkpoints.save(3, items, {"position": {}, "identity": {}}, built.layout)


@several_devices
class TestOpenModel:
    """The same checks for every kind of folder, plan and dtype. Each kind and each plan meets float32 and bfloat16."""

    @pytest.mark.parametrize(
        ("kind", "plan", "dtype"),
        [
            *(
                (kind, plan, ("float32", "bfloat16")[(i + j) % 2])
                for (i, kind), (j, plan) in itertools.product(enumerate(KINDS), enumerate(PLANS))
            ),
            *itertools.product(KINDS, ("one device",), ("float16",)),
            ("staged run", "tensor and data", "float16"),
        ],
    )
    def test_every_number_is_there(self, folders, kind, plan, dtype):
        opened = open_model(folders[kind], PLANS[plan], dtype)
        built, there = opened.built, placement.shardings((opened.built.params, opened.built.buffers), opened.plan)
        for leaf, wanted, sharding in zip(
            jax.tree.leaves((opened.params, opened.buffers)),
            jax.tree.leaves((built.params, built.buffers)),
            jax.tree.leaves(there),
            strict=True,
        ):
            assert (leaf.shape, leaf.sharding) == (wanted.shape, sharding)
        for leaf in leaves_of(opened.params).values():  # the plan's padding rows
            if (dim := vocab_dim(leaf)) is not None:
                vectors = np.moveaxis(np.asarray(leaf.get_value()), dim, 0)
                assert len(vectors) == built.vocab_rows and not vectors[WORDS:].any()
        wide, held = leaves_of(built.buffers).keys(), numbers(folders["orogen"])
        whole = [jax.jit(built.whole)(tree) for tree in (opened.params, opened.buffers)]
        for path, leaf in leaves_of(*whole).items():
            vector = len(leaf.get_metadata()["axes"]) == 1
            kept = path in wide or vector or "router" in path
            expected = held.pop(dotted(path)).astype(jnp.float32 if kept else jnp.dtype(dtype))
            assert leaf.get_value().dtype == expected.dtype, path
            assert np.asarray(leaf.get_value()).tobytes() == expected.tobytes(), path
        assert not held

    @pytest.mark.parametrize("dtype", ["int8", "float64", "half"])
    def test_an_unsupported_dtype_is_refused(self, folders, dtype):
        with pytest.raises(ConfigError, match=f"dtype is '{dtype}'; expected float32, bfloat16, float16"):
            open_model(folders["orogen"], None, dtype)


@several_devices
@pytest.mark.parametrize("kind", ["run", "orogen"])
def test_a_number_too_large_for_the_dtype_is_refused_by_name(folders, tmp_path, kind):
    held = numbers(folders["orogen"])
    name = next(name for name in held if name.endswith("mixer.query"))
    held[name].flat[7] = -7e4
    shutil.copytree(folders["orogen"], tmp_path / "orogen")
    (tmp_path / "orogen" / "checksums.sha256").unlink()
    save_file(held, tmp_path / "orogen" / "model.safetensors")
    save_run(tmp_path / "run", tmp_path / "orogen", PlanConfig())
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} holds .*65504"):
        open_model(tmp_path / kind, None, "float16")
    assert open_model(tmp_path / kind, None, "bfloat16").params


def test_a_folder_of_no_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config.gin and no config.json; expected a run folder, an Orogen"):
        open_folder(tmp_path)


@several_devices
def test_a_run_whose_config_states_another_model_is_refused(folders, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders["staged run"], folder)
    model = load([folder / "config.gin"])[0].model
    for field, value in {"routed_scaling_factor": 1.5, "pattern": "EM*E", "hidden_size": 48}.items():
        (folder / "config.gin").write_text(model_text(dataclasses.replace(model, **{field: value})))
        with pytest.raises(ConfigError, match=re.escape(f"another model: ModelConfig.{field} is {value!r}")):
            open_model(folder)
