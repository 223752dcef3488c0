"""The objective against formulas in numpy float64, worked apart; and under plans against one device.

An MLP that adds nothing, between embeddings that the norm does not change and a head of 0 and ln 2 / 2: the likelihoods
of tokens 0, 1, 2 are (2, 1, 1) / 4 after 0, (1, 2, 1) / 4 after 1 and (2, 1, 2) / 5 after 2.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, several_devices

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.data.packing import Batch
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.posttrain.objective import ADVANTAGE, IMPORTANCE, OLD, REFERENCE, ROLLOUT, WEIGHT, Terms, policy_objective
from orogen.train.sides import packed_batches
from orogen.train.step import batch_to_devices, gradients
from orogen.train.verify import verify

MODEL = ModelConfig(pattern="-", vocab_size=3, hidden_size=2, intermediate_size=3, layer_norm_epsilon=1e-12)
LIKELIHOOD = np.array([[2, 1, 1], [1, 2, 1], [1.6, 0.8, 1.6]]) / 4
HIDDEN = np.array([[1, 1], [1, -1], [-1, 1]], np.float64)
GRPO = Terms(
    clip_low=0.2, clip_high=0.3, dual_clip=None, by_sequence=False, kl=0.0, kl_estimator="k3", on_policy=False
)  # fmt: skip
# Two rows: one packed with two sequences, one with padding. Position i chooses token i + 1 where CHOSEN is 1.
TOKENS = np.array([[0, 1, 2, 0, 2, 1, 1], [1, 0, 0, 2, 2, 0, 0]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32)
CHOSEN = np.array([[0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]], np.float64)


def numbers():
    """Extras for TOKENS: ratios from 0.5 to 1.6, so that every clip is met."""
    rng = np.random.default_rng(5)
    now = np.log(LIKELIHOOD[TOKENS[:, :-1], TOKENS[:, 1:]])
    now = np.concatenate([now, np.zeros((2, 1))], axis=1)
    return {
        WEIGHT: CHOSEN * rng.uniform(0.5, 1.5, TOKENS.shape),
        ADVANTAGE: rng.choice([-1.5, -0.5, 0.5, 2.0], TOKENS.shape),
        IMPORTANCE: rng.choice([0.0, 0.5, 1.25], TOKENS.shape),
        OLD: now - rng.choice(np.log([0.5, 0.9, 1.1, 1.6]), TOKENS.shape),
        REFERENCE: now + rng.choice([-0.7, 0.4], TOKENS.shape),
        ROLLOUT: now + rng.choice([-0.25, 0.5], TOKENS.shape),
    }


def expected(extras, terms):
    """Loss and gradient of the head (2, 3), by hand: dL/dlog π of each token, times h (one-hot - π)."""
    chosen = [(b, i) for b in range(2) for i in range(7) if CHOSEN[b, i]]
    now = {(b, i): np.log(LIKELIHOOD[TOKENS[b, i], TOKENS[b, i + 1]]) for b, i in chosen}
    groups = {}
    for b, i in chosen:
        groups.setdefault((b, SEGMENTS[b, i]), []).append((b, i))
    total = sum(extras[WEIGHT][p] for p in chosen)
    loss, slope, clipped = 0.0, dict.fromkeys(chosen, 0.0), 0
    for members in groups.values():
        changes = {p: 0.0 if terms.on_policy else now[p] - extras[OLD][p] for p in members}
        for p in members:
            shared = members if terms.by_sequence else [p]
            ratio = np.exp(np.mean([changes[q] for q in shared]))
            a = extras[ADVANTAGE][p]
            bounded = min(max(ratio, 1 - terms.clip_low), 1 + terms.clip_high)
            value, derivative = -a * ratio, -a * ratio
            if -a * bounded > value:
                value, derivative = -a * bounded, 0.0
                clipped += 1
            if terms.dual_clip is not None and a < 0 and value > -a * terms.dual_clip:
                value, clipped = -a * terms.dual_clip, clipped + (derivative != 0)
                derivative = 0.0
            scale = extras[WEIGHT][p] * extras[IMPORTANCE][p] / total
            loss += scale * value
            for q in shared:
                slope[q] += scale * derivative / len(shared)
    for p in chosen if terms.kl else ():
        gap = extras[REFERENCE][p] - now[p]
        scale = terms.kl * extras[WEIGHT][p] / total
        loss += scale * (gap**2 / 2 if terms.kl_estimator == "k2" else np.exp(gap) - gap - 1)
        slope[p] += scale * (-gap if terms.kl_estimator == "k2" else 1 - np.exp(gap))
    gradient = np.zeros((2, 3))
    for (b, i), value in slope.items():
        token, following = TOKENS[b, i], TOKENS[b, i + 1]
        gradient += value * np.outer(HIDDEN[token], np.eye(3)[following] - LIKELIHOOD[token])
    gap = np.mean([abs(now[p] - extras[ROLLOUT][p]) for p in chosen])
    return loss, gradient, clipped / len(chosen), -np.mean([now[p] for p in chosen]), gap


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"dual_clip": 1.4, "kl": 0.3}, {"by_sequence": True, "kl": 0.1, "kl_estimator": "k2"},
        {"on_policy": True, "kl": 0.2},
    ],
    ids=["grpo", "dual clip, k3", "gspo, k2", "on policy"],
)  # fmt: skip
def test_loss_and_gradient_equal_the_formulas(changes):
    terms, extras = dataclasses.replace(GRPO, **changes), numbers()
    plan, built = make_plan(PlanConfig(), MODEL), build(MODEL)
    half = np.log(2) / 2
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), built.params)
    params["embedding"]["weight"][...] = jnp.array(HIDDEN, jnp.float32)
    params["head"]["weight"][...] = jnp.array([[half, half, 0], [half, -half, 0]], jnp.float32)
    params["norm"]["weight"][...] = jnp.ones(2)
    batch = Batch(
        TOKENS, SEGMENTS, np.zeros_like(TOKENS), np.zeros(TOKENS.shape, np.float32),
        {name: x.astype(np.float32) for name, x in extras.items()},
    )  # fmt: skip
    function = jax.jit(gradients(built, policy_objective(terms), MODEL, plan, "float32"))
    loss, grads, counts, sums = function(params, built.buffers, batch_to_devices(batch, plan))
    loss_now, gradient, clipped, entropy, gap = expected(extras, terms)
    assert float(loss) == pytest.approx(loss_now, rel=2e-6)
    np.testing.assert_allclose(grads["head"]["weight"][...], gradient, rtol=2e-5, atol=1e-7)
    mean = {name: float(sums.metrics[name] / counts.metrics[name]) for name in sums.metrics}
    assert mean["clipped"] == pytest.approx(clipped) and mean["entropy"] == pytest.approx(entropy, rel=1e-6)
    assert mean["gap"] == pytest.approx(gap, rel=1e-6)
    assert ("divergence" in mean) == bool(terms.kl)


def test_the_cases_by_hand_meet_every_clip():
    for changes in ({}, {"dual_clip": 1.4}, {"by_sequence": True}):
        assert 0 < expected(numbers(), dataclasses.replace(GRPO, **changes))[2] < 1


def policy_batches(config, count):
    """Packed sequences in which a policy chose the tokens at random positions."""
    made = []
    for seed, batch in enumerate(packed_batches(config, count)):
        rng = np.random.default_rng(seed)
        shape = batch.tokens_bt.shape
        next_bt = np.roll(batch.segments_bt, -1, axis=1)
        inside_bt = (batch.segments_bt != 0) & (batch.segments_bt == next_bt) & (np.arange(shape[1]) < shape[1] - 1)
        near = -np.log(config.model.vocab_size) + 0.3 * rng.normal(size=(3, *shape))
        extras = {
            WEIGHT: inside_bt & (rng.random(shape) < 0.7), ADVANTAGE: rng.normal(0, 1, shape),
            IMPORTANCE: rng.random(shape), OLD: near[0], REFERENCE: near[1], ROLLOUT: near[2],
        }  # fmt: skip
        made.append(batch._replace(extras={name: x.astype(np.float32) for name, x in extras.items()}))
    return made


@several_devices
@pytest.mark.parametrize(
    ("model", "plan", "changes"),
    [
        ({"pattern": "M*", "mtp_depths": 0}, {"tensor": 2, "context": 2}, {"by_sequence": True}),
        ({"pattern": "*E/E"}, {"data": 2, "expert": 2, "microbatches": 2, "fsdp": "parameters"}, {"kl": 0.2}),
    ],
    ids=["gspo: tensor, context", "grpo: data, expert, microbatches"],
)
def test_a_plan_computes_what_one_device_does(model, plan, changes):
    wide = {"clip_low": 0.9, "clip_high": 5.0}  # a ratio at a clip could fall on either side
    objective = policy_objective(dataclasses.replace(GRPO, **wide, **changes))
    config = run_config(hybrid(**model), plan=plan)
    verdict = verify(config, objective=objective, batches=policy_batches, optimizers=("adamw",))
    assert verdict.passed, verdict
