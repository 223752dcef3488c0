"""The divergence from a teacher: every implementation against the formulas in float64, and over ranks.

Axes: n tokens, d student's model, e teacher's model, v vocabulary, k most likely tokens.
"""

import functools

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tests.helpers import several_devices
from tests.kernels.rounding import assert_close

from orogen.kernels.cross_entropy.operands import Reduce
from orogen.kernels.divergence import IMPLEMENTATIONS, Hidden, Likely, Mix, distilled, most_likely

TOKENS, WIDTH, TEACHER, VOCABULARY, KEPT = 21, 5, 7, 12, 4
MIXES = {
    "divergence": ("hidden", Mix()),
    "with cross-entropy, tempered": ("hidden", Mix(divergence=0.75, cross_entropy=0.5, temperature=2.5)),
    "most likely": ("likely", Mix(divergence=0.5, cross_entropy=0.25, temperature=1.5)),
    "most likely and the rest": ("likely", Mix(cross_entropy=0.25, rest="bucket")),
}
LENGTH = TOKENS * VOCABULARY * TEACHER


def softmax(logits_nv):
    exp_nv = np.exp(logits_nv - logits_nv.max(1, keepdims=True))
    return exp_nv / exp_nv.sum(1, keepdims=True)


def operands(dtype=jnp.float32):
    """x, head, targets, weights, and a teacher's x and head; some weights are zero, one is negative."""
    keys = jax.random.split(jax.random.key(2), 6)
    x_nd, head_dv, x_ne, head_ev = (
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, ((TOKENS, WIDTH), (WIDTH, VOCABULARY), (TOKENS, TEACHER), (TEACHER, VOCABULARY)),
                              strict=False)
    )  # fmt: skip
    targets_n = jax.random.randint(keys[4], (TOKENS,), 0, VOCABULARY).at[jnp.array([0, 7])].set(-1)
    weights_n = jax.random.uniform(keys[5], (TOKENS,), minval=0.5, maxval=2.0)
    weights_n = weights_n.at[jnp.array([0, 7])].set(0.0).at[3].multiply(-1)
    return x_nd, head_dv, targets_n, weights_n, x_ne, head_ev


def teacher_of(kind, x_ne, head_ev):
    """The teacher itself, or its most likely tokens in a shuffled order, by numpy."""
    if kind == "hidden":
        return Hidden(x_ne, head_ev)
    log_nv = np.log(softmax(np.asarray(x_ne, np.float64) @ np.asarray(head_ev, np.float64)))
    ids_nk = np.argsort(-log_nv, axis=1)[:, [2, 0, 3, 1]]
    return Likely(jnp.asarray(ids_nk, jnp.int32), jnp.asarray(np.take_along_axis(log_nv, ids_nk, 1), jnp.float32))


def expected(x_nd, head_dv, targets_n, weights_n, x_ne, head_ev, *, kind, mix):
    """Sums, and the gradients of the total, float64. The gradient by each logit is a central difference of the formula,
    which has no other code in common with a derivation by hand."""
    x_nd, head_dv, weights_n, x_ne, head_ev = (
        np.asarray(a, np.float64) for a in (x_nd, head_dv, weights_n, x_ne, head_ev)
    )
    known_nv, t = x_ne @ head_ev, mix.temperature
    top_nk = np.argsort(-known_nv, axis=1)[:, :KEPT]

    def sums(logits_nv):
        if kind == "hidden":
            p, q = softmax(known_nv / t), softmax(logits_nv / t)
        elif mix.rest == "renormalize":
            p, q = (softmax(np.take_along_axis(z, top_nk, 1) / t) for z in (known_nv, logits_nv))
        else:
            p, q = (np.take_along_axis(softmax(z), top_nk, 1) for z in (known_nv, logits_nv))
            p, q = (np.concatenate([z, 1 - z.sum(1, keepdims=True)], 1) for z in (p, q))
        divergence_n = (p * np.log(p / q)).sum(1)
        nats_n = -np.log(np.take_along_axis(softmax(logits_nv), np.maximum(np.asarray(targets_n), 0)[:, None], 1))[:, 0]
        return divergence_n, nats_n

    def total_n(logits_nv):
        divergence_n, nats_n = sums(logits_nv)
        return weights_n * (mix.divergence * divergence_n + mix.cross_entropy * nats_n)

    logits_nv, grad_nv, h = x_nd @ head_dv, np.zeros((TOKENS, VOCABULARY)), 1e-5
    for v in range(VOCABULARY):
        step_v = h * (np.arange(VOCABULARY) == v)
        grad_nv[:, v] = (total_n(logits_nv + step_v) - total_n(logits_nv - step_v)) / (2 * h)
    divergence_n, nats_n = sums(logits_nv)
    return (
        total_n(logits_nv).sum(), (weights_n * divergence_n).sum(), (weights_n * nats_n).sum(),
        grad_nv @ head_dv.T, x_nd.T @ grad_nv,
    )  # fmt: skip


def found(x_nd, head_dv, targets_n, weights_n, teacher, **settings):
    """Sums, and the gradients of the total."""

    def loss(x_nd, head_dv):
        sums = distilled(x_nd, head_dv, teacher, targets_n, weights_n, **settings)
        return sums.total + 3 * sums.divergence, sums  # what is only measured has no gradient

    (_, sums), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_nd, head_dv)
    return *sums, *grads


@functools.cache
def reference(name):
    kind, mix = MIXES[name]
    return expected(*operands(), kind=kind, mix=mix)


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))
def test_equals_the_formula(implementation, name):
    *inputs, x_ne, head_ev = operands()
    kind, mix = MIXES[name]
    settings = {"mix": mix, "chunk": 8, "implementation": implementation}
    program = jax.jit(functools.partial(found, **settings))
    actual = program(*inputs, teacher_of(kind, x_ne, head_ev))
    for got, wanted in zip(actual, reference(name), strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, wanted, terms=LENGTH)
    assert np.asarray(actual[3] != 0).any(1).tolist() == (np.asarray(inputs[3]) != 0).tolist()
    alone = jax.jit(functools.partial(distilled, **settings))
    x_nd, head_dv, targets_n, weights_n = inputs
    sums = alone(x_nd, head_dv, teacher_of(kind, x_ne, head_ev), targets_n, weights_n)
    for got, wanted in zip(sums, reference(name), strict=False):
        assert_close(got, wanted, terms=LENGTH)


@several_devices
@pytest.mark.parametrize("name", MIXES)
def test_a_vocabulary_over_ranks_and_its_padding(name):
    """Four ranks with four columns each, the last with nothing but padding; tokens over two more."""
    x_nd, head_dv, targets_n, weights_n, x_ne, head_ev = operands()
    kind, mix = MIXES[name]
    teacher, ranks = teacher_of(kind, x_ne, head_ev), 4
    padded = lambda w: jnp.pad(w, ((0, 0), (0, 4)))  # noqa: E731
    x_nd, targets_n, weights_n = (jnp.pad(a, [(0, 1), *[(0, 0)] * (a.ndim - 1)]) for a in (x_nd, targets_n, weights_n))
    of_token = lambda a: jnp.pad(a, ((0, 1), (0, 0)))  # noqa: E731
    teacher = Hidden(of_token(x_ne), padded(head_ev)) if kind == "hidden" else Likely(*map(of_token, teacher))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, ranks), ("n", "v"))

    def on_rank(x_nd, head_dv, targets_n, weights_n, teacher):
        x_nd = lax.pcast(x_nd, ("v",), to="varying")
        *sums, grad_x, grad_head = found(
            x_nd, head_dv, targets_n, weights_n, teacher, mix=mix, chunk=4, implementation="chunked",
            vocab_start=lax.axis_index("v") * head_dv.shape[1], vocab_size=VOCABULARY,
            reduce_max=lambda x: lax.pmax(x, "v"), reduce_sum=lambda x: lax.psum(x, "v"),
        )  # fmt: skip
        return *(lax.psum(s, "n") for s in sums), lax.psum(grad_x, "v"), grad_head

    of_teacher = Hidden(P("n"), P(None, "v")) if kind == "hidden" else P("n")
    run = jax.jit(
        jax.shard_map(
            on_rank,
            mesh=mesh,
            in_specs=(P("n"), P(None, "v"), P("n"), P("n"), of_teacher),
            out_specs=(P(), P(), P(), P("n"), P(None, "v")),
            check_vma=True,
        )  # fmt: skip
    )
    actual = run(x_nd, padded(head_dv), targets_n, weights_n, teacher)
    *sums, grad_x, grad_head = reference(name)
    for got, wanted in zip(actual[:3], sums, strict=True):
        assert_close(got, wanted, terms=LENGTH)
    assert_close(actual[3][:TOKENS], grad_x, terms=LENGTH)
    assert not np.any(actual[3][TOKENS:]) and not np.any(actual[4][:, VOCABULARY:])
    assert_close(actual[4][:, :VOCABULARY], grad_head, terms=LENGTH)


@several_devices
def test_the_most_likely_of_all_ranks():
    """Against numpy; of equal tokens the lower id comes first."""
    x_ne, head_ev = operands()[4:]
    head_ev = head_ev.at[:, 9].set(head_ev[:, 2])  # on other ranks
    mesh = Mesh(np.array(jax.devices()[:4]), ("v",))

    def on_rank(x_ne, head_ev):
        ids, log = most_likely(
            x_ne, head_ev, KEPT, chunk=8, vocab_start=lax.axis_index("v") * head_ev.shape[1], vocab_size=VOCABULARY,
            reduce=Reduce(lambda x: lax.pmax(x, "v"), lambda x: lax.psum(x, "v")),
            gather=lambda x: lax.all_gather(x, "v", axis=1, tiled=True),
        )  # fmt: skip
        return lax.pmax(ids, "v"), lax.pmax(log, "v")

    padded_ev = jnp.pad(head_ev, ((0, 0), (0, 4)), constant_values=9.0)
    run = jax.shard_map(on_rank, mesh=mesh, in_specs=(P(), P(None, "v")), out_specs=P(), check_vma=True)
    ids_nk, log_nk = jax.jit(run)(x_ne, padded_ev)
    log_nv = np.log(softmax(np.asarray(x_ne, np.float64) @ np.asarray(head_ev, np.float64)))
    wanted_nk = np.argsort(-log_nv, axis=1, kind="stable")[:, :KEPT]
    np.testing.assert_array_equal(ids_nk, wanted_nk)
    assert_close(log_nk, np.take_along_axis(log_nv, wanted_nk, 1), terms=TEACHER * VOCABULARY)
    with pytest.raises(ValueError, match="13 most likely of 12 tokens"):
        most_likely(x_ne, head_ev, 13, chunk=8, reduce=Reduce(lambda x: x, lambda x: x))
    with pytest.raises(ValueError, match="11 most likely of 10 tokens"):
        most_likely(x_ne, head_ev, 11, chunk=8, vocab_size=10, reduce=Reduce(lambda x: x, lambda x: x))


def test_log_probabilities_that_were_rounded_up_leave_no_rest():
    """They add up to 1.0004: the others have the mass 0, and take no part in the sum."""
    x_nd, head_dv, targets_n, weights_n, x_ne, head_ev = operands()
    top = teacher_of("likely", x_ne, head_ev)
    log_nk = jax.nn.log_softmax(top.log_nk) + 4e-4
    found_at = functools.partial(found, mix=Mix(rest="bucket"), chunk=8, implementation="chunked")
    _, divergence, _, *grads = found_at(x_nd, head_dv, targets_n, weights_n, Likely(top.ids_nk, log_nk))
    q_nk = np.take_along_axis(softmax(np.asarray(x_nd, np.float64) @ np.asarray(head_dv, np.float64)), top.ids_nk, 1)
    p_nk = np.exp(np.asarray(log_nk, np.float64))
    wanted = (np.asarray(weights_n, np.float64)[:, None] * p_nk * np.log(p_nk / q_nk)).sum()
    assert float(divergence) == pytest.approx(wanted, rel=1e-4)
    assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix": Mix(rest="drop")}, "rest='drop': expected renormalize or bucket"),
        ({"mix": Mix(rest="bucket", temperature=2.0)}, "temperature=2.0: expected 1"),
        ({"chunk": 0}, "chunk=0: expected at least 1"),
        ({"implementation": "fast"}, "implementation='fast'"),
    ],
)
def test_refusals(change, message):
    x_nd, head_dv, targets_n, weights_n, x_ne, head_ev = operands()
    settings = {"mix": Mix(), "chunk": 8, "implementation": "full", **change}
    with pytest.raises(ValueError, match=message):
        distilled(x_nd, head_dv, teacher_of("likely", x_ne, head_ev), targets_n, weights_n, **settings)
    with pytest.raises(ValueError, match=r"teacher's head has shape \(7, 11\)"):
        distilled(
            x_nd, head_dv, Hidden(x_ne, head_ev[:, 1:]), targets_n, weights_n, mix=Mix(), chunk=8,
            implementation="full",
        )  # fmt: skip
