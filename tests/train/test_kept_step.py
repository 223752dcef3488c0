"""A step read from a file computes the bits of one that is traced, and is found only where nothing has changed."""

import dataclasses
import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, several_devices

from orogen.config.checks import ConfigError
from orogen.cost.assemble import assemble
from orogen.parallel import kept
from orogen.train import programs
from orogen.train.kept_step import KeptStep
from orogen.train.next_token import NEXT_TOKEN, NEXT_TOKENS
from orogen.train.programs import StepPrograms
from orogen.train.sides import packed_batch
from orogen.train.state import create_state
from orogen.train.step import batch_to_devices, make_step
from orogen.train.trained import optimizer_of

MODEL = hybrid(pattern="-", mtp_depths=0)
CONFIG = run_config(MODEL, plan={"data": 2, "fsdp": "optimizer"}, batch_size=4, sequence_length=16)


def never(*arguments):
    raise AssertionError("traced again")


@several_devices
def test_a_kept_step_has_the_bits_of_a_traced_one_and_is_not_traced_again(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_folder", lambda: tmp_path / "programs")
    plan, built = assemble(MODEL, CONFIG.plan, length=16)
    optimizer = optimizer_of(CONFIG, built)
    batch = batch_to_devices(packed_batch(CONFIG, CONFIG.train), plan)
    step = make_step(built, NEXT_TOKENS, CONFIG, plan, optimizer)

    def two(step):
        state = create_state(MODEL, built, optimizer, plan, 0)
        for _ in range(2):
            state, metrics = step(state, batch)
        return jax.device_get((state, metrics))

    expected = two(step)
    for found in (two(KeptStep(step, plan, "a")), two(KeptStep(never, plan, "a"))):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(expected)))
    (file,) = tmp_path.rglob("*.program")
    with pytest.raises(AssertionError, match="traced again"):
        two(KeptStep(never, plan, "b"))
    with monkeypatch.context() as changed, pytest.raises(AssertionError, match="traced again"):
        changed.setattr(kept, "_code", lambda: "other modules")
        two(KeptStep(never, plan, "a"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(AssertionError, match="traced again"):
        two(KeptStep(never, plan, "a"))


def test_an_equal_config_finds_the_step_and_another_learning_rate_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_folder", lambda: tmp_path / "programs")
    config = run_config(MODEL, plan={}, batch_size=4, sequence_length=16, keep_program=True)
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5))
    plan, built = assemble(MODEL, config.plan, length=16)

    def run(config):
        optimizer = optimizer_of(config, built)
        batch = batch_to_devices(packed_batch(config, config.train), plan)
        state = create_state(MODEL, built, optimizer, plan, 0)
        return StepPrograms(built, NEXT_TOKENS, config, plan, optimizer).step(1, batch)(state, batch)[1]

    expected = float(run(config).learning_rate)
    monkeypatch.setattr(programs, "make_step", lambda *_, **__: never)
    equal = run_config(MODEL, plan={}, batch_size=4, sequence_length=16, keep_program=True)
    assert float(run(equal).learning_rate) == expected
    with pytest.raises(AssertionError, match="traced again"):
        run(other)


ONE = jax.ShapeDtypeStruct((2, 3), "float32")
FACTS = {
    "name": lambda patch: ("b", [ONE]),
    "shape": lambda patch: ("a", [jax.ShapeDtypeStruct((3, 2), "float32")]),
    "dtype": lambda patch: ("a", [jax.ShapeDtypeStruct((2, 3), "bfloat16")]),
    "count": lambda patch: ("a", [ONE, ONE]),
    "code": lambda patch: patch.setattr(kept, "_code", lambda: "other modules"),
    "flags": lambda patch: patch.setenv("XLA_FLAGS", "--xla_other"),
    "versions": lambda patch: patch.setattr(kept, "_version", lambda package: "other" if package == "flax" else "same"),
    "devices": lambda patch: patch.setattr(jax, "devices", list),
    "settings": lambda patch: jax.config.update("jax_numpy_rank_promotion", "warn"),
}


@pytest.mark.parametrize("fact", FACTS)
def test_a_file_is_named_by(fact, monkeypatch):
    monkeypatch.setattr(kept, "_version", lambda package: "same")
    before = kept._digest("a", [ONE])
    assert kept._digest("a", [ONE]) == before
    promotion = jax.config.values["jax_numpy_rank_promotion"]
    try:
        assert kept._digest(*(FACTS[fact](monkeypatch) or ("a", [ONE]))) != before
    finally:
        jax.config.update("jax_numpy_rank_promotion", promotion)


@pytest.mark.parametrize("fault", ["another owner", "others write", "unreadable", "no folder", "read only"])
def test_a_file_that_cannot_be_trusted_or_had_costs_one_line(fault, tmp_path, monkeypatch, capsys):
    folder, x = tmp_path / "programs", np.ones(3, np.float32)

    def made() -> int:
        calls = []

        def function(x):
            calls.append(x)
            return x + 1

        assert np.all(kept.kept_program(function, [x], name="a", folder=folder).call(x) == 2)
        return len(calls)

    if fault in ("no folder", "read only"):
        folder.write_text("a file") if fault == "no folder" else monkeypatch.setattr(kept, "write_atomically", refused)
        assert made() == 1
    else:
        assert (made(), made(), capsys.readouterr().err) == (1, 0, "")
        assert folder.stat().st_mode & 0o777 == 0o700
        (file,) = folder.iterdir()
        assert file.stat().st_mode & 0o777 == 0o600
        if fault == "another owner":
            monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
        elif fault == "others write":
            file.chmod(0o620)
        else:
            file.unlink()
            file.mkdir()
        assert made() == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(str(folder) in line for line in lines)


def refused(*arguments):
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize(("cache", "local"), [("/somewhere/cache", True), ("gs://bucket/cache", False)])
def test_programs_are_kept_where_jax_keeps_its_own(cache, local):
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", cache)
        assert (kept._folder() == Path(cache) / "programs") == local
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_run_without_flatbuffers_is_refused_when_it_starts(monkeypatch):
    config = run_config(MODEL, plan={}, batch_size=4, sequence_length=16, keep_program=True)
    plan, built = assemble(MODEL, config.plan, length=16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package flatbuffers is not installed"):
        StepPrograms(built, NEXT_TOKENS, config, plan, optimizer_of(config, built))


@several_devices
def test_a_step_of_another_task_is_not_kept():
    config = run_config(MODEL, plan={}, batch_size=4, sequence_length=16, keep_program=True)
    plan, built = assemble(MODEL, config.plan, length=16)
    with pytest.raises(ConfigError, match="keep_program is True; expected False where a run has another task"):
        StepPrograms(built, NEXT_TOKEN, config, plan, optimizer_of(config, built))
