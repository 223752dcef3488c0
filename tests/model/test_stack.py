"""Folding of patterns, and scanned stacks against their layers one after another. Letters: b batch, t time, d model."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.model.small import config, one_device, randomised, relative_error

from orogen.layers.documents import documents
from orogen.model.block import Repeat, Stack, letters, places, repeats
from orogen.moe.layer import MoEStats
from orogen.simulate.jaxprs import product_flops

NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
NEMOTRON_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
PATTERNS = st.text("ME*-", min_size=1, max_size=9)


def distinct(items) -> int:
    """How many layers are compiled."""
    return sum(1 if isinstance(item, str) else distinct(item.items) for item in items)


@functools.cache
def fewest(pattern: str) -> int:
    """The fewest distinct layers, over every split in two and every repeated unit."""
    length = len(pattern)
    splits = [fewest(pattern[:i]) + fewest(pattern[i:]) for i in range(1, length)]
    units = [fewest(pattern[:i]) for i in range(1, length) if pattern[:i] * (length // i) == pattern]
    return min(splits + units, default=1)


@given(PATTERNS)
@example("MEMEM*E")
@example("MMEMME*")
@settings(max_examples=200, deadline=None)
def test_folding_keeps_the_pattern_and_has_the_fewest_layers(pattern):
    items = repeats(pattern)
    assert letters(items) == pattern
    assert distinct(items) == fewest(pattern)


def test_long_patterns_fold_without_deep_recursion():
    draw = random.Random(0)
    without_order = "".join(draw.choice("ME*-") for _ in range(640))
    assert letters(repeats(without_order)) == without_order
    assert repeats("M*" * 320) == (Repeat(("M", "*"), 320),)


@given(PATTERNS)
@settings(max_examples=100, deadline=None)
def test_places_follow_the_pattern(pattern):
    items = repeats(pattern)
    found = places(items)
    assert len(set(found)) == len(pattern)
    for place, letter in zip(found, pattern, strict=True):
        inside, turns = items, []
        for child in place.path:
            item = inside[child]
            if isinstance(item, Repeat):
                inside = item.items
                turns.append(item.count)
        assert item == letter
        assert len(turns) == len(place.index) and all(i < count for i, count in zip(place.index, turns, strict=True))


def test_a_repeated_group_folds():
    assert repeats("MEM*MEM*E") == (Repeat(("M", "E", "M", "*"), 2), "E")
    assert repeats("MMMM") == (Repeat(("M",), 4),)
    assert repeats("M*E") == ("M", "*", "E")


def test_places_by_hand():
    # (M E)x2 * (M E)x2 *, then M: the outer repetition turns slower.
    items = (Repeat((Repeat(("M", "E"), 2), "*"), 2), "M")
    assert letters(items) == "MEME*MEME*M"
    inner = [((0, 0, 0), (0, 0)), ((0, 0, 1), (0, 0)), ((0, 0, 0), (0, 1)), ((0, 0, 1), (0, 1)), ((0, 1), (0,))]
    second = [(path, (1, *index[1:])) for path, index in inner]
    assert places(items) == inner + second + [((1,), ())]


@pytest.mark.parametrize(("pattern", "layers"), [(NANO, 10), (SUPER, 13), (NEMOTRON_H_8B, 7)])
def test_published_patterns_fold_to_few_layers(pattern, layers):
    items = repeats(pattern)
    assert letters(items) == pattern
    assert distinct(items) == layers == fewest(pattern)


def random_stack(items, model):
    """Its graph, parameters and buffers."""
    graph, *states = nnx.split(jax.eval_shape(lambda: Stack(items, model, nnx.Rngs(0))), nnx.Param, ...)
    return graph, *(randomised(state, np.random.default_rng(seed)) for seed, state in enumerate(states))


@pytest.mark.parametrize(("unroll", "loops"), [(2, True), (3, False)])
def test_repetitions_up_to_unroll_are_written_out(unroll, loops):
    model = config()
    graph, params, buffers = random_stack((Repeat(("-",), 3),), model)

    def call(params, x_btd):
        return nnx.merge(graph, params, buffers)(
            x_btd, documents(jnp.ones((2, 5), int)), one_device(model, unroll=unroll)
        )

    program = jax.jit(call).lower(params, jnp.zeros((2, 5, 12))).as_text()
    assert ("stablehlo.while" in program) == loops


@pytest.mark.parametrize("unroll", [2, 3])
def test_a_scanned_stack_equals_its_layers_one_after_another(unroll):
    """Nested, with a loop inside what is written out, or none; residual stream, statistics and all gradients."""
    items = (Repeat((Repeat(("-",), 3), "E"), 2), "*")
    model = config()
    plan = one_device(model, unroll=unroll).with_recipes(None)
    graph, params, buffers = random_stack(items, model)
    x_btd, gy_btd = (jax.random.normal(jax.random.key(i), (2, 7, 12)) for i in range(2))
    segments_bt = jnp.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 2]])

    def scanned(params, x_btd):
        stack = nnx.merge(graph, params, jax.tree.map(jnp.asarray, buffers))
        y_btd, stats = stack(x_btd, documents(segments_bt), plan)
        return jnp.sum(y_btd * gy_btd), (y_btd, stats[0][1].load)

    def unrolled(params, x_btd):
        stack = nnx.merge(graph, params, jax.tree.map(jnp.asarray, buffers))
        loads = []
        for place in places(items):
            layer = stack
            for child in place.path:
                layer = layer.children[child]
            layer_graph, layer_state = nnx.split(layer)
            one = jax.tree.map(lambda a, index=place.index: a[index], layer_state)
            x_btd, stats = nnx.merge(layer_graph, one)(x_btd, documents(segments_bt), plan, None)
            loads += [stats.load] if isinstance(stats, MoEStats) else []
        return jnp.sum(x_btd * gy_btd), (x_btd, jnp.stack(loads))

    run = lambda function: jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(params, x_btd)  # noqa: E731
    ((_, (y_btd, load_le)), grads), ((_, (expected_btd, expected_le)), expected_grads) = run(scanned), run(unrolled)
    np.testing.assert_allclose(y_btd, expected_btd, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(load_le, expected_le)
    assert relative_error(grads, expected_grads) < 1e-5


def test_a_rematerialised_stack_multiplies_more_for_the_same_gradients():
    model = config()
    graph, params, buffers = random_stack(repeats("---*"), model)
    x_btd = jax.random.normal(jax.random.key(0), (2, 5, 12))

    def grads(remat):
        plan = one_device(model, remat=remat)

        def total(params):
            stack = nnx.merge(graph, params, jax.tree.map(jnp.asarray, buffers))
            return jnp.sum(stack(x_btd, documents(jnp.ones((2, 5), jnp.int32)), plan)[0] ** 2)

        return jax.jit(jax.grad(total))(params), product_flops(jax.make_jaxpr(jax.grad(total))(params).jaxpr)

    plain, products = grads("none")
    for remat in ("elementwise", "full"):  # scores, and then all products
        remade, more_products = grads(remat)
        assert more_products > products, remat
        assert relative_error(remade, plain) < 1e-5, remat
        products = more_products
