"""A second task, a policy gradient with signed advantages: by hand, and under plans."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid, run_config, several_devices
from tests.train.kills import TIMED, write_recipe

from orogen.config.load import load
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.data.packing import Batch
from orogen.model.heads import judge, log_likelihoods
from orogen.model.lm import build
from orogen.parallel.context import later
from orogen.parallel.plan import make_plan
from orogen.report.metrics import read_metrics
from orogen.train.pretraining import PRETRAINING, train_loader
from orogen.train.run import train
from orogen.train.sides import packed_batches
from orogen.train.step import batch_to_devices, gradients
from orogen.train.task import Metric, Objective, Task
from orogen.train.terms import ROWS, loss_size, mean_sizes
from orogen.train.verify import verify

ADVANTAGE, CHOSEN, EARLIER = "advantage", "chosen", "earlier"
PENALTY = 0.25


def counts(batch, depths, plan):
    """The tokens that the policy chose, whatever their advantages; for the divergence, all tokens."""
    chosen = batch.extras[CHOSEN].sum()
    tokens = (batch.segments_bt != 0).sum()
    return {"policy": chosen, "divergence": tokens, "likelihood": chosen, "size": chosen}


def sums(model, hidden, batch, plan):
    """-A π/π_old, an estimate of the divergence from a reference (e^x - x - 1 of its log-ratio), and log π."""
    found_bt = log_likelihoods(hidden[0], model, later(batch.tokens_bt, 1, plan), plan)
    old_bt, reference_bt = jnp.moveaxis(batch.extras[EARLIER], -1, 0)
    chosen_bt = batch.extras[CHOSEN] > 0
    ratio_bt = jnp.exp(jnp.where(chosen_bt, found_bt - old_bt, 0))
    apart_bt = jnp.where(chosen_bt, reference_bt - found_bt, 0)
    of_chosen = lambda x_bt: jnp.where(chosen_bt, x_bt, 0).sum()  # noqa: E731
    return {
        "policy": of_chosen(-batch.extras[ADVANTAGE] * ratio_bt),
        "divergence": of_chosen(jnp.exp(apart_bt) - apart_bt - 1),
        "likelihood": of_chosen(found_bt),
        # Over the hidden states of the tokens that this rank alone holds.
        "size": jnp.where(plan.deal(plan.own(chosen_bt)), jnp.square(plan.deal(hidden[0])).mean(-1), 0).sum(),
    }


POLICY = Objective(counts=counts, sums=sums, shares=lambda config, depths: {"policy": 1.0, "divergence": PENALTY})


def policy_batches(config, count):
    """Packed sequences in which a policy chose the tokens at random positions."""
    made = []
    for seed, batch in enumerate(packed_batches(config, count)):
        rng = np.random.default_rng(seed)
        shape = batch.tokens_bt.shape
        next_bt = np.roll(batch.segments_bt, -1, axis=1)
        inside_bt = (batch.segments_bt != 0) & (batch.segments_bt == next_bt) & (np.arange(shape[1]) < shape[1] - 1)
        uniform = -np.log(config.model.vocab_size)
        extras = {
            ADVANTAGE: rng.normal(0, 1, shape).astype(np.float32),
            CHOSEN: (inside_bt & (rng.random(shape) < 0.7)).astype(np.float32),
            EARLIER: (uniform + 0.3 * rng.normal(size=(*shape, 2))).astype(np.float32),
        }
        made.append(batch._replace(extras=extras))
    return made


@several_devices
def test_an_objective_measures_what_has_no_gradient():
    """How many targets are the most likely tokens, which takes a maximum over the ranks of `tensor`."""

    def measured(model, hidden, batch, plan):
        right_bt = judge(hidden[0], model, later(batch.tokens_bt, 1, plan), plan).greedy
        return {**sums(model, hidden, batch, plan), "right": right_bt.sum(dtype=jnp.float32)}

    objective = dataclasses.replace(
        POLICY, sums=measured, counts=lambda *given: {**counts(*given), "right": counts(*given)["divergence"]}
    )
    config = run_config(hybrid(pattern="-", mtp_depths=0), plan={"tensor": 2})
    assert verify(config, objective=objective, batches=policy_batches).passed


def test_a_policy_gradient_by_hand():
    """An MLP that adds nothing, between embeddings that the norm does not change and a head of 0 and ln 2 / 2: the
    likelihoods of 0, 1, 2 are (2, 1, 1) / 4 after 0, (1, 2, 1) / 4 after 1 and (2, 1, 2) / 5 after 2."""
    model = ModelConfig(pattern="-", vocab_size=3, hidden_size=2, intermediate_size=3, layer_norm_epsilon=1e-12)
    plan, built = make_plan(PlanConfig(), model), build(model)
    half = np.log(2) / 2
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), built.params)
    params["embedding"]["weight"][...] = jnp.array([[1, 1], [1, -1], [-1, 1]], jnp.float32)
    params["head"]["weight"][...] = jnp.array([[half, half, 0], [half, -half, 0]], jnp.float32)
    params["norm"]["weight"][...] = jnp.ones(2)
    ones_bt = np.ones((1, 4), np.int32)
    extras = {
        ADVANTAGE: np.array([[2, -1, 0.5, 7]], np.float32),
        CHOSEN: np.array([[1, 1, 1, 0]], np.float32),
        # π is 1/4, 1/4, 2/5; the old policy's likelihoods give ratios of 1, 2, 2; the reference's are half of π's first
        # and π's own.
        EARLIER: np.log(np.array([[[0.25, 0.125], [0.125, 0.25], [0.2, 0.4], [1, 1]]])).astype(np.float32),
    }
    batch = Batch(
        np.array([[0, 1, 2, 0]], np.int32), ones_bt, np.arange(4, dtype=np.int32)[None], 0.0 * ones_bt, extras
    )
    function = jax.jit(gradients(built, POLICY, model, plan, "float32"))
    loss, grads, counted, found = function(params, built.buffers, batch_to_devices(batch, plan))
    # -(2 · 1 - 1 · 2 + 0.5 · 2) / 3, and a quarter of e^x - x - 1 at x = -ln 2, over 4 tokens.
    assert float(loss) == pytest.approx(-1 / 3 + (np.log(2) - 1 / 2) / 16, rel=1e-6)
    assert float(counted.metrics["policy"]) == 3 and float(counted.metrics["divergence"]) == 4
    assert float(found.metrics["size"]) == pytest.approx(3, rel=1e-6)
    assert float(found.metrics["likelihood"]) == pytest.approx(np.log(1 / 4 * 1 / 4 * 2 / 5), rel=1e-6)
    # Per token, -A π/π_old / 3 · h (one-hot - π)ᵀ: -2/3 (1, 1)ᵀ (-1/2, 3/4, -1/4) + 2/3 (1, -1)ᵀ (-1/4, -1/2, 3/4)
    # - 1/3 (-1, 1)ᵀ (3/5, -1/5, -2/5); and of the divergence of the first (1 - e^x) / 16 (1, 1)ᵀ (-1/2, 3/4, -1/4).
    expected = np.array([[11 / 30, -9 / 10, 8 / 15], [3 / 10, -1 / 10, -1 / 5]])
    expected += np.array([-1 / 2, 3 / 4, -1 / 4]) / 32
    np.testing.assert_allclose(grads["head"]["weight"][...], expected, rtol=1e-5)


@several_devices
@pytest.mark.parametrize(
    ("model", "plan", "deeper"),
    [
        ({"pattern": "M*", "mtp_depths": 0}, {"tensor": 2, "context": 2, "fsdp": "optimizer"}, True),
        ({"pattern": "*E", "mtp_depths": 0}, {"data": 2, "expert": 2, "microbatches": 2, "fsdp": "parameters"}, True),
        ({"pattern": "ME|*E/E"}, {"data": 2, "stage": 2, "microbatches": 2, "fsdp": "gradients"}, False),
        ({"pattern": "-E/E"}, {"data": 2, "fsdp": "gradients", "microbatches": 2}, False),
    ],
    ids=["tensor, context", "expert, data", "stages", "microbatches"],
)
def test_a_policy_gradient_under_a_plan_equals_one_device(model, plan, deeper):
    plan |= {"shift": "alltoall"} if plan.get("stage") else {}
    config = run_config(hybrid(**model), plan=plan)
    verdict = verify(
        config, objective=dataclasses.replace(POLICY, deeper=deeper), batches=policy_batches, optimizers=("adamw",)
    )
    assert verdict.passed, verdict
    assert all(leaf.startswith("mtp") and not deeper for leaf in verdict.zero_leaves)


@several_devices
def test_counts_that_do_not_add_up_over_rows_are_refused():
    """On one device they would be correct."""
    config = run_config(hybrid(pattern="-", mtp_depths=0), plan={"data": 2})
    rows = lambda batch, depths, plan: counts(batch, depths, plan) | {"policy": jnp.float32(len(batch.tokens_bt))}  # noqa: E731
    with pytest.raises(ValueError, match="'policy' is equal on the ranks of"):
        verify(config, objective=dataclasses.replace(POLICY, counts=rows), batches=policy_batches)
    fewer = lambda batch, depths, plan: {"policy": counts(batch, depths, plan)["policy"]}  # noqa: E731
    with pytest.raises(ValueError, match="expected the names and shapes of its counts"):
        verify(config, objective=dataclasses.replace(POLICY, counts=fewer), batches=policy_batches)


@several_devices
def test_a_sum_of_copies_does_not_pass():
    """Each tensor rank holds all hidden states that were gathered."""

    def copies(model, hidden, batch, plan):
        size = jnp.square(plan.enter(hidden[0])).mean(-1)
        return sums(model, hidden, batch, plan) | {"size": jnp.where(batch.extras[CHOSEN] > 0, size, 0).sum()}

    config = run_config(hybrid(pattern="-", mtp_depths=0), plan={"tensor": 2})
    assert verify(config, objective=POLICY, batches=policy_batches, optimizers=("adamw",)).passed
    wrong = dataclasses.replace(POLICY, sums=copies)
    assert not verify(config, objective=wrong, batches=policy_batches, optimizers=("adamw",)).passed


@several_devices
def test_a_loss_whose_terms_cancel_has_the_error_of_its_terms():
    """The policy has not moved, so each ratio is 1. The advantages, and with them the loss, add up to 0 except for
    rounding. That rounding is no error; a wrong advantage is."""

    def centred(config, count):
        found = policy_batches(config, count)
        for batch in found:
            chosen = batch.extras[CHOSEN] > 0
            batch.extras[ADVANTAGE][chosen] -= batch.extras[ADVANTAGE][chosen].mean()
        return found

    def unmoved(model, hidden, batch, plan):
        found_bt = log_likelihoods(hidden[0], model, later(batch.tokens_bt, 1, plan), plan)
        ratio_bt = jnp.exp(found_bt - jax.lax.stop_gradient(found_bt))
        return {"policy": -(batch.extras[CHOSEN] * batch.extras[ADVANTAGE] * ratio_bt).sum()}

    def wrong(model, hidden, batch, plan):
        """One advantage is off by a thousandth; there are dozens."""
        return {"policy": unmoved(model, hidden, batch, plan)["policy"] + 1e-3 * plan.index("batch")}

    objective = Objective(
        counts=lambda *arguments: {"policy": counts(*arguments)["policy"]}, sums=unmoved,
        shares=lambda config, depths: {"policy": 1.0},
    )  # fmt: skip
    config = run_config(hybrid(pattern="-", mtp_depths=0), plan={"data": 2})
    found = verify(config, objective=objective, batches=centred, optimizers=("adamw",))
    assert found.passed, found
    found = verify(config, objective=dataclasses.replace(objective, sums=wrong), batches=centred, optimizers=("adamw",))
    assert not found.passed and found.max_gradient_error <= found.tolerances["max_gradient_error"], found


def test_the_size_of_a_loss_by_hand():
    """Two names, two rows: 6 - 2 over 4, and (3, -1) over (2, 8), with shares 1 and 1/2; router losses of 0.25."""
    metrics = {"a": Metric(4.0, 4.0), "b": Metric(np.array([2.0, 3.0]), np.array([2.0, 8.0]))}
    rows = {"a": [[6.0], [-2.0]], "b": [[3.0, 1.0], [-1.0, 2.0]]}
    metrics |= {
        ROWS + n: Metric(np.squeeze(x), np.broadcast_to(metrics[n].count, np.squeeze(x).shape)) for n, x in rows.items()
    }
    objective = dataclasses.replace(POLICY, shares=lambda config, depths: {"a": 1.0, "b": 0.5})
    loss = 4 / 4 + (2 / 2 + 3 / 8) / 2 + 0.25
    size = (6 + 2) / 4 + ((3 + 1) / 2 + (1 + 2) / 8) / 2 + 0.25
    assert loss_size(loss, metrics, objective, hybrid()) == pytest.approx(size, rel=1e-12)
    sizes = mean_sizes(metrics)
    assert sizes["a"] == 2 and sizes["b"].tolist() == [2, 3 / 8] and sizes.keys() == {"a", "b"}


def test_without_the_mtp_block_its_parameters_have_no_gradient():
    model = hybrid(pattern="-/E", mtp_depths=2)
    plan, built = make_plan(PlanConfig(), model), build(model)
    config = run_config(model)
    (batch,) = policy_batches(config, 1)
    objective = dataclasses.replace(POLICY, deeper=False)
    function = jax.jit(gradients(built, objective, model, plan, "float32"))
    params = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), built.params)
    _, grads, counted, found = function(
        params, jax.tree.map(jnp.zeros_like, built.buffers), batch_to_devices(batch, plan)
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["mtp"]))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(nnx.State({**grads, "mtp": {}})))
    assert counted.tokens.shape == (1,) and [load.shape for load in found.load] == [(model.n_routed_experts,)]
    assert not np.any(found.load[0])


class Rollouts:
    """A source that reads the weights about to train on its batch, like one that samples from them."""

    def __init__(self, config, corpus):
        self.loader, self.episode = train_loader(config, corpus), 0

    def take(self, state):
        batch = self.loader.take(state)
        self.episode += 1
        shape, scale = batch.tokens_bt.shape, float(jnp.sum(state.params["head"]["weight"][...]))
        extras = {
            ADVANTAGE: np.full(shape, np.cos(scale + self.episode), np.float32),
            CHOSEN: (batch.segments_bt != 0).astype(np.float32),
            EARLIER: np.full((*shape, 2), -5.5, np.float32),
        }
        return batch._replace(extras=extras)

    def state(self):
        return {"loader": self.loader.state(), "episode": self.episode, "stages": "of the source"}

    def restore(self, state):
        self.loader.restore(state["loader"])
        self.episode = state["episode"]


class Rewards:
    """An evaluation whose scores have other names than pretraining's."""

    sampled, whole = ("reward",), ("whole_reward",)

    def sample(self, state):
        return {"reward": float(state.step)}

    def full(self, state):
        return {"whole_reward": -float(state.step)}


TASK = Task(
    objective=POLICY, open=PRETRAINING.open, source=Rollouts, evaluation=lambda config, built, corpus: Rewards()
)


def test_a_second_task_trains_stops_and_goes_on_to_the_bit(tmp_path):
    recipe = write_recipe(tmp_path)

    def run(folder: str, *bindings: str, resume: bool = False) -> list[dict]:
        config = load([recipe], ["TrainConfig.evaluate_every = 2", *bindings])
        train(*config, tmp_path / folder, TASK, resume=resume, log=lambda line: None)
        lines = read_metrics(tmp_path / folder)
        return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]

    whole = run("whole", "TrainConfig.steps = 4")
    run("parts", "TrainConfig.steps = 2")
    parts = run("parts", "TrainConfig.steps = 4", resume=True)
    assert parts[1].pop("whole_reward") == -2.0  # it was the last step of that run
    assert parts == whole
    assert [line.get("reward") for line in whole] == [None, 2.0, None, 4.0] and whole[-1]["whole_reward"] == -4.0
    assert all(line["likelihood"] < 0 < line["divergence"] for line in whole) and "loss" not in whole[0]
    file = tmp_path / "parts" / "metrics.jsonl"
    before = file.read_bytes()
    run("parts", "TrainConfig.steps = 4", resume=True)
    assert file.read_bytes() == before  # no evaluation is missing
