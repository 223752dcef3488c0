"""Attention and state-space layers over several context ranks: the layer on one device, output and every gradient.

Letters: b batch, t time, d model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import hybrid

from orogen.config.checks import ConfigError
from orogen.config.plan import PlanConfig
from orogen.layers.documents import documents
from orogen.model.block import Layer
from orogen.parallel.axes import STREAM
from orogen.parallel.context import continued, entering, joined, own, parts, taken, whole, zigzag
from orogen.parallel.plan import make_plan

ATTENTION = [{"context_attention": method} for method in ("ring", "allgather", "alltoall")]
SSM = [{"context_ssm": method} for method in ("state", "heads")]
SIZES = [{"context": 2, "data": 2}, {"context": 4, "tensor": 2}, {"context": 8, "shift": "alltoall"}]
BATCH, LENGTH = 2, 16 * 9  # parts of 36, 18 and 9 tokens
MAMBA1 = {"mamba_intermediate_size": 48, "time_step_rank": 3, "mamba_proj_bias": True, "mamba_norm_groups": 1}
EXTRAS = {"sliding_window": 11, "attention_sinks": True, "qk_norm": True, "rope_theta": 100.0}
LATENT = {
    "kv_lora_rank": 24, "q_lora_rank": 48, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3,
    "rope_theta": 100.0,
}  # fmt: skip


def segments() -> np.ndarray:
    """One row's documents end on parts' borders, inside parts (several in one) and after many; it ends in padding. The
    other is one document."""
    lengths = [9, 27, 1, 2, 3, 41, 18, 19, 24]
    row = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    row[-11:] = 0
    return np.stack([row, np.ones_like(row)]).astype(np.int32)


@functools.cache
def result(letter: str, plan_config: PlanConfig, changes: tuple):
    """The layer's output, and the gradients of its parameters and input, of Σ y · g."""
    model = hybrid(pattern=letter, mtp_depths=0, **dict(changes))
    plan = make_plan(plan_config, model)
    rng = np.random.default_rng(0)
    x_btd, g_btd = (rng.normal(size=(BATCH, LENGTH, model.hidden_size)).astype(np.float32) for _ in range(2))
    graph, params = nnx.split(Layer(letter, model, nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)  # zeros and ones would hide what they multiply
    params = jax.tree.unflatten(structure, [a + 0.1 * rng.normal(size=a.shape).astype(a.dtype) for a in leaves])
    order = zigzag(LENGTH, plan.size("context"))
    docs = jax.tree.map(lambda a: np.asarray(a)[:, order], documents(segments()))

    def device(params, x_btd, g_btd, docs):
        def value(params, x_btd):
            y_btd, _ = nnx.merge(graph, params)(x_btd, docs, plan, None)
            # Where ranks hold copies of the stream, each counts tokens of its own.
            return plan.total(jnp.sum(plan.deal(y_btd) * plan.deal(g_btd))), y_btd

        (_, y_btd), grads = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, x_btd)
        return plan.agreed(y_btd, *STREAM, None), *grads

    tokens = plan.spec(*STREAM, None)
    inputs = (plan.specs(params), tokens, tokens, plan.spec("batch", "context"))
    run = jax.jit(plan.run(device, inputs=inputs, outputs=(tokens, plan.specs(params), tokens)))
    with jax.default_matmul_precision("highest"):
        y_btd, grads, grad_x_btd = jax.device_get(run(params, x_btd[:, order], g_btd[:, order], docs))
    back = np.argsort(order)
    return y_btd[:, back], grads, grad_x_btd[:, back]


def check(letter: str, plan: dict, **changes) -> None:
    """Equal to one device within 1e-5 of the largest output and of each gradient's norm."""
    key = tuple(changes.items())
    found, expected = result(letter, PlanConfig(**plan), key), result(letter, PlanConfig(), key)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
    for a, b in zip(jax.tree.leaves(found[1:]), jax.tree.leaves(expected[1:]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), (a.shape, np.linalg.norm(b))


@pytest.mark.parametrize("method", ATTENTION, ids=lambda m: m["context_attention"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention(sizes, method):
    check("*", sizes | method)


@pytest.mark.parametrize("method", ATTENTION, ids=lambda m: m["context_attention"])
def test_attention_with_a_window_and_sinks(method):
    check("w", {"context": 4, "tensor": 2} | method, **EXTRAS)


@pytest.mark.parametrize("method", ATTENTION, ids=lambda m: m["context_attention"])
def test_latent_attention(method):
    check("+", {"context": 4} | method, **LATENT)


def test_ring_by_blocks_of_queries(monkeypatch):
    monkeypatch.setattr("orogen.model.context_blocks.BLOCK", 8)
    check("w", {"context": 4, "attention": "blocked"}, **EXTRAS)


@pytest.mark.parametrize("method", SSM, ids=lambda m: m["context_ssm"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_mamba2(sizes, method):
    check("M", sizes | method)


@pytest.mark.parametrize("method", SSM, ids=lambda m: m["context_ssm"])
@pytest.mark.parametrize("sizes", SIZES[1:3], ids=str)
def test_mamba1(sizes, method):
    check("m", sizes | method, **MAMBA1)


def test_a_whole_stream_of_a_piece_of_the_sequence():
    """Tensor parallelism alone inside a context rank."""
    check("M", {"context": 2, "data": 2, "tensor": 2, "stream": "whole"}, mamba_proj_bias=True)


def test_a_convolution_of_one_tap_has_no_halo():
    check("M", {"context": 4}, conv_kernel=1)


@pytest.mark.parametrize(
    ("letter", "field", "value", "choice", "changes"),
    [
        ("*", "num_attention_heads", 12, {"context_attention": "alltoall"}, {"num_attention_heads": 12}),
        ("M", "mamba_num_heads", 12, {"context_ssm": "heads"}, {"mamba_num_heads": 12}),
        ("m", "mamba_intermediate_size", 12, {"context_ssm": "heads"}, MAMBA1 | {"mamba_intermediate_size": 12}),
    ],
)
def test_heads_that_do_not_divide_over_the_ranks_are_refused(letter, field, value, choice, changes):
    model = hybrid(pattern=letter, mtp_depths=0, **changes)
    make_plan(PlanConfig(context=4, tensor=2), model, abstract=True)
    with pytest.raises(ConfigError) as caught:
        make_plan(PlanConfig(context=4, tensor=2, **choice), model, abstract=True)
    assert str(caught.value) == (
        f"ModelConfig.{field} is {value}; expected a multiple of PlanConfig.context x tensor = 8 "
        "(nearest legal context x tensor: 6, 12)"
    )


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_entering_states_by_a_loop(ranks):
    plan = make_plan(PlanConfig(context=ranks), hybrid())
    rng = np.random.default_rng(1)
    decay, state = rng.random((1, 2 * ranks, 3, 1)), rng.normal(size=(1, 2 * ranks, 3, 5))
    decay[0, ranks, 1] = 0  # a document that ends
    expected, carried = [], np.zeros((3, 5))
    for a, s in zip(decay[0], state[0], strict=True):
        expected.append(carried)
        carried = a * carried + s
    order, spec = zigzag(2 * ranks, ranks), plan.spec("batch", "context")
    device = lambda a, s: entering(parts(a, plan)[:, 0], parts(s, plan)[:, 0], plan)[None]  # noqa: E731
    run = jax.jit(plan.run(device, inputs=(spec, spec), outputs=spec))
    found = np.asarray(run(jnp.asarray(decay[:, order], jnp.float32), jnp.asarray(state[:, order], jnp.float32)))
    np.testing.assert_allclose(found[0, np.argsort(order)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sequence_that_continues_another_by_a_loop(ranks):
    """Of two rows: the states that enter each part and that leave the whole; and tokens at places of either."""
    plan, rng = make_plan(PlanConfig(context=ranks), hybrid()), np.random.default_rng(2)
    decay, state = rng.random((2, 2 * ranks, 1)), rng.normal(size=(2, 2 * ranks, 5))
    start, index = rng.normal(size=(2, 5)), np.array([[2 * ranks - 1, 0, 1], [ranks, ranks - 1, 3]])
    entered, carried = [], start
    for part in range(2 * ranks):
        entered.append(carried)
        carried = decay[:, part] * carried + state[:, part]
    order, spec = zigzag(2 * ranks, ranks), plan.spec("batch", "context")

    def device(a, s, start):
        enters, after = continued(parts(a, plan)[:, 0], parts(s, plan)[:, 0], start, plan)
        whole_ones = (plan.agreed(a, "batch") for a in (after, taken(s, jnp.asarray(index), plan)))
        return joined(enters[:, None], plan), *whole_ones, own(whole(s, plan), plan) - s

    inputs = (jnp.asarray(a, jnp.float32) for a in (decay[:, order], state[:, order], start))
    run = plan.run(device, inputs=(spec, spec, plan.spec("batch")), outputs=(spec, *[plan.spec("batch")] * 2, spec))
    enters, after, tokens, nothing = jax.device_get(jax.jit(run)(*inputs))
    np.testing.assert_allclose(enters[:, np.argsort(order)], np.stack(entered, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, carried, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tokens, np.take_along_axis(state, index[..., None], 1).astype(np.float32))
    assert not nothing.any()


def exchanged(length: int, **choices) -> int:
    """Bytes that the compiled gradient of a Mamba-2 layer moves between ranks, by its collectives' results."""
    model = hybrid(pattern="M", mtp_depths=0)
    plan = make_plan(PlanConfig(context=4, **choices), model)
    graph, params = nnx.split(jax.eval_shape(lambda: Layer("M", model, nnx.Rngs(0))))

    def device(params, x_btd, docs):
        def value(x_btd):
            return plan.total(jnp.sum(nnx.merge(graph, params)(x_btd, docs, plan, None)[0] ** 2))

        return jax.grad(value)(x_btd)

    tokens, rows = plan.spec(*STREAM, None), plan.spec("batch", "context")
    run = jax.jit(plan.run(device, inputs=(plan.specs(params), tokens, rows), outputs=tokens))
    x_btd = jax.ShapeDtypeStruct((1, length, model.hidden_size), jnp.float32)
    ints = jax.ShapeDtypeStruct((1, length), jnp.int32)
    moving = {"ppermute", "all_to_all", "all_gather", "psum_scatter", "reduce_scatter"}

    def count(jaxpr) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in moving:
                total += sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.outvars)
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(run)(params, x_btd, type(documents(segments()))(ints, ints)).jaxpr)


def test_states_are_as_many_bytes_at_every_length():
    at = {length: exchanged(length) for length in (64, 128, 512)}
    assert at[64] == at[128] == at[512] > 0, at
    assert exchanged(512, context_ssm="heads") > 4 * exchanged(64, context_ssm="heads") > 0
