"""The losses of pairs: sums over documents, numbers worked out in float64, and plans against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.helpers import hybrid, run_config, several_devices

from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.preference import PreferenceConfig
from orogen.data.packing import Batch
from orogen.model.lm import build
from orogen.parallel.plan import make_plan
from orogen.posttrain.documents import document_sums
from orogen.posttrain.preference import REFERENCE, preference
from orogen.train.step import batch_to_devices, gradients
from orogen.train.verify import verify


def config(**fields) -> PreferenceConfig:
    return PreferenceConfig(template="nemotron_3_nano", **fields)


def pair_batches(run, count):
    """Rows of documents of uneven lengths, several per row; some rows end in padding or in a document without a pair.
    About half of each document's tokens are its answer."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        rows, length = run.train.batch_size, run.train.sequence_length
        batch = Batch(
            rng.integers(0, run.model.vocab_size, (rows, length), np.int32), *np.zeros((2, rows, length), np.int32),
            np.zeros((rows, length), np.float32), {REFERENCE: np.zeros((rows, length), np.float32)},
        )  # fmt: skip
        for row in range(rows):
            start, number = 0, 0
            while start < length - 2 and number < 2 + row:
                size = min(int(rng.integers(3, max(4, length // 3))), length - start)
                span, number = slice(start, start + size), number + 1
                batch.segments_bt[row, span] = number
                batch.positions_bt[row, span] = np.arange(size)
                batch.weights_bt[row, start + int(rng.integers(1, size)) : start + size] = 1
                uniform = -np.log(run.model.vocab_size) * batch.weights_bt[row, span].sum()
                batch.extras[REFERENCE][row, start] = uniform + rng.normal()
                start += size
        made.append(batch)
    return made


def test_sums_over_documents_by_hand():
    plan = make_plan(PlanConfig(), ModelConfig(pattern="-", vocab_size=3, hidden_size=2, intermediate_size=3))
    segments_bt = jnp.array([[1, 1, 2, 3, 3, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    x_bt = jnp.array([[1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16, 32], [1, 1, 1, 1, 1, 1]])
    found = document_sums(x_bt, segments_bt, plan, count=4)
    assert found.tolist() == [[3, 4, 24, 0], [60, 0, 0, 0], [0, 0, 0, 0]]
    # Documents beyond `count` are left out.
    assert document_sums(x_bt, segments_bt, plan, count=2).tolist() == [[3, 4], [60, 0], [0, 0]]
    gradient = jax.grad(lambda x: (document_sums(x, segments_bt, plan, count=4) * jnp.arange(1.0, 5)).sum())
    assert gradient(x_bt.astype(jnp.float32)).tolist() == [[1, 1, 2, 3, 3, 0], [0, 0, 1, 1, 1, 1], [0] * 6]


# Three pairs in two rows, whose documents have 2 to 4 tokens; the second row ends in a document without a partner.
TOKENS = [[0, 1, 2, 0, 2, 1, 1, 0, 2, 2, 0], [2, 1, 0, 0, 1, 2, 0, 1, 0, 0, 0]]
SEGMENTS = [[1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4], [1, 1, 1, 1, 2, 2, 3, 3, 3, 0, 0]]
POSITIONS = [[0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1, 2, 0, 0]]
LEARNED = [[0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0]]
REFERENCES = [[-1.5, -2.0, -0.5, -3.0], [-1.0, -2.5, -9.0]]  # of the documents
PAIRS = [(0, 1, 2), (0, 3, 4), (1, 1, 2)]  # the row and the documents of each
HIDDEN = np.array([[1, 1], [1, -1], [-1, 1]], np.float64)  # of each token: embeddings that the norm does not change
HEAD = np.array([[0.3, -0.2, 0.5], [-0.4, 0.1, 0.25]])
SCORE = np.array([0.7, -0.3])


def answers(head: np.ndarray) -> dict[tuple[int, int], tuple[float, int]]:
    """By row and document, the log-probability of the answer and its tokens, in float64."""
    logits = HIDDEN @ head
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    found: dict[tuple[int, int], tuple[float, int]] = {}
    for row, segments in enumerate(SEGMENTS):
        for place in range(1, len(segments)):
            if LEARNED[row][place]:
                key = row, segments[place]
                total, count = found.get(key, (0.0, 0))
                step = log_probs[TOKENS[row][place - 1], TOKENS[row][place]]
                found[key] = total + step, count + 1
    return found


def worked(settings: PreferenceConfig, head: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """The means over pairs, and the loss, in float64, pair by pair."""
    found = answers(head)
    sums = dict.fromkeys(("preference_loss", "sft_loss", "center_loss", "accuracy", "margin"), 0.0)
    sums |= {"chosen_reward": 0.0, "rejected_reward": 0.0}
    for row, *documents in PAIRS:
        if settings.loss == "bradley_terry":
            last = [max(t for t, s in enumerate(SEGMENTS[row]) if s == d) for d in documents]
            chosen, rejected = (HIDDEN[TOKENS[row][t]] @ score for t in last)
            sums["preference_loss"] += np.log1p(np.exp(rejected - chosen))
            sums["center_loss"] += (chosen + rejected) ** 2
        else:
            said = [found[row, d] for d in documents]
            ratio = [log - REFERENCES[row][d - 1] for (log, _), d in zip(said, documents, strict=True)]
            if settings.average_log_probs:
                ratio = [r / count for r, (_, count) in zip(ratio, said, strict=True)]
            margin, beta, wrong = ratio[0] - ratio[1], settings.beta, settings.label_smoothing
            if settings.loss == "ipo":
                sums["preference_loss"] += (margin - 0.5 / beta) ** 2
            else:
                sums["preference_loss"] += (1 - wrong) * np.log1p(np.exp(-beta * margin))
                sums["preference_loss"] += wrong * np.log1p(np.exp(beta * margin))
            sums["sft_loss"] -= said[0][0] / (said[0][1] if settings.sft_average_log_probs else 1)
            chosen, rejected = beta * ratio[0], beta * ratio[1]
        sums["accuracy"] += chosen > rejected
        sums["margin"] += chosen - rejected
        sums["chosen_reward"] += chosen
        sums["rejected_reward"] += rejected
    means = {name: total / len(PAIRS) for name, total in sums.items()}
    if settings.loss == "bradley_terry":
        loss = means["preference_loss"] + settings.center_weight * means["center_loss"]
    else:
        loss = settings.preference_weight * means["preference_loss"] + settings.sft_weight * means["sft_loss"]
    return means | {"loss": loss}


def differences(settings: PreferenceConfig, name: str) -> np.ndarray:
    """The gradient of the loss worked out above, by central differences in float64."""
    given = {"head": HEAD, "score": SCORE}
    gradient = np.zeros_like(given[name])
    for place in np.ndindex(gradient.shape):
        sides = []
        for step in (1e-5, -1e-5):
            moved = {key: value.copy() for key, value in given.items()}
            moved[name][place] += step
            sides.append(worked(settings, **moved)["loss"])
        gradient[place] = (sides[0] - sides[1]) / 2e-5
    return gradient


@pytest.mark.parametrize(
    "fields",
    [
        {"beta": 0.7, "label_smoothing": 0.1, "sft_weight": 0.3},
        {"beta": 0.4, "average_log_probs": True, "preference_weight": 2.0, "sft_weight": 0.5,
         "sft_average_log_probs": True},
        {"loss": "ipo", "beta": 0.3},
        {"loss": "bradley_terry", "center_weight": 0.2},
    ],
    ids=["dpo", "averages", "ipo", "bradley_terry"],
)  # fmt: skip
def test_losses_and_gradients_worked_apart(fields):
    """An MLP that adds nothing, so that each token's hidden state is its embedding."""
    settings, scored = config(**fields), fields.get("loss") == "bradley_terry"
    model = ModelConfig(
        pattern="-", vocab_size=3, hidden_size=2, intermediate_size=3, layer_norm_epsilon=1e-12, score_head=scored
    )
    plan, built = make_plan(PlanConfig(), model), build(model)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), built.params)
    params["embedding"]["weight"][...] = jnp.asarray(HIDDEN, jnp.float32)
    params["head"]["weight"][...] = jnp.asarray(HEAD, jnp.float32)
    params["norm"]["weight"][...] = jnp.ones(2)
    if scored:
        params["score"]["weight"][...] = jnp.asarray(SCORE, jnp.float32)
    arrays = (np.array(x, np.int32) for x in (TOKENS, SEGMENTS, POSITIONS))
    reference_bt = np.zeros(np.shape(TOKENS), np.float32)
    for row, values in enumerate(REFERENCES):
        reference_bt[row, np.flatnonzero((np.array(POSITIONS[row]) == 0) & (np.array(SEGMENTS[row]) > 0))] = values
    batch = Batch(*arrays, np.array(LEARNED, np.float32), {REFERENCE: reference_bt})
    function = jax.jit(gradients(built, preference(settings), model, plan, "float32"))
    with jax.default_matmul_precision("highest"):
        loss, grads, counted, found = function(params, built.buffers, batch_to_devices(batch, plan))
    expected = worked(settings, HEAD, SCORE)
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-5)
    assert all(float(count) == 3 for count in counted.metrics.values())
    for name, total in found.metrics.items():
        assert float(total) / 3 == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    part = "score" if scored else "head"
    np.testing.assert_allclose(grads[part]["weight"][...], differences(settings, part), rtol=1e-4, atol=1e-6)


@several_devices
@pytest.mark.parametrize(
    ("model", "plan", "fields"),
    [
        ({"pattern": "-|-", "mtp_depths": 0}, {"stage": 2, "context": 2, "microbatches": 2, "shift": "alltoall"},
         {"sft_weight": 0.2, "average_log_probs": True}),
        ({"pattern": "*", "mtp_depths": 0, "score_head": True},
         {"data": 2, "tensor": 2, "context": 2, "fsdp": "gradients"}, {"loss": "bradley_terry", "center_weight": 0.01}),
    ],
    ids=["stages, context", "rewards"],
)  # fmt: skip
def test_a_loss_of_pairs_under_a_plan_equals_one_device(model, plan, fields):
    run = run_config(hybrid(**model), plan=plan, sequence_length=48)
    verdict = verify(run, objective=preference(config(**fields)), batches=pair_batches, optimizers=("adamw",))
    assert verdict.passed, verdict
    assert all(leaf.startswith("head") and model.get("score_head") for leaf in verdict.zero_leaves)


def test_an_empty_batch_has_no_loss_and_no_gradient_that_is_not_finite():
    """A rank may hold rows without a pair."""
    run = run_config(hybrid(pattern="-", mtp_depths=0))
    (batch,) = pair_batches(run, 1)
    batch.segments_bt[:] = 0
    batch.weights_bt[:] = 0
    plan, built = make_plan(PlanConfig(), run.model), build(run.model)
    params = jax.tree.map(lambda x: 0.1 * jnp.ones(x.shape), built.params)
    function = jax.jit(gradients(built, preference(config()), run.model, plan, "float32"))
    loss, grads, counted, _ = function(params, built.buffers, batch_to_devices(batch, plan))
    assert float(loss) == 0 and float(counted.metrics["preference_loss"]) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
