"""A step read from a file computes the bits of one that is traced, and is found only where nothing has changed."""

import jax
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, several_devices

from orogen.config.checks import ConfigError
from orogen.cost.assemble import assemble
from orogen.parallel import kept
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
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
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


@several_devices
def test_a_step_of_another_task_is_not_kept():
    config = run_config(MODEL, plan={}, batch_size=4, sequence_length=16, keep_program=True)
    plan, built = assemble(MODEL, config.plan, length=16)
    with pytest.raises(ConfigError, match="keep_program is True; expected False where a run has another task"):
        StepPrograms(built, NEXT_TOKEN, config, plan, optimizer_of(config, built))
