"""FP8 products against plain ones: tolerances from the formats' fractions, and what zeros, huge and lost numbers do."""

import itertools
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.helpers import run_config
from tests.model.small import config, model_parts, one_device, relative_error

from orogen.config.recipe import FP8, PLAIN, RECIPES, Formats
from orogen.layers.documents import Documents
from orogen.layers.linear import linear
from orogen.layers.multiply import multiply
from orogen.layers.parameter import parameter
from orogen.model.lm import build
from orogen.model.stages import Stages
from orogen.parallel.plan import FP8_OPTIONS, make_plan
from orogen.precision import fp8
from orogen.precision.fp8 import E4M3, E5M2, SMALLEST_SCALE, dequantize, rounded, scale_of
from orogen.train.heldout import Heldout
from orogen.train.next_token import NEXT_TOKENS
from orogen.train.optimizer import make_optimizer
from orogen.train.step import make_step

N, D, F = 24, 48, 40
WIDTHS = (24, 11, 5)  # of several weights, F together
# Half a unit in the last place, of 3 and 2 bits of fraction; of normal numbers.
ROUNDING = {E4M3: 2.0**-4, E5M2: 2.0**-3}
SMALLEST_NORMAL = {E4M3: 2.0**-6, E5M2: 2.0**-14}
kinds = pytest.mark.parametrize("kind", [E4M3, E5M2])


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fp8_matmul(x_nd, w_df):
    return fp8.fp8_matmul(x_nd, (w_df,), quantize="plain")[0]


def back_from_8_bits(x, kind):
    result = rounded((x,), kind, implementation="plain")
    np.testing.assert_array_equal(result.columns.astype(jnp.float32), result.rows.astype(jnp.float32).T)
    return dequantize(result.rows, result.scale, jnp.float32), result.scale


def error(result, exact):
    result, exact = np.asarray(result, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(result - exact) / np.linalg.norm(exact)


@kinds
def test_the_scale_is_the_least_power_of_two_that_fits(kind):
    limit = float(jnp.finfo(kind).max)
    for largest, expected in [(limit, 1.0), (limit * 1.001, 2.0), (limit / 2, 0.5), (3 * limit, 4.0), (1e38, None)]:
        scale = float(scale_of([jnp.asarray([0.0, largest / 3]), jnp.asarray([-largest])], kind))
        assert np.frexp(scale)[0] == 0.5 and largest <= scale * limit < 2 * largest * (1 + 1e-6)
        assert expected is None or scale == expected


@kinds
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e30])
def test_numbers_come_back_within_rounding(kind, size):
    x = drawn(N, D) * size
    back, scale = back_from_8_bits(x, kind)
    normal = np.abs(x) >= SMALLEST_NORMAL[kind] * float(scale)
    off = np.abs(np.asarray(back, np.float64) - np.asarray(x, np.float64))
    assert (off <= ROUNDING[kind] * np.abs(x))[normal].all()
    assert (off <= SMALLEST_NORMAL[kind] * ROUNDING[kind] * float(scale))[~normal].all()
    assert normal.mean() > 0.9


@kinds
def test_what_the_format_holds_comes_back_to_the_bit(kind):
    every = np.arange(256, dtype=np.uint8).view(jnp.dtype(kind)).astype(np.float32)
    x = jnp.asarray(every[np.isfinite(every)])[None]
    for power in (1.0, 2.0**-30, 2.0**30):
        result = rounded((x * power,), kind, implementation="plain")
        for dtype in (jnp.float32, jnp.bfloat16):
            back = dequantize(result.rows, result.scale, dtype)
            np.testing.assert_array_equal(back.astype(jnp.float32), x * power)


def test_products_and_gradients_are_those_of_the_rounded_operands():
    x_nd, w_df, grad_nf = drawn(N, D), drawn(D, F, seed=1), drawn(N, F, seed=2)
    y_nf, back = jax.vjp(fp8_matmul, x_nd, w_df)
    dx_nd, dw_df = back(grad_nf)
    operands = ((x_nd, E4M3), (w_df, E4M3), (grad_nf, E5M2))
    x, w, grad = (np.asarray(back_from_8_bits(*operand)[0], np.float64) for operand in operands)
    for result, exact in [(y_nf, x @ w), (dx_nd, grad @ w.T), (dw_df, x.T @ grad)]:
        assert error(result, exact) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_and_gradients_are_near_the_plain_ones(dtype):
    x_nd, w_df, grad_nf = (a.astype(dtype) for a in (drawn(N, D), drawn(D, F, seed=1), drawn(N, F, seed=2)))
    results = [jax.vjp(function, x_nd, w_df) for function in (fp8_matmul, jnp.matmul)]
    (y_nf, back), (exact_nf, plain) = results
    assert y_nf.dtype == dtype
    # Errors of a product's terms are independent: relative to its norm, each operand's rounding adds √(1/3) of half a
    # unit at most, as a uniform error.
    both = (ROUNDING[E4M3] ** 2 + ROUNDING[E4M3] ** 2) ** 0.5 / 3**0.5
    mixed = (ROUNDING[E4M3] ** 2 + ROUNDING[E5M2] ** 2) ** 0.5 / 3**0.5
    assert 0.2 * both < error(y_nf, exact_nf) < both
    for mine, other in zip(back(grad_nf), plain(grad_nf), strict=True):
        assert mine.dtype == dtype
        assert 0.2 * mixed < error(mine, other) < mixed


def test_zeros_give_zeros():
    zero, w_df = jnp.zeros((N, D)), drawn(D, F)
    assert float(scale_of([zero], E4M3)) == SMALLEST_SCALE
    y_nf, back = jax.vjp(fp8_matmul, zero, w_df)
    dx_nd, dw_df = back(jnp.zeros((N, F)))
    assert not any(np.any(np.asarray(a)) for a in (y_nf, dx_nd, dw_df))


@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize("where", ["x", "w", "grad"])
def test_what_is_not_finite_is_not_clipped_away(value, where):
    operands = {"x": drawn(N, D), "w": drawn(D, F, seed=1), "grad": drawn(N, F, seed=2)}
    operands[where] = operands[where].at[3, 5].set(value)
    y_nf, back = jax.vjp(fp8_matmul, operands["x"], operands["w"])
    dx_nd, dw_df = back(operands["grad"])
    reads = {"y": (y_nf, "x w"), "dx": (dx_nd, "grad w"), "dw": (dw_df, "x grad")}
    for name, (result, operand) in reads.items():
        assert bool(jnp.isnan(result).all()) == (where in operand.split()), name
        assert bool(jnp.isfinite(result).all()) == (where not in operand.split()), name


def test_one_huge_number_flushes_the_small_ones_and_nothing_else():
    x_nd = drawn(N, D).at[3, 5].set(1e30)
    y_nf = fp8_matmul(x_nd, drawn(D, F, seed=1))
    rows = np.delete(np.arange(N), 3)
    assert bool(jnp.isfinite(y_nf).all()) and not np.any(np.asarray(y_nf)[rows])


@pytest.mark.parametrize("quantize", ["plain", "triton_interpreted"])
def test_several_weights_are_columns_of_one(quantize):
    """The same numbers, to the bit where one sum is one: a weight's share of dx is part of a longer sum."""
    x_nd, w_df, grad_nf = drawn(N, D), drawn(D, F, seed=1), drawn(N, F, seed=2)
    bounds = np.cumsum(WIDTHS)[:-1]
    several = lambda x_nd, *parts: fp8.fp8_matmul(x_nd, parts, quantize=quantize)  # noqa: E731
    parts_nf, back = jax.vjp(several, x_nd, *jnp.split(w_df * 1.0, bounds, axis=1))
    dx_nd, *dparts_df = back(tuple(jnp.split(grad_nf, bounds, axis=1)))
    y_nf, back = jax.vjp(fp8_matmul, x_nd, w_df)
    expected_dx_nd, expected_dw_df = back(grad_nf)
    assert tuple(part.shape[1] for part in parts_nf) == WIDTHS
    for got, want in [
        (jnp.concatenate(parts_nf, axis=1), y_nf), (dx_nd, expected_dx_nd),
        (jnp.concatenate(dparts_df, axis=1), expected_dw_df),
    ]:  # fmt: skip
        assert error(got, want) < 1e-6


def test_operands_of_two_types_are_refused():
    with pytest.raises(ValueError, match=r"weights of \['float32'\]: expected x's bfloat16"):
        fp8_matmul(drawn(N, D).astype(jnp.bfloat16), drawn(D, F))


def test_the_product_of_layers_takes_leading_axes_as_one():
    x_btd, w_df = drawn(2, 12, D), drawn(D, F, seed=1)
    flat = fp8_matmul(x_btd.reshape(-1, D), w_df).reshape(2, 12, F)
    plan, weight = one_device(config(), linear="fp8"), parameter(w_df, (None, None))
    np.testing.assert_array_equal(linear(x_btd, weight, plan), flat)
    assert error(flat, multiply(x_btd, w_df)) > 1e-3


@pytest.mark.parametrize("roles", list(itertools.product((PLAIN, FP8), repeat=3)), ids="-".join)
def test_each_product_rounds_its_own_operands_and_no_other_does(roles):
    """Against products in float64 of operands that were rounded where their product's role says so."""
    x_nd, grad_nf, dtype = drawn(N, D), drawn(N, F, seed=2), np.float64
    weights_df = jnp.split(drawn(D, F, seed=1), np.cumsum(WIDTHS)[:-1], axis=1)
    formats = Formats(**dict(zip(("forward", "input_gradient", "weight_gradient"), roles, strict=True)))
    run = lambda *operands: fp8.fp8_matmul(*operands, quantize="plain", formats=formats)  # noqa: E731
    parts_nf, back = jax.vjp(run, x_nd, weights_df)
    dx_nd, dparts_df = back(tuple(jnp.split(grad_nf, np.cumsum(WIDTHS)[:-1], axis=1)))
    operands = {"x": (x_nd, E4M3), "w": (jnp.concatenate(weights_df, 1), E4M3), "grad": (grad_nf, E5M2)}
    exact = {name: np.asarray(value, dtype) for name, (value, _) in operands.items()}
    in_8_bits = {name: np.asarray(back_from_8_bits(*pair)[0], dtype) for name, pair in operands.items()}
    (a, b, c) = (in_8_bits if role == FP8 else exact for role in roles)
    found = jnp.concatenate(parts_nf, 1), dx_nd, jnp.concatenate(dparts_df, 1)
    for result, expected in zip(found, (a["x"] @ a["w"], b["grad"] @ b["w"].T, c["x"].T @ c["grad"]), strict=True):
        assert error(result, expected) < 1e-6


def test_only_what_a_product_reads_in_8_bits_is_rounded():
    def rounded_types(**roles):
        run = lambda x, w: fp8.fp8_matmul(x, (w,), quantize="plain", formats=Formats(**roles))[0].sum()  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(drawn(N, D), drawn(D, F)).jaxpr
        return roundings(jaxpr, E4M3), roundings(jaxpr, E5M2)

    each = [rounded_types(**{role: FP8}) for role in ("forward", "input_gradient", "weight_gradient")]
    assert [rounded_types(), *each] == [(0, 0), (2, 0), (1, 1), (1, 1)]


def forward(pattern, recipes=None, **changes):
    """The traced forward pass in FP8 of a model of this pattern, or by `recipes`."""
    model = config(pattern=pattern, mtp_depths=0) if "/" not in pattern else config(pattern=pattern)
    graph, params, buffers = model_parts(model)
    plan = one_device(model, linear="fp8", **changes)
    plan = plan if recipes is None else plan.with_recipes(recipes)

    def run(params, buffers, tokens_bt):
        model, docs = nnx.merge(graph, params, buffers), Documents(tokens_bt, tokens_bt)
        h_btd, _ = model.hidden(tokens_bt, docs, plan)
        return h_btd, model.deeper(h_btd, tokens_bt, docs, plan)

    return jax.make_jaxpr(run)(params, buffers, jnp.zeros((2, 8), jnp.int32)).jaxpr


def fp8_layers(pattern, recipes=None):
    """How many matrices the model rounds to E4M3 in the forward pass, from the traced program."""
    return roundings(forward(pattern, recipes))


def roundings(jaxpr, kind=E4M3):
    """Conversions to 8 bits, each as often as a scan repeats it."""
    total = 0
    for eqn in jaxpr.eqns:
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += eqn.params.get("new_dtype") == kind
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += turns * roundings(inner, kind) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(
    ("pattern", "products"),
    [("-", 0), ("--", 0), ("---", 2), ("-----", 3 * 2), ("-*-E-*-E-", 2 * 2 + 3 * 2 + 2 * 4), ("-M-", 2)],
)
def test_first_and_last_layer_have_none(pattern, products):
    # One input and its weights, all of one product: an MLP has two, attention and Mamba-2 one for what reads the
    # layer's input and one for its output, an MoE two of its shared expert and two about its latent experts.
    assert fp8_layers(pattern) == 2 * products


R8, RP = RECIPES[FP8], RECIPES[PLAIN]


@pytest.mark.parametrize(
    ("pattern", "recipes", "products"),
    [
        # An MLP has two products, attention and Mamba-2 one for what reads the layer's input and one for its output.
        ("----", (R8, RP, RP, R8), 4),
        ("-*-*-*-*", (RP, R8) * 4, 8),
        ("M*M*/-", (R8, RP, RP, RP, R8), 2 + 2 * (1 + 2)),  # the block's projection, too, at both depths
    ],
)
def test_every_layer_follows_a_recipe_of_its_own(pattern, recipes, products):
    assert fp8_layers(pattern, recipes) == 2 * products


def test_turns_of_a_loop_have_equal_recipes():
    """Unequal ones are written out, here of the outer repetition alone."""

    def scans(recipes):
        return str(forward("M*" * 3, recipes, unroll=1)).count(" scan[") - mixers

    mixers = str(forward("M*", (RP, RP), unroll=1)).count(" scan[")  # Mamba's own
    assert scans((RP, R8) * 3) == 1
    assert scans((RP, RP, RP, R8, RP, RP)) == 2 * mixers  # three turns


def test_a_layer_without_a_recipe_is_refused():
    with pytest.raises(ValueError, match="4 layers with 3 recipes: expected one for each"):
        forward("----", (RP,) * 3)


def test_segments_of_equal_layers_and_unequal_recipes_differ():
    """Of six segments of one MLP the first embeds, the last has the head, and those between are two kinds."""
    stages = Stages(("-",) * 6, "", 3)
    assert [len(stages.kinds(recipes)) for recipes in (None, (RP,) * 6, (RP, R8, R8, RP, R8, RP))] == [3, 3, 4]
    assert stages.kind_vp((RP, R8, R8, RP, R8, RP)).tolist() == [[0, 1, 1], [2, 1, 3]]
    empty = Stages(("", "-*", "", "-"), "*", 2)
    assert [s.recipes for s in empty.kinds((R8, RP, R8, RP))] == [(), (R8, RP), (), (R8, RP)]


def test_layers_written_out_compute_what_the_loop_does(monkeypatch):
    """With products that round nothing, a model whose ends differ from its middle gives the looped one's numbers.

    Matrices of about 0.3 times unit gain: with gains of one, eight layers enlarge rounding until the forms differ from
    float64 by half of this bound and by more than all of it, at elements of 1 % of their leaf's norm.
    Only this test has rows of 7 tokens: JAX finds a trace again by name and shapes, before and after the exchange.
    """
    exact = lambda x_nd, weights_df, **_: tuple(x_nd @ w_df for w_df in weights_df)  # noqa: E731
    monkeypatch.setattr("orogen.layers.linear.fp8_matmul", exact)
    model = config(pattern="MEMEMEME", mtp_depths=0)
    graph, params, buffers = model_parts(model)
    params = jax.tree.map(lambda w: w * (0.3 if w.ndim > 2 else 1), params)  # those of layers are stacked
    tokens_bt = jnp.asarray(np.random.default_rng(0).integers(model.vocab_size, size=(2, 7)))
    docs = Documents(jnp.ones((2, 7), jnp.int32), jnp.broadcast_to(jnp.arange(7), (2, 7)))

    @partial(jax.jit, static_argnums=1)
    @partial(jax.value_and_grad, has_aux=True)
    def run(params, name):
        x_btd, stats = nnx.merge(graph, params, buffers).hidden(tokens_bt, docs, one_device(model, linear=name))
        return jnp.sum(jnp.sin(x_btd)), jax.tree.map(lambda s: s, stats)

    (loss, stats), grads = run(params, "fp8")
    (expected, expected_stats), expected_grads = run(params, "plain")
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for mine, other in zip(*map(jax.tree.leaves, (stats, expected_stats)), strict=True):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)
    for mine, other in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        assert mine.shape == other.shape
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)
        assert relative_error(mine, other) <= 1e-5  # most leaves' elements are about as small as that bound's 1e-4


@pytest.mark.parametrize(("linear", "expected"), [("fp8", FP8_OPTIONS), ("plain", {})])
def test_steps_and_evaluation_are_compiled_without_products_in_16_bits(linear, expected, monkeypatch):
    run = run_config(plan={"linear": linear})
    plan, built = make_plan(run.plan, run.model), build(run.model)
    optimizer = make_optimizer(run.optimizer, run.train.steps, built.params)
    asked = []
    monkeypatch.setattr(jax, "jit", lambda function, **options: asked.append(options["compiler_options"]))
    make_step(built, NEXT_TOKENS, run, plan, optimizer)
    source = SimpleNamespace(splits={"heldout": [0]})
    corpus = SimpleNamespace(heldout_batches=lambda *_, **__: [], sources={"corpus": source})
    Heldout(run, built, corpus)
    assert asked == [expected, expected]


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: JAX_PLATFORMS=cuda,cpu; see orogen.kernels"
)
@pytest.mark.parametrize("quantize", ["plain", "triton"])
def test_a_gpu_multiplies_in_fp8(quantize):
    """Each product is one call of cuBLASLt with operands of 8 bits: one forward for each weight, two backward."""
    drawings = [((1024, 512), 0), ((512, 256), 1), ((512, 384), 2), ((1024, 256), 3), ((1024, 384), 4)]
    x_nd, *rest = (drawn(*shape, seed=seed).astype(jnp.bfloat16) for shape, seed in drawings)

    def run(x_nd, weights_df, grads_nf):
        y_nf, back = jax.vjp(lambda *a: fp8.fp8_matmul(*a, quantize=quantize), x_nd, weights_df)
        return y_nf, *back(grads_nf)

    operands = (x_nd, tuple(rest[:2]), tuple(rest[2:]))
    text = str(jax.jit(run, compiler_options=FP8_OPTIONS).lower(*operands).compile().as_text())
    assert text.count('custom_call_target="__cublas$lt$matmul$f8"') == 4
    assert '"__cublas$lt$matmul"' not in text and '"__cublas$gemm"' not in text


def test_products_read_their_operands_behind_a_barrier():
    """Without it XLA:GPU finds no product in 8 bits."""
    x_nd, w_df = drawn(N, D).astype(jnp.bfloat16), drawn(D, F, seed=1).astype(jnp.bfloat16)
    text = jax.jit(fp8_matmul).lower(x_nd, w_df).as_text()
    assert text.count("optimization_barrier") == 1
