"""What tells teachers apart, and how far a student is from one on held-out text."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, several_devices
from tests.posttrain.test_distill import InMemory, logits

from orogen.config.distill import DistillConfig
from orogen.config.precision import PrecisionConfig
from orogen.cost.assemble import assemble
from orogen.model.lm import initial_state
from orogen.posttrain.distill import Distance, make_objective
from orogen.posttrain.teacher import Teacher, fingerprint_of
from orogen.train.sides import packed_batches

STUDENT = hybrid(pattern="-", vocab_size=97, mtp_depths=0)
TEACHER = hybrid(pattern="-", vocab_size=97, mtp_depths=0, hidden_size=36, intermediate_size=40)
ROUNDED = PrecisionConfig(recipe="fp8_tensorwise")
DISTILL = DistillConfig(divergence=1.0)


class Retrained(InMemory):
    """The same but for one number of the first layer: its final norm is the other's."""

    def state(self):
        params, buffers = super().state()
        paths = [path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if leaf.ndim > 1]
        change = lambda path, x: x.at[(0,) * x.ndim].add(0.25) if path == paths[0] else x  # noqa: E731
        return jax.tree_util.tree_map_with_path(change, params), buffers


@several_devices
def test_teachers_of_one_config_are_told_apart_whatever_their_plan_and_dtype():
    def fingerprint(folder, plan=None, **train):
        config = dataclasses.replace(run_config(STUDENT, plan=plan, **train), distill=DISTILL)
        return fingerprint_of(folder, config)

    first = fingerprint(InMemory(TEACHER))
    assert fingerprint(Retrained(TEACHER)) != first
    assert fingerprint(InMemory(dataclasses.replace(TEACHER, layer_norm_epsilon=1e-3))) != first
    # Ranks of tensor pad the 97 rows of the vocabulary.
    assert fingerprint(InMemory(TEACHER), {"tensor": 2, "data": 2, "fsdp": "parameters"}) == first


def apart(params, buffers, batches, precision):
    """The mean of KL(teacher || student) over all targets, from both models' logits, in float64."""
    models = (TEACHER, InMemory(TEACHER).state(), None), (STUDENT, (params, buffers), precision)
    total = count = 0.0
    for batch in batches:
        known_btv, found_btv = (
            np.asarray(jax.jit(lambda state, c=config, b=batch, p=own: logits(c, state, b, p))(state), np.float64)
            for config, state, own in models
        )
        p_btv, q_btv = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (known_btv, found_btv))
        segments_bt = batch.segments_bt
        inside_bt = (segments_bt[:, 1:] == segments_bt[:, :-1]) & (segments_bt[:, 1:] > 0)
        weights_bt = batch.weights_bt[:, 1:] * inside_bt
        total += (weights_bt * (np.exp(p_btv) * (p_btv - q_btv)).sum(-1)[:, :-1]).sum()
        count += weights_bt.sum()
    return total / count


def test_the_heldout_divergence_is_that_of_all_logits_in_the_formats_of_the_step():
    """Before the step from which the run computes plainly, and from it on."""
    precision = dataclasses.replace(ROUNDED, switch_step=3)
    config = dataclasses.replace(run_config(STUDENT), distill=DISTILL, precision=precision).check()
    batches = packed_batches(config, 1)
    laid, built = assemble(config.model, config.plan, length=config.train.sequence_length)
    heldout = SimpleNamespace(
        sampled=("loss",), whole=("whole_loss",), sample=lambda state: {"loss": 1.0},
        full=lambda state: {"whole_loss": 2.0}, sample_batches=lambda: batches, passes={"a": batches},
    )  # fmt: skip
    teacher = Teacher(InMemory(TEACHER), config, laid, top_k=None)
    scores = Distance(heldout, teacher, config, built, make_objective(DISTILL))
    params, buffers = initial_state(STUDENT, 1)
    params = jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x, params)
    at = lambda step: SimpleNamespace(step=jnp.int32(step), params=params, buffers=buffers)  # noqa: E731
    with jax.default_matmul_precision("highest"):
        rounded, plain = scores.sample(at(2)), scores.full(at(3))
        expected = [apart(params, buffers, batches, own) for own in (ROUNDED, None)]
    assert rounded == {"loss": 1.0, "heldout_divergence": pytest.approx(expected[0], rel=1e-5)}
    assert plain == {"whole_loss": 2.0, "whole_heldout_divergence": pytest.approx(expected[1], rel=1e-5)}
    assert abs(expected[1] - expected[0]) > 1e-4 * expected[1] > 1e-5
