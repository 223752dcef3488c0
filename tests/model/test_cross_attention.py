"""Layers that see images: nothing changes before they are trained, and a token sees one image, of its own document.

Letters: b batch, t time, d model, n vectors of a row's images, p vectors of an image, v their width, l latents.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid, run_config
from tests.model.small import randomised

from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.config.vision import FEATURES, IMAGE
from orogen.data.images import Placed, images_seen, with_images
from orogen.data.packing import Batch
from orogen.layers.documents import Documents, documents
from orogen.model.block import Layer
from orogen.model.cross_attention import GatedCrossAttention, Images
from orogen.model.lm import LanguageModel
from orogen.model.resampler import CaptionEncoder
from orogen.parallel.plan import make_plan
from orogen.train.sides import GATE, with_open_gates
from orogen.train.verify import verify

SIZES = {
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "image_feature_size": 5, "image_features": 7,
    "resampler_latents": 3, "resampler_layers": 2, "mtp_depths": 0,
}  # fmt: skip
MODEL = hybrid(pattern="Mxg-xg-", **SIZES)
PLANNED = hybrid(pattern="xg", **SIZES | {"resampler_layers": 1, "retrieved_captions": 2, "caption_tokens": 3})
PLAIN = hybrid(pattern="M--", **{**SIZES, "mtp_depths": 0})
SHAPE = (MODEL.image_features, MODEL.image_feature_size)
PLAN = make_plan(PlanConfig(), MODEL)


@functools.cache
def parameters():
    """A random model, its gates closed."""
    graph, params, buffers = nnx.split(jax.eval_shape(lambda: LanguageModel(MODEL, nnx.Rngs(0))), nnx.Param, ...)
    params = randomised(params, np.random.default_rng(0))
    close = lambda path, x: 0 * x if any(getattr(k, "key", None) == "tanh_gate" for k in path) else x  # noqa: E731
    return graph, jax.tree_util.tree_map_with_path(close, params), buffers


@functools.cache
def program():
    graph, _, buffers = parameters()

    @jax.jit
    def hidden(params, batch):
        model = nnx.merge(graph, params, buffers)
        docs = Documents(batch.segments_bt, batch.positions_bt)
        return model.hidden(batch.tokens_bt, docs, PLAN, model.given_images(batch.extras, PLAN))[0]

    return hidden


def a_batch(segments, placed, seed=1):
    segments_bt = np.array(segments, np.int32)
    docs = documents(jnp.asarray(segments_bt))
    tokens_bt = np.random.default_rng(seed).integers(0, 96, segments_bt.shape, dtype=np.int32)
    batch = Batch(tokens_bt, np.asarray(docs.segments_bt), np.asarray(docs.positions_bt), np.ones(segments_bt.shape))
    return with_images(batch, placed, room=3, shape=SHAPE)


def image(seed):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def test_a_token_sees_the_latest_image_of_its_own_document():
    #                             |image      |image             |image  padding
    segments_t = np.array([1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 0])
    assert images_seen(segments_t, [1, 3, 10]).tolist() == [0, 1, 1, 2, 2, 0, 0, 0, 0, 0, 3, 3, 0, 0]
    assert images_seen(segments_t, [5]).tolist() == [0] * 5 + [1] * 3 + [0] * 6
    assert images_seen(segments_t, []).tolist() == [0] * 14


@pytest.mark.parametrize("letter", "xg")
def test_a_closed_gate_leaves_the_stream_as_it_is_to_the_bit(letter):
    graph, abstract = nnx.split(jax.eval_shape(lambda: Layer(letter, MODEL, nnx.Rngs(0))))
    state = randomised(abstract, np.random.default_rng(5))
    state["mixer"]["tanh_gate"].set_value(jnp.zeros(1))
    x_btd = np.random.default_rng(6).normal(size=(2, 5, 48)).astype(np.float32)
    vectors_bnd = np.random.default_rng(7).normal(size=(2, 3, 48)).astype(np.float32)
    images = Images(jnp.asarray(vectors_bnd), jnp.ones((2, 3), jnp.int32), jnp.ones((2, 5), jnp.int32))
    given = images if letter == "x" else None
    docs = documents(jnp.ones((2, 5), jnp.int32))
    found, _ = nnx.merge(graph, state)(jnp.asarray(x_btd), docs, PLAN, given)
    assert np.array_equal(found, x_btd)
    state["mixer"]["tanh_gate"].set_value(jnp.ones(1))
    assert not np.allclose(nnx.merge(graph, state)(jnp.asarray(x_btd), docs, PLAN, given)[0], x_btd)


def test_with_closed_gates_the_model_is_the_language_model():
    """Up to how two programs are fused: each layer is the identity to the bit."""
    _, params, buffers = parameters()
    batch = a_batch([[1] * 6 + [2] * 5], [[Placed(1, image(1)), Placed(7, image(2))]])
    graph = nnx.split(jax.eval_shape(lambda: LanguageModel(PLAIN, nnx.Rngs(0))), nnx.Param, ...)[0]
    first, repeated = (params["backbone"]["children"][number] for number in (0, 1))  # M, and xg- twice
    inner = {"children": {0: repeated["children"][2]}}
    bare = nnx.State({
        **{name: params[name] for name in ("embedding", "head", "norm")},
        "backbone": {"children": {0: first, 1: inner}},
    })  # fmt: skip

    @jax.jit
    def hidden(params):
        docs = Documents(batch.segments_bt, batch.positions_bt)
        return nnx.merge(graph, params, buffers).hidden(batch.tokens_bt, docs, PLAN)[0]

    np.testing.assert_allclose(program()(params, batch), hidden(bare), rtol=1e-5, atol=1e-6)


def test_only_tokens_after_an_image_depend_on_it():
    params = with_open_gates(parameters()[1])
    segments = [[1] * 6 + [2] * 5]
    first, second, other = image(1), image(2), image(3)
    before = program()(params, a_batch(segments, [[Placed(2, first), Placed(8, second)]]))
    changed = program()(params, a_batch(segments, [[Placed(2, other), Placed(8, second)]]))
    moved_t = np.abs(np.asarray(before - changed)).max((0, 2)) > 1e-6
    assert moved_t.tolist() == [False] * 2 + [True] * 4 + [False] * 5


def test_a_packed_row_equals_its_documents_apart():
    params = with_open_gates(parameters()[1])
    packed = a_batch([[1] * 6 + [2] * 5], [[Placed(2, image(1)), Placed(6, image(2)), Placed(8, image(3))]])
    together = program()(params, packed)
    for part, placed in (
        (slice(0, 6), [Placed(2, image(1))]),
        (slice(6, 11), [Placed(0, image(2)), Placed(2, image(3))]),
    ):
        tokens_bt = packed.tokens_bt[:, part]
        alone = a_batch([[1] * tokens_bt.shape[1]], [placed])._replace(tokens_bt=tokens_bt)
        np.testing.assert_allclose(together[:, part], program()(params, alone), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("plan", "length"), [({"data": 2, "tensor": 2}, 14), ({"context": 2, "tensor": 2}, 28)])
def test_a_plan_computes_what_one_device_does(plan, length):
    """Loss and every gradient, the gates open, over ranks that hold different rows, parts of rows, and heads."""
    config = run_config(PLANNED, plan=plan, batch_size=4, sequence_length=length)
    found = verify(config, optimizers=["adamw"])
    assert found.passed and not found.zero_leaves, found


def test_a_pipeline_computes_what_one_device_does():
    """With captions, whose encoder every stage runs beside the resampler, over two tensor ranks under 1F1B."""
    model = hybrid(pattern="xg|xg", **SIZES | {"resampler_layers": 1, "retrieved_captions": 2, "caption_tokens": 3})
    plan = {"stage": 2, "tensor": 2, "schedule": "1f1b", "microbatches": 2}
    found = verify(run_config(model, plan=plan, batch_size=2, sequence_length=28), optimizers=["adamw"])
    assert found.passed and not found.zero_leaves, found


def test_the_layer_by_hand():
    """Against numpy in float64: one head group, by the formula."""
    layer = GatedCrossAttention(MODEL, nnx.Rngs(3))
    layer.tanh_gate.set_value(jnp.array([0.7]))
    rng = np.random.default_rng(4)
    x_btd, vectors_bnd = rng.normal(size=(1, 4, 48)), rng.normal(size=(1, 6, 48))
    image_bn, image_bt = np.array([[1, 1, 1, 2, 2, 2]]), np.array([[0, 1, 2, 1]])
    given = Images(*(jnp.asarray(a) for a in (vectors_bnd.astype(np.float32), image_bn, image_bt)))
    y_btd, kept = layer(jnp.asarray(x_btd, jnp.float32), documents(jnp.ones((1, 4), jnp.int32)), PLAN, given)
    weight = lambda name: np.asarray(getattr(layer, name)[...], np.float64)  # noqa: E731
    q_thk = (x_btd[0] @ weight("query")).reshape(4, 6, 4)
    k_ngk, v_ngk = ((vectors_bnd[0] @ weight(name)).reshape(6, 2, 4) for name in ("key", "value"))
    expected = np.zeros((4, 24))
    for t, seen in enumerate(image_bt[0]):
        for h in range(6) if seen else ():
            those = image_bn[0] == seen
            p = np.exp(k_ngk[those, h // 3] @ q_thk[t, h] / 2)
            expected[t, 4 * h : 4 * h + 4] = p @ v_ngk[those, h // 3] / p.sum()
    np.testing.assert_allclose(y_btd[0], np.tanh(0.7) * expected @ weight("out"), rtol=2e-5, atol=1e-6)
    assert kept is None and not np.asarray(y_btd)[0, 0].any()


def test_a_resampled_image_does_not_depend_on_its_neighbours():
    graph, params, buffers = parameters()
    resampler = nnx.merge(graph, params, buffers).resampler
    features = jnp.asarray(np.stack([image(1), image(2)]))
    run = jax.jit(lambda f: resampler(f, PLAN))
    together, alone = run(features), run(features[1:])
    assert together.shape == (2, 3, 48)
    np.testing.assert_allclose(together[1:], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_captions_are_encoded_by_the_definition():
    """Against numpy in float64: two images, each with two captions of three tokens."""
    encoder = CaptionEncoder(PLANNED, nnx.Rngs(5))
    rng = np.random.default_rng(6)
    for leaf in jax.tree.leaves(nnx.state(encoder), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        leaf.set_value(jnp.asarray(rng.normal(size=leaf.get_value().shape) / 4, jnp.float32))
    token_ns = np.array([[5, 9, 1, 7, 7, 2], [9, 5, 1, 0, 3, 2]], np.int32)
    found = np.asarray(jax.jit(lambda t: encoder(t, PLAN))(token_ns))
    value = lambda leaf: np.asarray(leaf[...], np.float64)  # noqa: E731

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + PLANNED.layer_norm_epsilon) * value(scale.weight)

    (layer,) = encoder.layers
    for image_tokens, image_found in zip(token_ns, found, strict=True):
        for caption, vectors in zip(image_tokens.reshape(2, 3), image_found.reshape(2, 3, 48), strict=True):
            x_cd = value(encoder.tokens)[caption] + value(encoder.positions)
            h_cd = norm(x_cd, layer.latent_norm)
            q_chk = (h_cd @ value(layer.query)).reshape(3, 6, 4)
            k_cgk, v_cgk = ((h_cd @ value(w)).reshape(3, 2, 4) for w in (layer.key, layer.value))
            y_chk = np.zeros((3, 6, 4))
            for h in range(6):
                p_cs = np.exp(q_chk[:, h] @ k_cgk[:, h // 3].T / 2)
                y_chk[:, h] = p_cs @ v_cgk[:, h // 3] / p_cs.sum(1, keepdims=True)
            x_cd = x_cd + y_chk.reshape(3, 24) @ value(layer.out)
            up_cf = np.maximum(norm(x_cd, layer.mlp_norm) @ value(layer.mlp.up), 0) ** 2
            x_cd = x_cd + up_cf @ value(layer.mlp.down)
            np.testing.assert_allclose(vectors, norm(x_cd, encoder.norm), rtol=2e-5, atol=2e-6)


def test_rows_without_room_and_patterns_that_cannot_see_are_refused():
    graph, params, buffers = parameters()
    model = nnx.merge(graph, params, buffers)
    extras = {FEATURES: jnp.zeros((1, 2, 15)), IMAGE: jnp.zeros((1, 2), jnp.int32)}
    with pytest.raises(ValueError, match="30 numbers per row; expected 35 or more"):
        model.given_images(extras, PLAN)
    with pytest.raises(ValueError, match="row 0 has 4 images; expected at most 3"):
        a_batch([[1] * 9], [[Placed(n, image(1)) for n in range(4)]])
    with pytest.raises(ConfigError, match="expected no x after /"):
        hybrid(pattern="x/x", **{**SIZES, "mtp_depths": 1})
    with pytest.raises(ConfigError, match="resampler_latents is None"):
        hybrid(pattern="x", **{**SIZES, "resampler_latents": None})
    assert GATE == 0.5
