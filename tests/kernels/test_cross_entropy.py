"""Cross-entropy: every implementation against the formula in float64, and with the vocabulary over ranks.

Axes: n tokens, d model, v vocabulary.
"""

from functools import partial

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tests.helpers import several_devices
from tests.kernels.rounding import assert_close

from orogen.kernels.cross_entropy import IMPLEMENTATIONS, cross_entropy, log_likelihoods

TOKENS, WIDTH, VOCABULARY = 22, 5, 12


def by_token(x_nd, head_dv, targets_n, weights_n, **settings):
    """The loss that `cross_entropy` computes, from the likelihood of each token."""
    weights_n = lax.stop_gradient(weights_n)
    found_n = log_likelihoods(x_nd, head_dv, targets_n, **settings)
    assert found_n.shape == targets_n.shape and found_n.dtype == jnp.float32
    return -jnp.where(weights_n == 0, 0, weights_n * found_n).sum()


# As in `settings` of the functions below: the loss in one piece and by token, by each implementation.
PROGRAMS = {
    f"{name}{suffix}": partial(function, implementation=name)
    for name in sorted(IMPLEMENTATIONS)
    for suffix, function in {"": cross_entropy, ", by token": by_token}.items()
}


def operands(dtype=jnp.float32, tokens=TOKENS):
    """x, head, targets and weights; some weights are zero, and their targets do not exist."""
    keys = jax.random.split(jax.random.key(1), 4)
    x_nd = jax.random.normal(keys[0], (tokens, WIDTH), dtype)
    head_dv = jax.random.normal(keys[1], (WIDTH, VOCABULARY), dtype)
    targets_n = jax.random.randint(keys[2], (tokens,), 0, VOCABULARY)
    weights_n = jax.random.uniform(keys[3], (tokens,), minval=0.5, maxval=2.0)
    unused = jnp.array([0, 7, tokens - 1])
    targets_n = targets_n.at[unused].set(jnp.array([-1, VOCABULARY, -100])).at[1].set(VOCABULARY - 1).at[2].set(0)
    return x_nd, head_dv, targets_n, weights_n.at[unused].set(0.0)


def expected(x_nd, head_dv, targets_n, weights_n):
    """Loss and gradients of x and head, float64."""
    x_nd, head_dv, weights_n = (np.asarray(a, np.float64) for a in (x_nd, head_dv, weights_n))
    logits_nv = x_nd @ head_dv
    shifted_nv = logits_nv - logits_nv.max(1, keepdims=True)
    logs_nv = shifted_nv - np.log(np.exp(shifted_nv).sum(1, keepdims=True))
    loss, grad_nv = 0.0, np.zeros(logits_nv.shape)
    for n, (target, weight) in enumerate(zip(np.asarray(targets_n), weights_n, strict=True)):
        if weight:
            loss -= weight * logs_nv[n, target]
            grad_nv[n] = weight * (np.exp(logs_nv[n]) - (np.arange(VOCABULARY) == target))
    return loss, grad_nv @ head_dv.T, x_nd.T @ grad_nv


def loss_alone(*inputs, program, **settings):
    """Loss of a call that is not differentiated."""
    return jax.jit(partial(PROGRAMS[program], **settings))(*inputs)


def loss_and_gradients(*inputs, program, **settings):
    """Loss and the gradients of x and head."""
    loss, gradients = jax.jit(jax.value_and_grad(partial(PROGRAMS[program], **settings), argnums=(0, 1)))(*inputs)
    return loss, *gradients


LENGTHS = (TOKENS * WIDTH, VOCABULARY, TOKENS)  # terms of the loss, of the gradient of x, of the gradient of the head


@pytest.mark.parametrize("program", PROGRAMS)
class TestCrossEntropy:
    """What every implementation does."""

    @pytest.mark.parametrize("chunk", [1, 8, 100])
    def test_equals_the_formula(self, program, chunk):
        inputs = operands()
        actual = loss_and_gradients(*inputs, chunk=chunk, program=program)
        assert actual[0].dtype == jnp.float32
        for a, wanted, length in zip(actual, expected(*inputs), LENGTHS, strict=True):
            assert_close(a, wanted, terms=length)

    def test_undifferentiated_loss_is_the_same(self, program):
        settings = {"chunk": 8, "program": program}
        assert_close(loss_alone(*operands(), **settings), expected(*operands())[0], terms=LENGTHS[0])

    def test_cotangent_scales_both_gradients(self, program):
        settings = {"chunk": 8, "program": program}
        _, *gradients = loss_and_gradients(*operands(), **settings)
        scaled = jax.jit(jax.grad(lambda *a: 0.125 * PROGRAMS[program](*a, chunk=8), argnums=(0, 1)))(*operands())
        for got, gradient in zip(scaled, gradients, strict=True):
            if jax.default_backend() == "gpu":  # which fuses one operation more, and rounds, in another way
                assert_close(got, gradient * 0.125, terms=1)
            else:
                np.testing.assert_array_equal(got, gradient * 0.125)

    def test_bfloat16_is_accumulated_in_float32(self, program):
        inputs = operands(jnp.bfloat16, tokens=600)
        loss, *gradients = loss_and_gradients(*inputs, chunk=64, program=program)
        wanted, *wanted_gradients = expected(*inputs)
        assert loss.dtype == jnp.float32 and {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}
        assert_close(loss, wanted, terms=600 * WIDTH)
        for gradient, wanted in zip(gradients, wanted_gradients, strict=True):
            assert_close(gradient, wanted, terms=1)  # rounded before the product and after it, never within the sum

    def test_weight_zero_is_exactly_zero_gradient(self, program):
        x_nd, head_dv, targets_n, weights_n = operands()
        _, grad_x_nd, _ = loss_and_gradients(x_nd, head_dv, targets_n, weights_n, chunk=8, program=program)
        assert (grad_x_nd != 0).any(1).tolist() == (weights_n != 0).tolist()

    def test_all_weights_zero(self, program):
        x_nd, head_dv, targets_n, weights_n = operands()
        actual = loss_and_gradients(x_nd, head_dv, targets_n, jnp.zeros_like(weights_n), chunk=8, program=program)
        assert not any(a.any() for a in actual)

    def test_large_logits_do_not_overflow(self, program):
        x_nd, head_dv, targets_n, weights_n = operands()
        inputs = (x_nd * 1e4, head_dv, targets_n, weights_n)
        loss, *gradients = loss_and_gradients(*inputs, chunk=8, program=program)
        assert_close(loss, expected(*inputs)[0], terms=TOKENS * WIDTH)
        assert all(jnp.isfinite(g).all() for g in gradients)

    def test_a_negative_weight_negates_what_its_token_adds(self, program):
        x_nd, head_dv, targets_n, weights_n = operands()
        settings = {"chunk": 8, "program": program}
        found = loss_and_gradients(x_nd, head_dv, targets_n, -weights_n, **settings)
        for a, b in zip(found, loss_and_gradients(*operands(), **settings), strict=True):
            np.testing.assert_array_equal(a, -b)

    def test_weights_get_no_gradient(self, program):
        grad_n = jax.grad(partial(PROGRAMS[program], chunk=8), argnums=3)(*operands())
        assert not grad_n.any()

    @several_devices
    @pytest.mark.parametrize(("data", "ranks"), [(1, 2), (1, 4), (2, 1), (2, 2)])
    def test_vocabulary_over_ranks_and_tokens_over_data(self, program, data, ranks):
        def run(x_nd, head_dv, targets_n, weights_n):
            def loss(x_nd, head_dv):
                return PROGRAMS[program](
                    x_nd,
                    head_dv,
                    targets_n,
                    weights_n,
                    chunk=4,
                    vocab_start=lax.axis_index("vocab") * head_dv.shape[1],
                    reduce_max=lambda a: lax.pmax(a, "vocab"),
                    reduce_sum=lambda a: lax.psum(a, "vocab"),
                )

            part, gradients = jax.value_and_grad(loss, argnums=(0, 1))(x_nd, head_dv)
            return lax.psum(part, "data"), *gradients

        by_token, by_column = P("data"), P(None, "vocab")
        sharded = jax.shard_map(
            run,
            mesh=Mesh(np.array(jax.devices()[: data * ranks]).reshape(data, ranks), ("data", "vocab")),
            in_specs=(by_token, by_column, by_token, by_token),
            out_specs=(P(), by_token, by_column),
            check_vma=True,
        )
        actual = jax.jit(sharded)(*operands())
        for a, wanted, length in zip(actual, expected(*operands()), LENGTHS, strict=True):
            assert_close(a, wanted, terms=length)

    @several_devices
    @pytest.mark.parametrize(("ranks", "beyond"), [(1, 1), (2, 4), (4, 4), (4, 8)])
    def test_columns_beyond_the_vocabulary_take_no_part(self, program, ranks, beyond):
        """Of four ranks the last, or the last two, have no column of the vocabulary."""
        x_nd, head_dv, *others = operands()
        wide_dv = jnp.pad(head_dv, ((0, 0), (0, beyond)), constant_values=100.0)

        def run(x_nd, wide_dv, targets_n, weights_n):
            settings = {"chunk": 8, "vocab_size": VOCABULARY}
            over_ranks = {
                "vocab_start": lax.axis_index("vocab") * wide_dv.shape[1],
                "reduce_max": lambda a: lax.pmax(a, "vocab"),
                "reduce_sum": lambda a: lax.psum(a, "vocab"),
            }
            loss = partial(PROGRAMS[program], **settings, **over_ranks)
            loss, gradients = jax.value_and_grad(loss, argnums=(0, 1))(x_nd, wide_dv, targets_n, weights_n)
            return loss, *gradients

        mesh = Mesh(np.array(jax.devices()[:ranks]), ("vocab",))
        specs = {"in_specs": (P(), P(None, "vocab"), P(), P()), "out_specs": (P(), P(), P(None, "vocab"))}
        loss, grad_x_nd, grad_wide_dv = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(x_nd, wide_dv, *others)
        actual = loss, grad_x_nd, grad_wide_dv[:, :VOCABULARY]
        for a, wanted, length in zip(actual, expected(x_nd, head_dv, *others), LENGTHS, strict=True):
            assert_close(a, wanted, terms=length)
        assert not grad_wide_dv[:, VOCABULARY:].any()


@pytest.mark.parametrize("program", ["chunked", "chunked, by token"])
def test_chunked_never_holds_all_logits(program):
    inputs = [jnp.zeros(shape, dtype) for shape, dtype in (((512, 8), "float32"), ((8, 4096), "float32"))]
    inputs += [jnp.zeros(512, "int32"), jnp.ones(512)]
    step = jax.jit(partial(loss_and_gradients, chunk=32, program=program))
    assert step.lower(*inputs).compile().memory_analysis().temp_size_in_bytes < 512 * 4096 * 4 / 2


@pytest.mark.parametrize(("program", "products"), [("chunked", 3), ("chunked, by token", 4)])
def test_products_of_a_chunk(program, products):
    # A scan's body is written once, so products in the jaxpr count those of a chunk: logits, and two gradients; by
    # token, the logits again.
    step = partial(loss_and_gradients, chunk=8, program=program)
    assert str(jax.make_jaxpr(step)(*operands())).count("dot_general[") == products


def test_refusals():
    x_nd, head_dv, targets_n, weights_n = operands()
    with pytest.raises(ValueError, match="implementation='fast': expected one of"):
        cross_entropy(x_nd, head_dv, targets_n, weights_n, chunk=8, implementation="fast")
    with pytest.raises(ValueError, match="chunk=0: expected at least 1"):
        cross_entropy(x_nd, head_dv, targets_n, weights_n, chunk=0, implementation="full")
    with pytest.raises(ValueError, match=r"expected \(n, d\) and \(d, v\)"):
        cross_entropy(x_nd, head_dv.T, targets_n, weights_n, chunk=8, implementation="full")
    with pytest.raises(ValueError, match=r"weights has shape \(21,\): expected \(22,\)"):
        cross_entropy(x_nd, head_dv, targets_n, weights_n[1:], chunk=8, implementation="full")
