"""Statistics for pruning against plain numpy on recorded activations, on one device and on plans.

Letters: b batch, t time, d model, c channels, e experts, f hidden.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid, several_devices

from orogen.checkpoint.open import Opened
from orogen.compress.calibrate import Calibration, Idle
from orogen.compress.importance import Scores, scores
from orogen.compress.outgoing import outgoing
from orogen.compress.prune import Found, Taken, calibration_batches, no_distance, replaced
from orogen.config.checks import ConfigError
from orogen.config.data import DataConfig
from orogen.config.plan import PlanConfig
from orogen.config.prune import PruneConfig
from orogen.cost.assemble import assemble
from orogen.data.packing import Batch
from orogen.layers.documents import Documents
from orogen.layers.mlp import squared_relu
from orogen.model.lm import initial_state, written_out
from orogen.parallel import placement
from orogen.parallel.plan import make_plan, single_device_plan

MODEL = hybrid(pattern="MM*E-/*E", mtp_depths=1)
LENGTH = 24


def batch(seed: int) -> Batch:
    """Four rows: one document; two; one and padding; nothing but padding."""
    tokens_bt = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (4, LENGTH)).astype(np.int32)
    segments_bt = np.zeros((4, LENGTH), np.int32)
    segments_bt[0], segments_bt[1, :11], segments_bt[1, 11:], segments_bt[2, :13] = 1, 1, 2, 1
    positions_bt = np.zeros((4, LENGTH), np.int32)
    for row, start, end in ((0, 0, LENGTH), (1, 0, 11), (1, 11, LENGTH), (2, 0, 13)):
        positions_bt[row, start:end] = np.arange(end - start)
    return Batch(tokens_bt, segments_bt, positions_bt, (segments_bt != 0).astype(np.float32))


BATCHES = [batch(1), batch(2)]


@functools.cache
def weights():
    """Initial parameters and buffers, with norms and biases that are no ones and zeros."""
    params, buffers = jax.device_get(initial_state(MODEL, 3))
    random = np.random.default_rng(0)
    noise = lambda x: x + 0.3 * random.normal(size=x.shape).astype(x.dtype) if x.ndim < 3 else 2 * x  # noqa: E731
    return jax.tree.map(noise, params), jax.tree.map(lambda x: x + random.normal(size=x.shape).astype(x.dtype), buffers)


def opened(**plan) -> Opened:
    config = dataclasses.replace(PlanConfig(**plan), dispatch="allgather")
    chosen, built = assemble(MODEL, config)
    laid = tuple(built.laid(state) for state in jax.tree.map(jnp.asarray, weights()))
    return Opened(
        MODEL, chosen, built, *jax.device_put(laid, placement.shardings((built.params, built.buffers), chosen)), None
    )


@functools.cache
def measured(**plan):
    return Calibration(opened(**plan)).measure(BATCHES)


@functools.cache
def recorder():
    """(batch, gains of layers) -> by layer, activations by name, and the final norm's output, of layers that are called
    one after another."""
    plan, model = single_device_plan(PlanConfig(dispatch="allgather"), MODEL), separate_model()

    def record(one, gain_l):
        docs = Documents(one.segments_bt, one.positions_bt)
        x_btd, layers = model.embedding(one.tokens_bt, docs, plan), []
        for number, layer in enumerate(model.backbone.children):
            after_btd = x_btd + gain_l[number] * (layer(x_btd, docs, plan)[0] - x_btd)
            layers.append(activations(layer, layer.norm(x_btd, plan)) | {"before": x_btd, "after": after_btd})
            x_btd = after_btd
        return layers, model.norm(x_btd, plan)

    return jax.jit(record)


@functools.cache
def recorded():
    """Per batch, what `recorder` gives for the whole model."""
    whole = np.ones(len(MODEL.layers.main), np.float32)
    return [jax.device_get(recorder()(jax.tree.map(jnp.asarray, one), whole)) for one in BATCHES]


def activations(layer, h_btd) -> dict:
    """What statistics are taken of, from the parameters alone."""
    mixer, found = layer.mixer, {"hidden": h_btd}
    if layer.letter == "-":
        found["mlp"] = squared_relu(h_btd @ mixer.up[...])
    if layer.letter == "M":
        found["mamba"] = h_btd @ mixer.x[...]
    if layer.letter == "E":
        found["shared"] = squared_relu(h_btd @ mixer.shared.up[...])
        u_btw = found["latent_in"] = h_btd @ mixer.latent_down[...]
        score_bte = jax.nn.sigmoid(h_btd @ mixer.router.gate[...])
        _, chosen_btk = jax.lax.top_k(score_bte + mixer.router.bias[...], MODEL.num_experts_per_tok)
        mask_bte = jax.nn.one_hot(chosen_btk, MODEL.n_routed_experts).sum(-2)
        weight_bte = score_bte * mask_bte
        weight_bte = weight_bte / weight_bte.sum(-1, keepdims=True) * MODEL.routed_scaling_factor
        hidden_btef = squared_relu(jnp.einsum("btw,ewf->btef", u_btw, mixer.experts.up[...]))
        output_btew = jnp.einsum("btef,efw->btew", hidden_btef, mixer.experts.down[...])
        found |= {"mask": mask_bte, "weight": weight_bte, "expert_hidden": hidden_btef, "expert_output": output_btew}
        found["latent_out"] = (weight_bte[..., None] * output_btew).sum(2)
    return found


def squares(name: str, number: int | None) -> np.ndarray:
    """Σ_batches Σ_rows (mean over tokens of |a|)², in float64."""
    total = 0
    for one, (layers, final_btd) in zip(BATCHES, recorded(), strict=True):
        a_btc = np.abs(np.asarray(final_btd if number is None else layers[number][name], np.float64))
        for row_tc, valid_t in zip(a_btc, one.segments_bt != 0, strict=True):
            if valid_t.any():
                total = total + row_tc[valid_t].mean(0) ** 2
    return total


def test_channels_are_squares_of_means_over_the_tokens_of_a_row():
    found = measured()
    np.testing.assert_allclose(found.final_d, squares("", None), rtol=2e-5)
    for number, letter in enumerate(MODEL.layers.main):
        names = {"M": ["mamba"], "-": ["mlp"], "E": ["shared", "latent_in", "latent_out"], "*": []}[letter]
        for name in ("hidden", *names):
            np.testing.assert_allclose(found.layers[number][name], squares(name, number), rtol=5e-5, err_msg=name)


def test_heads_are_measured_before_their_output_projection():
    heads = MODEL.num_attention_heads, MODEL.head_dim
    plan = single_device_plan(PlanConfig(dispatch="allgather"), MODEL)
    total = np.zeros(heads)
    _, built = assemble(MODEL, PlanConfig())
    params = built.layout.layer(weights()[0], 2)["mixer"]
    for one, (layers, _) in zip(BATCHES, recorded(), strict=True):
        h_btd = np.asarray(layers[2]["hidden"], np.float64)
        matrix = lambda name, params=params: np.asarray(params[name].get_value(), np.float64)  # noqa: E731
        q_bthk = (h_btd @ matrix("query")).reshape(4, LENGTH, *heads)
        k_btgk, v_btgk = ((h_btd @ matrix(n)).reshape(4, LENGTH, 2, heads[1]) for n in ("key", "value"))
        score_bhts = np.einsum("bthk,bshk->bhts", q_bthk, np.repeat(k_btgk, 12, 2)) / heads[1] ** 0.5
        same_bts = one.segments_bt[:, :, None] == one.segments_bt[:, None, :]
        score_bhts = np.where((same_bts & np.tri(LENGTH, dtype=bool))[:, None], score_bhts, -np.inf)
        weight_bhts = np.exp(score_bhts - score_bhts.max(-1, keepdims=True))
        weight_bhts /= weight_bhts.sum(-1, keepdims=True)
        y_bthk = np.einsum("bhts,bshk->bthk", weight_bhts, np.repeat(v_btgk, 12, 2))
        for row_thk, valid_t in zip(np.abs(y_bthk), one.segments_bt != 0, strict=True):
            total += row_thk[valid_t].mean(0) ** 2 if valid_t.any() else 0
    assert plan.size("tensor") == 1
    np.testing.assert_allclose(measured().layers[2]["heads"], total, rtol=5e-5)
    np.testing.assert_allclose(scores(MODEL, measured(), "output").layers[2]["heads"], total.sum(1) ** 0.5, rtol=5e-5)


def test_experts_count_their_tokens_weights_and_weighted_outputs():
    found = measured().layers[3]
    count, weight, output, width = 0, 0, 0, 0
    for one, (layers, _) in zip(BATCHES, recorded(), strict=True):
        of = {name: np.asarray(a, np.float64)[one.segments_bt != 0] for name, a in layers[3].items()}
        count, weight = count + of["mask"].sum(0), weight + of["weight"].sum(0)
        output = output + (of["weight"] * np.linalg.norm(of["expert_output"], axis=-1)).sum(0)
        sums_ef = (of["mask"][..., None] * np.abs(of["expert_hidden"])).sum(0)
        width = width + (sums_ef / np.maximum(of["mask"].sum(0), 1)[:, None]) ** 2
    np.testing.assert_array_equal(found["expert_count"], count)
    np.testing.assert_allclose(found["expert_weight"], weight, rtol=2e-5)
    np.testing.assert_allclose(found["expert_output"], output, rtol=5e-5)
    np.testing.assert_allclose(found["expert_width"], width, rtol=5e-5, atol=1e-8)
    of_units = {kind: scores(MODEL, measured(), kind).layers[3]["experts"] for kind in ("output", "count", "weight")}
    np.testing.assert_allclose(of_units["output"], output / np.maximum(count, 1), rtol=5e-5)
    np.testing.assert_array_equal(of_units["count"], count)
    np.testing.assert_allclose(of_units["weight"], weight, rtol=2e-5)


def test_a_layers_change_is_one_minus_the_mean_cosine():
    expected = np.zeros(len(MODEL.layers.main))
    for one, (layers, _) in zip(BATCHES, recorded(), strict=True):
        for number, layer in enumerate(layers):
            a, b = (np.asarray(layer[name], np.float64)[one.segments_bt != 0] for name in ("before", "after"))
            cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            expected[number] += 1 - cosine.mean()
    np.testing.assert_allclose(measured().changes[:5], expected, rtol=1e-4)
    np.testing.assert_array_equal(scores(MODEL, measured(), "output").changes, measured().changes[:5])


def test_the_score_of_a_channel_of_the_stream_is_summed_over_all_norms():
    found = scores(MODEL, measured(), "output").hidden
    layers = sum(np.sqrt(layer["hidden"]) for layer in measured().layers)
    assert len(measured().layers) == 7  # five, and two of the multi-token-prediction block
    np.testing.assert_allclose(found, layers + np.sqrt(squares("", None)), rtol=2e-5)


PLANS = [
    {"data": 2, "tensor": 2, "stream": "whole"},
    {"data": 2, "context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2, "fsdp": "parameters"},
]


@several_devices
@pytest.mark.parametrize("plan", PLANS, ids=["whole stream", "every axis"])
def test_plans_measure_what_one_device_does(plan):
    alone, folded = measured(), Calibration(opened(**plan)).measure(BATCHES)
    np.testing.assert_allclose(folded.final_d, alone.final_d, rtol=2e-4)
    np.testing.assert_allclose(folded.changes, alone.changes, rtol=2e-4)
    for mine, other in zip(folded.layers, alone.layers, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], other[name], rtol=2e-4, atol=1e-9, err_msg=name)


@several_devices
def test_plans_have_the_same_outgoing_weights():
    for mine, other in zip(outgoing(opened(**PLANS[1])), outgoing(opened()), strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-5, err_msg=name)


def test_a_plan_with_stages_is_refused():
    plan = make_plan(PlanConfig(stage=2, microbatches=2, shift="alltoall"), MODEL, abstract=True)
    with pytest.raises(ConfigError, match="PlanConfig.stage is 2; expected 1"):
        Calibration(opened()._replace(plan=plan))


KINDS = ["hidden_mse", "logit_mse", "logit_kl"]


@functools.cache
def distances() -> Calibration:
    """One device's, with the programs that it has compiled."""
    return Calibration(opened())


@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_without_layers_is_that_of_numpy(kind):
    """Layers 1 and 3 are left out: the residual stream passes them by."""
    calibration = distances()
    found = calibration.distance(kind, calibration.finals(BATCHES), [1, 3])
    head_dv = np.asarray(weights()[0]["head"]["weight"].get_value(), np.float64)
    distance, size = 0.0, 0.0
    for one in BATCHES:
        whole, without = (final_states(one, gone) for gone in ((), (1, 3)))
        if kind != "hidden_mse":
            whole, without = whole @ head_dv, without @ head_dv
        if kind == "logit_kl":
            log_p, log_q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (whole, without))
            distance, size = distance + (np.exp(log_p) * (log_p - log_q)).sum(), size + len(whole)
        else:
            distance, size = distance + ((whole - without) ** 2).sum(), size + (whole**2).sum()
    assert distance / size > 1e-3
    np.testing.assert_allclose(found, distance / size, rtol=1e-4)
    assert calibration.distance(kind, calibration.finals(BATCHES), []) < 1e-6


def final_states(one: Batch, gone: tuple[int, ...]) -> np.ndarray:
    """(n, d) of the tokens that are no padding."""
    gain_l = np.ones(len(MODEL.layers.main), np.float32)
    gain_l[list(gone)] = 0
    _, h_btd = recorder()(jax.tree.map(jnp.asarray, one), gain_l)
    return np.asarray(h_btd, np.float64)[one.segments_bt != 0]


@functools.cache
def separate_model():
    _, built = assemble(MODEL, PlanConfig())
    apart, states = written_out(MODEL, built, *jax.tree.map(jnp.asarray, weights()))
    return nnx.merge(apart.graph, *states)


def test_one_mlp_alone_is_narrowed():
    """Without its least important units the model is that whose second MLP of two repeated ones has rows of zeros;
    without any, that without the layer."""
    config = hybrid(pattern="-*-*", mtp_depths=0, intermediate_size=20)
    plan, built = assemble(config, PlanConfig())
    params, buffers = jax.tree.map(jnp.asarray, initial_state(config, 4))
    whole = Calibration(Opened(config, plan, built, params, buffers, None))
    finals = whole.finals(BATCHES)
    random = np.random.default_rng(5)
    units = [{"mlp": random.permutation(20) / 20} if letter == "-" else {} for letter in "-*-*"]
    prune = PruneConfig(num_layers=3, scored_sizes=(14, 9), depth_scores="logit_mse", depth_rows=8, rows=8)
    taken = Taken("activations", "output", 0)
    narrowed = lambda idle: whole.distance("logit_mse", finals, (), idle=idle)  # noqa: E731
    found = Found(Scores(np.zeros(48), units, None), None, no_distance, taken, narrowed=narrowed)
    lines = replaced(config, prune, found)
    assert [line[:2] for line in lines] == [(0, 14), (0, 9), (2, 14), (2, 9)]
    down = params["backbone"]["children"][0]["children"][0]["mixer"]["down"]
    gone = np.argsort(units[2]["mlp"])[: 20 - 9]
    params["backbone"]["children"][0]["children"][0]["mixer"]["down"] = down.replace(down[...].at[1, gone].set(0))
    narrower = Calibration(Opened(config, plan, built, params, buffers, None)).finals(BATCHES)
    head_dv, distance, size = np.asarray(params["head"]["weight"][...], np.float64), 0.0, 0.0
    for (one, before), (_, after) in zip(finals, narrower, strict=True):
        logits = [np.asarray(x, np.float64)[np.asarray(one.segments_bt) != 0] @ head_dv for x in (before, after)]
        distance, size = distance + ((logits[1] - logits[0]) ** 2).sum(), size + (logits[0] ** 2).sum()
    assert lines[3][2] == pytest.approx(distance / size, rel=1e-3) and lines[3][2] > 1e-6
    without = whole.distance("logit_mse", finals, (2,))
    assert narrowed(Idle(2, np.arange(20))) == pytest.approx(without, rel=1e-6)


def test_text_that_is_too_short_is_refused_with_the_rows_that_it_has(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    data = DataConfig(corpus=str(tmp_path), tokenizer="byte", heldout_fraction=0.0, tuning_fraction=0.0)
    prune = PruneConfig(hidden_size=4, rows=9, batch_size=2, sequence_length=24, depth_rows=2)
    tiny = Opened(hybrid(vocab_size=300), *(None,) * 5)  # type: ignore[arg-type]  # only its tokenizer is read
    with pytest.raises(ConfigError, match=r"PruneConfig.rows is 9; expected at most 5: the training split of"):
        list(calibration_batches(tiny, prune, data))
    assert list(calibration_batches(tiny, dataclasses.replace(prune, rows=5), data))


@several_devices
def test_the_distance_is_the_same_on_a_plan():
    alone, folded = distances(), Calibration(opened(data=2, context=2, tensor=2, expert=4))
    expected = alone.distance("logit_kl", alone.finals(BATCHES), [1, 3])
    assert folded.distance("logit_kl", folded.finals(BATCHES), [1, 3]) == pytest.approx(expected, rel=1e-4)


def test_a_distance_over_no_tokens_is_refused():
    """Nothing was compared; and final hidden states wait on the host."""
    calibration = distances()
    empty = [one._replace(segments_bt=np.zeros_like(one.segments_bt)) for one in BATCHES[:1]]
    finals = calibration.finals(empty)
    assert isinstance(finals[0][1], np.ndarray)
    with pytest.raises(ConfigError, match="logit_kl without layers 1, 3 is 0 / 0; expected finite sums, the second"):
        calibration.distance("logit_kl", finals, [3, 1])
