"""Ring and gathered attention by blocks of a fused kernel, with a slow kernel in its place: one device, and gradients.

Letters: b batch, t queries, s keys, h query heads, g key heads, k head size.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from tests.helpers import hybrid

from orogen.config.plan import PlanConfig
from orogen.kernels.attention import attention
from orogen.layers.documents import numbered
from orogen.model import context_attention, context_fused
from orogen.parallel.context import zigzag
from orogen.parallel.plan import make_plan

BATCH, HEADS, GROUPS, SIZE, SCALE = 2, 6, 2, 5, 0.37
METHODS = ("ring", "allgather")
PLANS = {"2": {"context": 2}, "4": {"context": 4}, "4 gathered": {"context": 4, "context_attention": "allgather"}}
# Lengths of each row's documents, by name; the last ends in padding where the name says so.
PACKINGS = {
    "one document each": ((72,), (72,)),
    "two crossing, and one": ((25, 47), (72,)),
    "on borders, inside parts, many": ((9, 9, 1, 2, 3, 21, 18, 4, 5), (18, 18, 36)),
    "padding": ((30, 35, 7), (1, 70, 1)),
}


def scores(qkv, lengths, causal, scale):
    """(b, h, t, s) float32, -inf where nothing is seen, with each query's keys and values repeated."""
    q_bthk, k_bshk, v_bshk = qkv[0], *(jnp.repeat(a, HEADS // GROUPS, axis=2) for a in qkv[1:])
    scores_bhts = scale * jnp.einsum("bthk,bshk->bhts", q_bthk, k_bshk)
    queries, keys = jnp.arange(q_bthk.shape[1])[:, None], jnp.arange(k_bshk.shape[1])
    seen_bts = jnp.broadcast_to((keys <= queries) | (not causal), (len(q_bthk), *scores_bhts.shape[2:]))
    if lengths is not None:
        seen_bts &= keys < lengths.k_b[:, None, None]
    return jnp.where(seen_bts[:, None], scores_bhts, -jnp.inf), k_bshk, v_bshk


def beyond(a, length_b, lengths):
    """NaN beyond the lengths, which no caller may read."""
    if lengths is None:
        return a
    inside_bt = jnp.arange(a.shape[1]) < length_b[:, None]
    return jnp.where(inside_bt.reshape(*inside_bt.shape, *(1,) * (a.ndim - 2)), a, jnp.nan)


def attend_slowly(qkv, lengths, *, causal, scale):
    scores_bhts, _, v_bshk = scores(qkv, lengths, causal, scale)
    y_bthk = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores_bhts), v_bshk)
    lse_bth = jnp.swapaxes(jax.nn.logsumexp(scores_bhts, -1), 1, 2)
    return tuple(beyond(a, lengths and lengths.q_b, lengths) for a in (y_bthk, lse_bth))


def pull_slowly(qkv, softmax, lengths, *, causal, scale):
    scores_bhts, k_bshk, v_bshk = scores(qkv, lengths, causal, scale)
    p_bhts = jnp.exp(scores_bhts - jnp.swapaxes(softmax.lse_bth, 1, 2)[..., None])
    if lengths is not None:
        inside_bt = jnp.arange(p_bhts.shape[2]) < lengths.q_b[:, None]
        p_bhts = jnp.where(inside_bt[:, None, :, None], p_bhts, 0)
    delta_bht = jnp.einsum("bthk,bthk->bht", softmax.dy_bthk, softmax.y_bthk)
    ds_bhts = p_bhts * (jnp.einsum("bthk,bshk->bhts", softmax.dy_bthk, v_bshk) - delta_bht[..., None]) * scale
    shared = lambda a_bshk: a_bshk.reshape(*a_bshk.shape[:2], GROUPS, -1, SIZE).sum(3)  # noqa: E731
    dq_bthk = jnp.einsum("bhts,bshk->bthk", ds_bhts, k_bshk)
    dk_bsgk = shared(jnp.einsum("bhts,bthk->bshk", ds_bhts, qkv[0]))
    dv_bsgk = shared(jnp.einsum("bhts,bthk->bshk", p_bhts, softmax.dy_bthk))
    of = (lengths.q_b, lengths.k_b, lengths.k_b) if lengths is not None else (None,) * 3
    return tuple(beyond(a, b, lengths) for a, b in zip((dq_bthk, dk_bsgk, dv_bsgk), of, strict=True))


@pytest.fixture
def slow_kernel(monkeypatch):
    monkeypatch.setitem(context_fused.KERNELS, "cudnn", (attend_slowly, pull_slowly))


def operands(packing: str) -> SimpleNamespace:
    lengths = PACKINGS[packing]
    segments_bt = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]).astype(np.int32)
    if packing == "padding":
        segments_bt[0, -7:] = segments_bt[1, -1:] = 0
    rng = np.random.default_rng(len(packing))
    shapes = [(*segments_bt.shape, n, SIZE) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    q, k, v, g = (rng.normal(size=s).astype(np.float32) for s in shapes)
    return SimpleNamespace(qkv=(2 * q, 2 * k, v), cotangent=g, segments_bt=numbered(segments_bt))


@functools.cache
def expected(packing: str):
    """Outputs and gradients of q, k and v on one device."""
    given = operands(packing)
    return one_device(*given.qkv, given.cotangent, given.segments_bt)


@jax.jit
def one_device(q, k, v, cotangent, segments_bt):
    run = functools.partial(attention, segments_bt=segments_bt, scale=SCALE, implementation="full")
    y_bthk, pull = jax.vjp(run, q, k, v)
    return y_bthk, *pull(cotangent)


@functools.cache
def on_ranks(kernels, choices: tuple):
    """`one_device` on context ranks, whose order of tokens operands and results have, and their number."""
    plan = make_plan(PlanConfig(**dict(choices)), hybrid())  # which would ask for a GPU
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, attention="cudnn"))

    def device(q, k, v, cotangent, segments_bt):
        assert context_fused.KERNELS["cudnn"] == kernels
        run = lambda q, k, v: context_attention.attend(q, k, v, segments_bt, plan, scale=SCALE)  # noqa: E731
        y_bthk, pull = jax.vjp(run, q, k, v)
        return y_bthk, *pull(cotangent)

    tokens = plan.spec("batch", "context")
    return jax.jit(plan.run(device, inputs=(tokens,) * 5, outputs=(tokens,) * 4)), plan.size("context")


def found(packing: str, **choices):
    """What is expected, by context ranks."""
    given = operands(packing)
    run, ranks = on_ranks(context_fused.KERNELS["cudnn"], tuple(choices.items()))
    order = zigzag(given.segments_bt.shape[1], ranks)
    results = run(*(a[:, order] for a in (*given.qkv, given.cotangent, given.segments_bt)))
    return [np.asarray(a)[:, np.argsort(order)] for a in results]


def check(packing: str, **choices) -> None:
    for a, b in zip(found(packing, **choices), expected(packing), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.usefixtures("slow_kernel")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_equals_one_device(packing, plan):
    check(packing, **PLANS[plan])


@pytest.mark.usefixtures("slow_kernel")
def test_three_ranks():
    """Parts of 12 tokens on three ranks, with both rows on ranks of their own."""
    check("padding", context=3, data=2)


def test_whole_rows_of_one_document_need_no_lengths(monkeypatch):
    def spoilt(function):
        def run(*inputs, **options):
            results = function(*inputs, **options)
            return results if inputs[-1] is None else jax.tree.map(lambda a: a * jnp.nan, results)

        return run

    monkeypatch.setitem(context_fused.KERNELS, "cudnn", (spoilt(attend_slowly), spoilt(pull_slowly)))
    check("one document each", context=2)
    assert np.isnan(found("two crossing, and one", context=2)[0]).any()


def abstract(time: int, size: int):
    shapes = [(1, time, n, size) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    return *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes), jax.ShapeDtypeStruct((1, time), jnp.int32)


@pytest.mark.usefixtures("slow_kernel")
def test_no_keys_wait_for_attention():
    """So that they can be on their way while a rank attends: of what two ranks send, only the gradients, in float32,
    come out of attention."""
    run, _ = on_ranks(context_fused.KERNELS["cudnn"], (("context", 2), ("context_attention", "ring")))
    jaxpr = jax.make_jaxpr(run)(*abstract(72, SIZE)).jaxpr
    while not any(e.primitive.name == "ppermute" for e in jaxpr.eqns):
        (jaxpr,) = (getattr(e.params["jaxpr"], "jaxpr", e.params["jaxpr"]) for e in jaxpr.eqns if "jaxpr" in e.params)
    late, waits = set(), []
    for equation in jaxpr.eqns:
        follows = any(v in late for v in equation.invars if not hasattr(v, "val"))
        if equation.primitive.name == "ppermute":
            waits.append((follows, str(equation.outvars[0].aval.dtype)))
        if follows or equation.primitive.name == "cond":
            late.update(equation.outvars)
    sent = ["bfloat16", "bfloat16", "int32"]
    assert [dtype for follows, dtype in waits if not follows] == 2 * sent
    assert [dtype for follows, dtype in waits if follows] == 4 * ["float32"]


@pytest.mark.parametrize(("method", "ranks"), [("ring", 4), ("allgather", 2)])
def test_cudnn_lowers_for_a_gpu(method, ranks, monkeypatch):
    """Four calls each way, of which two run: own tokens and pairs, with and without lengths. A ring of more than two
    ranks has its last turn outside its loop."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *_: 91400)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda *_: False)
    run, _ = on_ranks(context_fused.KERNELS["cudnn"], (("context", ranks), ("context_attention", method)))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    text = run.trace(*abstract(256, 16)).lower(lowering_platforms=("cuda",)).as_text()
    calls = 6 if (method, ranks) == ("ring", 4) else 4
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == calls
    masks = re.findall(r"mask_type[^A-Z]+([A-Z_]+)", text)
    assert set(masks) == {"CAUSAL", "PADDING_CAUSAL", "NO_MASK", "PADDING"}


@pytest.mark.parametrize("method", METHODS)
def test_what_the_kernel_lacks_is_refused(method, monkeypatch):
    plan = make_plan(PlanConfig(context=2, context_attention=method), hybrid())
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, attention="cudnn"))
    given = operands("padding")

    def refusal(**options) -> str:
        device = lambda q, k, v, s: context_attention.attend(q, k, v, s, plan, scale=SCALE, **options)  # noqa: E731
        tokens = plan.spec("batch", "context")
        with pytest.raises(ValueError, match="implementation='cudnn'") as caught:
            jax.eval_shape(plan.run(device, inputs=(tokens,) * 4, outputs=tokens), *given.qkv, given.segments_bt)
        return str(caught.value)

    assert refusal(window=3) == "implementation='cudnn' with window=3 or sinks: expected neither"
    assert refusal(sinks_h=jnp.zeros(HEADS)) == "implementation='cudnn' with window=None or sinks: expected neither"
    assert refusal().startswith("implementation='cudnn' needs a GPU and finds 'cpu'")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert refusal().endswith("with q of float32: expected all bfloat16 or all float16")
