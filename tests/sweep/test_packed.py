"""What makes many short runs cheap: their seeds are in no program, nor are their rates in `experiments/packed.py`."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.long_context import extend
from experiments.packed import Packed, rated, turn
from experiments.phonebook import run as phonebook
from tests.helpers import run_config, write_recipe

from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.cost.assemble import assemble
from orogen.data.loader import open_corpus
from orogen.data.packing import Batch
from orogen.train.next_token import NEXT_TOKEN
from orogen.train.optimizer import make_optimizer
from orogen.train.pretraining import train_loader
from orogen.train.state import abstract_state, create_state
from orogen.train.step import batch_to_devices, make_step

SMALL = ModelConfig(
    pattern="*-", vocab_size=20, hidden_size=12, num_attention_heads=3, num_key_value_heads=1, head_dim=4,
    intermediate_size=10,
)  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_rate_in_the_state_is_a_rate_of_the_optimizer(name):
    """Decay and clipping included, over two updates of different rates."""
    config = run_config(SMALL)
    _, built = assemble(config.model, config.plan)
    params = jax.tree.map(lambda x: jnp.linspace(0.1, 1.0, x.size, dtype=x.dtype).reshape(x.shape), built.params)
    grads = jax.tree.map(lambda x: jnp.sin(7.0 * x), params)

    def settings(rate):
        return dataclasses.replace(
            config.optimizer, name=name, learning_rate=rate, schedule="constant", warmup_steps=0, weight_decay=0.3
        )

    packed = rated(make_optimizer(settings(1.0), 1, built.params))
    state, steps = packed.init(params), []
    for rate in (3e-3, 1e-2):
        plain = make_optimizer(settings(rate), 1, built.params)
        expected, _ = plain.update(grads, state.inner, params, grad_norm=jnp.float32(2.0))
        found, state = packed.update(grads, state._replace(rate=jnp.float32(rate)), params, grad_norm=jnp.float32(2.0))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-9), found, expected)
        steps.append(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(found)))
    assert steps[1] > 2 * steps[0] > 0


def test_a_seed_is_not_in_the_program_of_a_step():
    """So the runs of an arm share what the first one compiled."""

    def text(seed):
        config = run_config(SMALL, seed=seed)
        plan, built = assemble(config.model, config.plan, length=config.train.sequence_length)
        optimizer = make_optimizer(config.optimizer, config.train.steps, built.params)
        shape = config.train.batch_size, config.train.sequence_length
        batch = Batch(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32,) * 3 + (jnp.float32,)))
        step = make_step(built, NEXT_TOKEN, config, plan, optimizer)
        return step.lower(abstract_state(built, optimizer), batch).as_text()

    assert text(1) == text(2)


def test_packed_steps_are_those_of_a_run(tmp_path):
    """Same data, same schedule, same parameters, though neither seed nor schedule is in the program."""
    config, _ = load([write_recipe(tmp_path)])
    optimizer = dataclasses.replace(config.optimizer, schedule="cosine", warmup_steps=2, learning_rate=0.02)
    train = dataclasses.replace(config.train, steps=5, seed=7)
    model = dataclasses.replace(SMALL, vocab_size=config.model.vocab_size)
    config = dataclasses.replace(config, model=model, train=train, optimizer=optimizer)
    corpus = open_corpus(config.data)
    packed = Packed(config, corpus)
    found, _ = packed.steps(packed.start(train.seed), config)

    updates = make_optimizer(optimizer, train.steps, packed.built.params)
    step = make_step(packed.built, NEXT_TOKEN, config, packed.plan, updates)
    state, loader = create_state(model, packed.built, updates, packed.plan, train.seed), train_loader(config, corpus)
    for _ in range(train.steps):
        state, _ = step(state, batch_to_devices(next(loader), packed.plan))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.params, state.params)


def test_processes_with_one_lock_take_turns(tmp_path):
    """Two openings of a file exclude each other, in one process too."""
    inside = threading.Event()

    def other():
        with turn(tmp_path / "lock"):
            inside.set()

    thread = threading.Thread(target=other)
    with turn(tmp_path / "lock"):
        thread.start()
        assert not inside.wait(0.2)
    thread.join(10)
    assert inside.is_set()


@pytest.mark.parametrize(("script", "option"), [(phonebook, "--arms"), (extend, "--models")])
def test_names_that_a_study_does_not_have_are_refused_before_anything_is_written(
    script, option, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.argv", ["script", "--run", str(tmp_path / "run"), option, "transformer,other"])
    monkeypatch.setattr(script, "make_arms" if script is extend else "configure", lambda *_: pytest.fail("went on"))
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    assert f"{option} has 'other'; expected some of transformer, hybrid" in capsys.readouterr().err
