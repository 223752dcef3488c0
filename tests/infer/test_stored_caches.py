"""Keys and values in FP8 and states in int8, while an engine answers."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tests.helpers import several_devices
from tests.infer.engines import LATENT, asked, chosen, engine_of, ids, logits_of, opened, random_prompt

from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.config.recipe import Stored
from orogen.infer.prepare import stored_recipes
from orogen.kernels.state_blocks import Blocks
from orogen.layers.documents import Documents
from orogen.model.slots import Slots, SlotState
from orogen.parallel.plan import single_device_plan

SIZES = {"vocab_size": 24, "n_groups": 2, "moe_latent_size": 8}
WINDOW = {"sliding_window": 5, **SIZES}
PATTERNS = {"*w": {"rope_theta": 100.0, "head_dim": 6, **WINDOW}, "+": {**LATENT, **SIZES}}


def scaled(pattern, *scales, plan=None, **changes):
    """A model whose checkpoint has these scales of keys and values, by layer."""
    return opened(pattern, plan, **changes)._replace(cache_scales=scales)


def requests():
    """One whose text is longer than a window and a page; the same again; one that begins as it does; another."""
    prompt = random_prompt(1, 13, 24)
    return [asked(prompt, 9), asked(prompt, 9), asked((*prompt[:11], 3), 5), asked(random_prompt(2, 3, 24), 12)]


def scores_of(model, engine, found, wanted):
    """Log-probabilities of the engine's answers by one pass over each text, under its layers' recipes."""
    recipes = stored_recipes(engine.opened, engine.config)
    plan = dataclasses.replace(model.plan, recipes=recipes)
    texts = [(*request.prompt, *ids(outputs)) for request, outputs in zip(wanted, found, strict=True)]
    logits_btv = logits_of(model._replace(plan=plan), texts, 32).astype(np.float64)
    log_btv = logits_btv - np.log(np.exp(logits_btv).sum(-1, keepdims=True))
    for request, text, log_tv in zip(wanted, texts, log_btv, strict=True):
        first = len(request.prompt)
        yield [log_tv[place - 1, text[place]] for place in range(first, len(text))]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_answers_are_those_of_rounded_keys_and_values(pattern):
    """Pages, rings and latent vectors, with cached prefixes: log-probabilities are those of one pass that rounds alike,
    and far from those of one that does not."""
    model = scaled(pattern, *[(0.011, 0.017), (0.013, 0.02)][: len(pattern)], **PATTERNS[pattern])
    engine = engine_of(model, key_values="fp8")
    plain = engine_of(model)
    for _ in range(2):  # the second time from the prefix cache
        found = engine.run(requests())
        assert ids(found[0]) == ids(found[1])
        for outputs, expected in zip(found, scores_of(model, engine, found, requests()), strict=True):
            np.testing.assert_allclose([token.logprob for token in chosen(outputs)], expected, atol=2e-5)
    unrounded = list(scores_of(model, plain, found, requests()))
    assert abs(chosen(found[0])[0].logprob - unrounded[0][0]) > 1e-4
    pools = [a for a in jax.tree.leaves(engine._lane.settled()[0]) if a.dtype == jnp.float8_e4m3fn]
    assert len(pools) == 2 * len(pattern)


def test_a_layer_attends_to_rounded_keys_and_values():
    """One token after another, by loops in float64 over numbers that ml_dtypes rounds."""
    model = scaled("*", (0.02, 0.03), **SIZES)
    plan = single_device_plan(PlanConfig(), model.config)
    recipe = dataclasses.replace(plan.recipe, stored=Stored(key_values=(0.02, 0.03)))
    plan, layer = dataclasses.replace(plan, recipe=recipe, recipes=None), _layer(model)
    x_btd = np.random.default_rng(0).normal(size=(1, 7, model.config.hidden_size)).astype(np.float32)
    cache = layer.start(Slots(1, 4, 2, 4, 3, cache_dtype=jnp.float8_e4m3fn), jnp.float32)
    cache = cache._replace(table_bp=jnp.array([[2, 0, 3, 1]], jnp.int32))
    step = jax.jit(lambda x, place, cache: layer(x, Documents(jnp.ones((1, 1), jnp.int32), place), plan, cache))
    q, k, v, out = (np.asarray(getattr(layer, n)[...], np.float64) for n in ("query", "key", "value", "out"))
    size, groups = model.config.head_dim, model.config.num_key_value_heads

    def kept(x, scale):
        ratio = (x.astype(np.float32) * (np.float32(1) / np.float32(scale))).clip(-448, 448)
        return ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.float64(np.float32(scale))

    keys, values = kept(x_btd[0] @ k, 0.02).reshape(7, -1, size), kept(x_btd[0] @ v, 0.03).reshape(7, -1, size)
    for t in range(7):
        y_btd, cache = step(x_btd[:, t : t + 1], np.array([[t]], np.int32), cache)
        heads = []
        for h, q_k in enumerate((x_btd[0, t] @ q).reshape(-1, size)):
            g = h // (model.config.num_attention_heads // groups)
            terms = np.exp(keys[: t + 1, g] @ q_k * size**-0.5)
            heads.append(terms / terms.sum() @ values[: t + 1, g])
        np.testing.assert_allclose(y_btd[0, 0], np.concatenate(heads) @ out, atol=1e-5)


def _layer(model):
    from flax import nnx

    return nnx.merge(model.built.graph, model.params, model.buffers).backbone.children[0].mixer


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_states_in_blocks_are_those_of_the_recurrence(rounding):
    """Tokens one by one and in pieces, rows of which some wait: the state after each is its blocks, in numpy, rounded
    to the nearest; at random, within one step of it, not always to the nearest, equal for equal texts, and others at
    another position or with other rates."""
    rng, rows, heads, size, n = np.random.default_rng(3), 3, 4, 9, 5
    plan = single_device_plan(PlanConfig(), opened("M", **SIZES).config)
    recipe = dataclasses.replace(plan.recipe, stored=Stored(random_states=rounding == "stochastic"))
    plan = dataclasses.replace(plan, recipe=recipe, recipes=None)
    room = Slots(rows, 1, 1, 1, 4, state_dtype=jnp.int8)
    cache = room.recurrent(4, (1,), (heads, size, n), (), jnp.float32)
    assert isinstance(cache.state, Blocks)
    a_h, skip_h = -rng.uniform(1, 4, heads).astype(np.float32), np.ones(heads, np.float32)

    @jax.jit
    def ssd(cache, operands, docs):
        return cache.ssd(operands, docs, plan, skip_h=skip_h, implementation="chunked", chunk_size=4)

    values, scales = np.zeros((rows, heads, size, n)), np.zeros((rows, heads, size, 1))
    places_b, away, same = np.zeros(rows, np.int32), [], rounding == "nearest"
    for tokens, counts in ((1, (1, 1, 0)), (1, (1, 1, 1)), (4, (3, 3, 0)), (1, (0, 0, 1))):
        x, dt = rng.normal(size=(rows, tokens, heads, size)), rng.uniform(0.1, 1, (rows, tokens, heads))
        b, c = rng.normal(size=(2, rows, tokens, 2, n))
        for array in (x, dt, b, c):
            array[1] = array[0]  # the same text
        there = (np.arange(tokens) < np.array(counts)[:, None]).astype(np.int32)
        docs = Documents(there, (places_b[:, None] + np.arange(tokens)).astype(np.int32))
        operands = (x.astype(np.float32), dt.astype(np.float32), a_h, b.astype(np.float32), c.astype(np.float32))
        y, state = ssd(cache, operands, docs)
        for row, count in enumerate(counts):
            whole = values[row] * scales[row]
            for t in range(count):
                decay = np.exp(dt[row, t] * a_h)[:, None, None]
                both = np.repeat(np.stack([b[row, t], c[row, t]]), heads // 2, 1)
                whole = decay * whole + (dt[row, t][:, None] * x[row, t])[..., None] * both[0][:, None]
                wanted = (whole * both[1][:, None]).sum(-1) + x[row, t]
                np.testing.assert_allclose(y[row, t], wanted, atol=1e-5)
            if count:
                scales[row] = np.abs(whole).max(-1, keepdims=True) / 127
                ratio = whole / scales[row]
                found = np.asarray(state.values[row], np.float64)
                np.testing.assert_allclose(state.scales[row], scales[row], rtol=1e-5)
                away.append(np.abs(found - ratio).max())
                values[row] = found
            else:
                np.testing.assert_array_equal(state.values[row], values[row])
                np.testing.assert_array_equal(state.scales[row], cache.state.scales[row])
        np.testing.assert_array_equal(state.values[0], state.values[1])
        before, cache, places_b = cache, SlotState(cache.windows, state), (places_b + np.array(counts)).astype(np.int32)
    assert max(away) < 0.5 + 1e-3 if same else 0.6 < max(away) < 1 + 1e-3
    other_h = np.append(a_h[:-1], 2 * a_h[-1])  # the other heads' states stay
    for place, rates_h, heads_of in ((1, a_h, slice(None)), (0, other_h, slice(-1))):
        here = (*operands[:2], rates_h, *operands[3:])
        _, other = ssd(before, here, docs._replace(positions_bt=docs.positions_bt + place))
        assert (np.asarray(other.values)[2, heads_of] == np.asarray(state.values)[2, heads_of]).all() == same


def test_float16_states_are_rounded_as_the_config_says():
    """After one token, of both kinds of layer: what float32 keeps, rounded as numpy does; at random, not always so."""
    model = opened("mM", **SIZES)

    def kept(**settings):
        engine = engine_of(model, prefix_cache=False, **settings)
        engine.run([asked([5], 1)])
        return [np.asarray(a) for a in jax.tree.leaves(engine._lane.settled()[0])]

    half = {"state_dtype": "float16"}
    each = zip(kept(), kept(**half, state_rounding="nearest"), kept(**half, state_rounding="stochastic"), strict=True)
    states = [found for found in each if found[1].dtype == np.float16]
    assert len(states) == 2
    for whole, *rounded in states:
        step = np.spacing(np.abs(whole).astype(np.float16)).astype(np.float64)
        nearest, drawn = (np.abs(one - whole.astype(np.float64)) / step for one in rounded)
        assert nearest.max() < 0.5 + 1e-3 and 0.6 < drawn.max() < 1 + 1e-3


@several_devices
@pytest.mark.parametrize("pattern", ["M*w", "m+"])
def test_two_ranks_of_heads_answer_as_one_device(pattern):
    """States to the nearest, since random bits depend on an element's index on its device."""
    sizes = PATTERNS[pattern[1:]]
    scales = [None if letter in "Mm" else (0.012, 0.02) for letter in pattern]
    found = []
    for plan in (None, PlanConfig(tensor=2)):
        model = scaled(pattern, *scales, plan=plan, **sizes)
        settings = {"key_values": "fp8", "state_dtype": "int8", "state_rounding": "nearest", "replay": 4}
        found.append(engine_of(model, **settings).run(requests()[2:]))
    for one, other in zip(*found, strict=True):
        assert ids(one) == ids(other)
        logprobs = [[token.logprob for token in chosen(outputs)] for outputs in (one, other)]
        np.testing.assert_allclose(*logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"state_dtype": "float16", "state_rounding": "nearest"},
        {"state_dtype": "int8", "drafter": "lookup", "drafts": 2},
    ],
)
def test_answers_with_states_in_fewer_bits_are_near(settings):
    """Of both kinds of Mamba layer; texts that are the same get the same answer, also from the prefix cache."""
    model = opened("mM", **SIZES)
    engine = engine_of(model, **settings)
    for _ in range(2):
        found = engine.run(requests())
        assert ids(found[0]) == ids(found[1])
        for outputs, expected in zip(found, scores_of(model, engine, found, requests()), strict=True):
            far = np.abs([token.logprob for token in chosen(outputs)] - np.array(expected))
            assert far.max() < 0.1
            assert settings["state_dtype"] == "float16" or far.max() > 1e-5


def test_engines_of_other_scales_run_other_programs():
    """Which close over them: `engine_of` shares programs only between engines that would trace the same."""
    readers = []
    for scales in ((0.011, 0.017), (0.3, 0.4), (0.3, 0.4)):
        readers.append(engine_of(scaled("*", scales, **SIZES), key_values="fp8").programs.reader)
    assert readers[0] is not readers[1] is readers[2]


def test_memory_counts_what_is_kept():
    """Bytes of caches on a device, by hand: two heads of 5 numbers for keys and values, states of 6 x 3 x 7."""
    model = scaled("*M", (1.0, 1.0), None, **SIZES)

    def held(**settings):
        return engine_of(model, **settings).programs.bytes_per_device(2, 8)

    pages, states = 8 * 8 * 2 * 2 * 5, 2 * 6 * 3
    assert held() - held(key_values="fp8") == pages * (4 - 1)
    assert held() - held(state_dtype="int8") == states * (7 * 4 - (7 + 4))
    assert held() - held(state_dtype="float16") == states * 7 * 2


def test_refusals():
    model = scaled("*M", None, None, **SIZES)
    with pytest.raises(
        ConfigError, match=r"key_values is 'fp8'; expected a checkpoint with k_scale and v_scale for layer 0"
    ):
        engine_of(model, key_values="fp8")
    assert engine_of(model, key_values="fp8_unscaled").run([asked([1], 1)])
    for settings, field in (
        ({"kernels": "triton", "state_dtype": "int8", "state_rounding": "nearest"}, "kernels"),
        ({"kernels": "triton", "state_dtype": "float16", "state_rounding": "nearest"}, "kernels"),
        ({"key_values": "fp8_dynamic"}, "key_values"),
    ):
        with pytest.raises(ConfigError, match=rf"EngineConfig\.{field}"):
            engine_of(model, **settings)
