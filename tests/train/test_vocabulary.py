"""A vocabulary that `tensor` does not divide: the rows with which a plan pads it are zeros and change nothing."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid, run_config, several_devices

from orogen.checkpoint.steps import Checkpoints, with_shardings
from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.cost.assemble import assemble
from orogen.layers.documents import documents
from orogen.model.count import count
from orogen.model.lm import build
from orogen.model.vocabulary import vocab_dim
from orogen.parallel.describe import describe_plan
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.state import abstract_state, create_state, from_items, items, state_shardings
from orogen.train.step import batch_to_devices, make_step
from orogen.train.verify import packed_batch, verify

pytestmark = several_devices
SIZE = 93
FOUR, TWO, STAGES = {"tensor": 4}, {"tensor": 2, "data": 2}, {"stage": 2, "tensor": 2, "microbatches": 2}


POSITION = {"position": {"row": 7}, "identity": {}}  # of the data source


def model_of(**changes):
    return hybrid(pattern="--", mtp_depths=0, vocab_size=SIZE, **changes)


def laid_out(model, sizes: dict):
    """(config, plan, built, optimizer) of a run of the model."""
    config = run_config(model, plan=sizes)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, weight_decay=0.3))
    plan, built = assemble(model, config.plan, length=24)
    return config, plan, built, make_optimizer(config.optimizer, 10, built.params)


def trained(model, sizes: dict, steps: int):
    """The state of a run after some steps."""
    config, plan, built, optimizer = laid_out(model, sizes)
    state = create_state(model, built, optimizer, plan, 3)
    step = make_step(built, NEXT_TOKENS, config, plan, optimizer)
    batch = batch_to_devices(packed_batch(config, config.train), plan)
    for _ in range(steps):
        state, _ = step(state, batch)
    return state


def vocabularies(tree) -> list[np.ndarray]:
    """The arrays over the vocabulary, its axis in front."""
    found = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
    arrays = [leaf for leaf in found if isinstance(leaf, nnx.Variable) and vocab_dim(leaf) is not None]
    return [np.moveaxis(np.asarray(leaf[...]), vocab_dim(leaf), 0) for leaf in arrays if jax.tree.leaves(leaf)]


def restored(run_dir, model, sizes: dict):
    """The state saved there, restored onto a plan with the same stages."""
    _, plan, built, optimizer = laid_out(model, sizes)
    target = abstract_state(built, optimizer)
    with Checkpoints(run_dir, vocab_size=SIZE) as checkpoints:
        found, position = checkpoints.restore(items(with_shardings(target, state_shardings(target, plan))))
    return from_items(found), position


@pytest.mark.parametrize("tied", [False, True])
def test_initial_numbers_are_the_same_on_every_mesh_and_zero_beyond(tied):
    model = model_of(tie_word_embeddings=tied)
    alone, *others = (vocabularies(trained(model, sizes, 0).params) for sizes in ({}, FOUR, {"tensor": 8}))
    assert [a.shape for a in alone] == [(SIZE, 48)] * (2 - tied)
    for found in others:
        for a, b in zip(found, alone, strict=True):
            assert len(a) == 96
            np.testing.assert_array_equal(a[:SIZE], b)
            assert not a[SIZE:].any()


@pytest.mark.parametrize("sizes", [FOUR, STAGES], ids=str)
def test_rows_beyond_the_vocabulary_stay_zero_through_steps_and_their_moments_too(sizes):
    state = trained(model_of(), sizes, 2)
    found = vocabularies((state.params, state.optimizer))
    assert len(found) == 3 * (1 if "stage" in sizes else 2)
    for array in found:
        assert len(array) > SIZE and array[:SIZE].any(0).all() and not array[SIZE:].any()


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ({}, {"tensor": 4, "data": 2, "fsdp": "parameters", "microbatches": 2, "cross_entropy": "full"}),
        ({"vocab_size": 5, "tie_word_embeddings": True}, {"tensor": 8, "fsdp": "none"}),
        ({"pattern": "--/-", "mtp_depths": 1}, {**STAGES, "data": 2, "fsdp": "gradients"}),
    ],
    ids=["sharded over data", "more ranks than words", "embedding and head on every stage"],
)
def test_a_plan_equals_one_device(model, sizes):
    model = dataclasses.replace(model_of(), **model)
    rows = 2 * sizes.get("data", 1) * sizes.get("microbatches", 1)
    verdict = verify(run_config(model, plan=sizes, batch_size=rows))
    assert verdict.passed and not verdict.zero_leaves, verdict


def logits_of(model, sizes: dict, tokens_bt: np.ndarray) -> np.ndarray:
    """The logits of initial parameters, as `LanguageModel.logits` computes them inside a step."""
    _, plan, built, _ = laid_out(model, sizes)
    params = trained(model, sizes, 0).params

    def run(params, tokens_bt, docs):
        found = nnx.merge(built.graph, params, built.buffers).logits(tokens_bt, docs, plan)
        return plan.max(found, "vocab")  # equal on all ranks

    program = plan.run(run, inputs=(plan.specs(params), plan.spec(), plan.spec()), outputs=plan.spec())
    return np.asarray(jax.jit(program)(params, tokens_bt, documents(np.ones_like(tokens_bt))))


def test_logits_have_the_words_of_the_vocabulary_alone():
    tokens_bt = np.arange(24, dtype=np.int32).reshape(2, 12)
    found, expected = (logits_of(model_of(), sizes, tokens_bt) for sizes in (FOUR, {}))
    assert found.shape == (2, 12, SIZE)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [FOUR, STAGES], ids=str)
def test_a_checkpoint_is_restored_with_other_rows_bit_for_bit(tmp_path, sizes):
    model, state = model_of(), trained(model_of(), sizes, 1)
    with Checkpoints(tmp_path, vocab_size=SIZE) as checkpoints:
        checkpoints.save(1, items(state), POSITION, laid_out(model, sizes)[2].layout)
    wider = {**sizes, "tensor": 4} if "stage" in sizes else {"tensor": 8}
    narrower = {**sizes, "tensor": 1} if "stage" in sizes else TWO
    for other in (wider, narrower):
        again, position = restored(tmp_path, model, other)
        assert position == POSITION
        rows = PlanConfig(**other).vocab_rows(SIZE)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
            if a.shape == b.shape:
                np.testing.assert_array_equal(a, b)
        for a, b in zip(vocabularies(again), vocabularies(state), strict=True):
            assert len(a) == rows
            np.testing.assert_array_equal(a[:SIZE], b[:SIZE])
            assert not a[SIZE:].any()


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1])
def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path, size):
    """Even if an array with as many rows could hold either."""
    with Checkpoints(tmp_path, vocab_size=SIZE) as checkpoints:
        checkpoints.save(0, items(trained(model_of(), FOUR, 0)), POSITION, laid_out(model_of(), FOUR)[2].layout)
    other = dataclasses.replace(model_of(), vocab_size=size)
    built = build(other)
    target = {"params": built.params, "buffers": built.buffers}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ConfigError, match=rf"of another model.*{SIZE}.*{size}"):
        checkpoints.restore_model(other, lambda layout: target)


def test_parameters_are_counted_without_the_rows_and_shown_with_them():
    model = model_of()
    _, plan, built, _ = laid_out(model, FOUR)
    rows = describe_plan(plan, built.params)["parameters"]
    assert rows["embedding.weight"]["shape"] == [96, 48] and rows["embedding.weight"]["device_shape"] == [24, 48]
    assert rows["head.weight"]["shape"] == [48, 96]
    assert count(model)["total"] == count(dataclasses.replace(model, vocab_size=96))["total"] - 2 * 3 * 48
    assert json.dumps(rows)
