"""Attention: every implementation against loops in float64, by documents, by slices, and inside shard_map.

Axes: b batch, t queries, s keys, h query heads, g key heads, k head size.
"""

import math
from functools import partial

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from tests.kernels.rounding import assert_close

from orogen.kernels.attention import IMPLEMENTATIONS, attention
from orogen.kernels.attention.blocked import attention_blocked

BATCH, TIME, HEADS, GROUPS, SIZE, VALUE_SIZE = 2, 11, 6, 2, 4, 3
SCALE = 0.7
# Row 0: documents of 3, 1 and 5 tokens and 2 of padding. Row 1: padding between documents, and no more at the end.
SEGMENTS = ((1, 1, 1, 2, 3, 3, 3, 3, 3, 0, 0), (4, 4, 0, 0, 5, 5, 5, 5, 5, 5, 5))

# "cudnn" has a class of its own: it takes half precision only, and a GPU.
NAMES = (*sorted(set(IMPLEMENTATIONS) - {"cudnn"}), "blocks of 4")


def attend(name, q_bthk, k_bsgk, v_bsgk, **settings):
    """The implementation of that name; "blocks of 4" are several a row, where the default is more than TIME."""
    if name != "blocks of 4":
        return attention(q_bthk, k_bsgk, v_bsgk, scale=SCALE, implementation=name, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLEMENTATIONS, "blocked", partial(attention_blocked, block=4))
        return attention(q_bthk, k_bsgk, v_bsgk, scale=SCALE, implementation="blocked", **settings)


def operands(dtype=jnp.float32, *, groups=GROUPS, time=TIME):
    """q, k, v and a cotangent of the output."""
    shapes = ((HEADS, SIZE), (groups, SIZE), (groups, VALUE_SIZE), (HEADS, VALUE_SIZE))
    keys = jax.random.split(jax.random.key(2), 4)
    return [jax.random.normal(key, (BATCH, time, *shape), dtype) for key, shape in zip(keys, shapes, strict=True)]


def expected(q_bthk, k_bsgk, v_bsgk, grad_bthk, segments_bt, *, window=math.inf, sinks_h=None):
    """Output and gradients of q, k and v, and of sinks if there are any, by loops over single queries, float64."""
    q_bthk, k_bsgk, v_bsgk, grad_bthk = (np.asarray(a, np.float64) for a in (q_bthk, k_bsgk, v_bsgk, grad_bthk))
    y_bthk, grad_q, grad_k, grad_v = (np.zeros(a.shape) for a in (grad_bthk, q_bthk, k_bsgk, v_bsgk))
    grad_sinks_h = np.zeros(q_bthk.shape[2])
    for b, t, h in np.ndindex(q_bthk.shape[:3]):
        g = h // (q_bthk.shape[2] // k_bsgk.shape[2])
        seen = [s for s in range(t + 1) if segments_bt[b][s] == segments_bt[b][t] and t - s < window]
        weight = np.exp(SCALE * k_bsgk[b, seen, g] @ q_bthk[b, t, h])
        sink = 0 if sinks_h is None else np.exp(float(sinks_h[h]))
        total = weight.sum() + sink
        weight /= total
        y_bthk[b, t, h] = weight @ v_bsgk[b, seen, g]
        grad_score = SCALE * weight * ((v_bsgk[b, seen, g] - y_bthk[b, t, h]) @ grad_bthk[b, t, h])
        grad_q[b, t, h] = grad_score @ k_bsgk[b, seen, g]
        grad_k[b, seen, g] += np.outer(grad_score, q_bthk[b, t, h])
        grad_v[b, seen, g] += np.outer(weight, grad_bthk[b, t, h])
        grad_sinks_h[h] -= sink / total * (y_bthk[b, t, h] @ grad_bthk[b, t, h])
    return y_bthk, grad_q, grad_k, grad_v, *(() if sinks_h is None else (grad_sinks_h,))


def with_gradients(name, q_bthk, k_bsgk, v_bsgk, grad_bthk, *, window=None, sinks_h=None, **settings):
    """Output and gradients of q, k and v, and of sinks if there are any."""

    # Fully optimised, whatever the tests' default: without fused multiply-adds a gradient that is zero on paper is a
    # rounding error, and a query with one key has no choice to make.
    def run(grad_bthk, settings, *inputs):
        def function(q_bthk, k_bsgk, v_bsgk, sinks_h=None):
            return attend(name, q_bthk, k_bsgk, v_bsgk, window=window, sinks_h=sinks_h, **settings)

        y_bthk, transpose = jax.vjp(function, *inputs)
        return y_bthk, *transpose(grad_bthk)

    inputs = (q_bthk, k_bsgk, v_bsgk, *(() if sinks_h is None else (sinks_h,)))

    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(inputs)):  # inside another program
        return run(grad_bthk, settings, *inputs)
    optimised = jax.jit(run, compiler_options={"xla_backend_optimization_level": 3})
    return optimised(grad_bthk, settings, *inputs)


@pytest.mark.parametrize("name", NAMES)
class TestAttention:
    """What every implementation does."""

    @pytest.mark.parametrize("groups", [1, 2, HEADS])
    def test_equals_loops(self, name, groups):
        inputs = operands(groups=groups)
        actual = with_gradients(name, *inputs, segments_bt=jnp.array(SEGMENTS))
        # Scores are sums of SIZE terms, outputs of TIME, gradients of keys of TIME for each head of a group.
        length = SIZE + TIME * HEADS // groups
        for a, wanted in zip(actual, expected(*inputs, SEGMENTS), strict=True):
            assert_close(a, wanted, terms=length)

    def test_an_id_that_comes_back_is_another_segment(self, name):
        inputs = operands()
        returning = jnp.array([[1, 1, 1, 2, 2, 1, 1, 1, 2, 0, 1], [0, 0, 5, 3, 3, 5, 5, 0, 5, 5, 5]])
        runs = ((1, 1, 1, 2, 2, 3, 3, 3, 4, 5, 6), (1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 6))
        actual = with_gradients(name, *inputs, segments_bt=returning)
        for a, wanted in zip(actual, expected(*inputs, runs), strict=True):
            assert_close(a, wanted, terms=SIZE + TIME * HEADS // GROUPS)

    @pytest.mark.parametrize("window", [1, 3, TIME + 2])
    @pytest.mark.parametrize("sinks", [False, True])
    def test_windows_and_sinks_equal_loops(self, name, window, sinks):
        inputs = operands()
        changes = {"window": window, "sinks_h": jnp.linspace(-2, 3, HEADS) if sinks else None}
        actual = with_gradients(name, *inputs, segments_bt=jnp.array(SEGMENTS), **changes)
        wanted = expected(*inputs, SEGMENTS, **changes)
        assert len(actual) == 4 + sinks
        # Gradients of sinks are sums over queries and values of a row.
        length = SIZE + BATCH * TIME * VALUE_SIZE
        for a, w in zip(actual, wanted, strict=True):
            assert_close(a, w, terms=length)

    def test_a_sink_weighs_as_much_as_a_key_of_its_score(self, name):
        q_bthk, k_bsgk = jnp.ones((1, 1, 2, 1)), jnp.ones((1, 1, 1, 1))
        value = jnp.full((1, 1, 1, 1), 6.0)
        # Scores are 0.7; the sinks are as large, and larger by ln 5: one half and one sixth of the weight is left.
        y_bthk = attend(name, q_bthk, k_bsgk, value, sinks_h=jnp.array([SCALE, SCALE + np.log(5)]))
        np.testing.assert_allclose(y_bthk[0, 0, :, 0], [3, 1], rtol=1e-6)

    def test_a_window_counts_places_and_not_positions_in_the_arrays(self, name):
        q_bthk, k_bsgk, v_bsgk, _ = operands()
        whole = attend(name, q_bthk, k_bsgk, v_bsgk, window=3)
        order_s = jax.random.permutation(jax.random.key(3), TIME)
        q_index_t = jnp.array([9, 2, 6])
        part = attend(
            name,
            q_bthk[:, q_index_t],
            k_bsgk[:, order_s],
            v_bsgk[:, order_s],
            window=3,
            q_index=q_index_t,
            k_index=order_s,
        )
        assert_close(part, np.asarray(whole[:, q_index_t], np.float64), terms=TIME)

    def test_the_edge_of_a_window_is_exact(self, name):
        q_bthk, k_bsgk, v_bsgk, grad_bthk = operands()
        for t in (1, 4, TIME - 1):
            grad = grad_bthk * (jnp.arange(TIME) == t)[:, None, None]
            _, _, *gradients = with_gradients(name, q_bthk, k_bsgk, v_bsgk, grad, window=4)
            reached = [(g != 0).any((0, 2, 3)).tolist() for g in gradients]
            assert reached == [[t - 4 < s <= t for s in range(TIME)]] * 2

    def test_no_segments_is_one_document(self, name):
        q_bthk, k_bsgk, v_bsgk, _ = operands()
        one = attend(name, q_bthk, k_bsgk, v_bsgk, segments_bt=jnp.ones((BATCH, TIME), jnp.int32))
        np.testing.assert_array_equal(attend(name, q_bthk, k_bsgk, v_bsgk), one)

    def test_bfloat16_softmax_is_float32(self, name):
        q_bthk, k_bsgk, v_bsgk, grad_bthk = operands(jnp.bfloat16, time=70)
        # Scores of some 30, which bfloat16 would round by 0.1: weights would be wrong by a tenth.
        inputs = (3 * q_bthk, 3 * k_bsgk, v_bsgk, grad_bthk)
        segments = [[1] * 70] * BATCH
        actual = with_gradients(name, *inputs, segments_bt=jnp.array(segments))
        assert {a.dtype for a in actual} == {jnp.dtype(jnp.bfloat16)}
        for a, wanted in zip(actual, expected(*inputs, segments), strict=True):
            # Roundings of weights and output; those of the weights average out over the keys.
            assert_close(a, wanted, terms=2)

    def test_packed_row_equals_documents_apart(self, name):
        inputs = operands()
        packed = with_gradients(name, *inputs, segments_bt=jnp.array(SEGMENTS))
        for part in (slice(0, 3), slice(3, 4), slice(4, 9)):
            alone = with_gradients(name, *(a[:1, part] for a in inputs))
            for a, wanted in zip(packed, alone, strict=True):
                assert_close(a[:1, part], np.asarray(wanted, np.float64), terms=TIME)

    def test_causality_by_gradient(self, name):
        q_bthk, k_bsgk, v_bsgk, grad_bthk = operands()
        index_t = jnp.arange(TIME)

        def reach(t):  # the keys and values that feed query t
            _, _, *gradients = with_gradients(name, q_bthk, k_bsgk, v_bsgk, grad_bthk * (index_t == t)[:, None, None])
            return [(g != 0).any((0, 2, 3)).tolist() for g in gradients]

        for t in (1, 5, TIME - 1):
            assert reach(t) == [[s <= t for s in range(TIME)]] * 2

    def test_slices_of_queries_and_shuffled_keys(self, name):
        q_bthk, k_bsgk, v_bsgk, _ = operands()
        segments_bt = jnp.array(SEGMENTS)
        whole = attend(name, q_bthk, k_bsgk, v_bsgk, segments_bt=segments_bt)
        q_index_t, k_index_s = jnp.array([9, 2, 3, 6, 0]), jax.random.permutation(jax.random.key(3), TIME)
        part = attend(
            name,
            q_bthk[:, q_index_t],
            k_bsgk[:, k_index_s],
            v_bsgk[:, k_index_s],
            segments_bt=segments_bt[:, q_index_t],
            kv_segments_bs=segments_bt[:, k_index_s],
            q_index=q_index_t,
            k_index=k_index_s,
        )
        assert_close(part, np.asarray(whole[:, q_index_t], np.float64), terms=TIME)

    @pytest.mark.parametrize("window", [None, 3])
    def test_rows_of_different_ages(self, name, window):
        """Queries and keys of a row may stand at other places than those of the next row."""
        q_bthk, k_bsgk, v_bsgk, _ = operands()
        segments_bt = jnp.array(SEGMENTS)
        whole = attend(name, q_bthk, k_bsgk, v_bsgk, segments_bt=segments_bt, window=window)
        q_index_bt = jnp.array([[9, 2, 6], [0, 10, 7]])
        k_index_bs = jnp.stack([jax.random.permutation(jax.random.key(i), TIME) for i in range(BATCH)])
        pick = lambda a, index: jnp.stack([row[indices] for row, indices in zip(a, index, strict=True)])  # noqa: E731
        part = attend(
            name,
            pick(q_bthk, q_index_bt),
            pick(k_bsgk, k_index_bs),
            pick(v_bsgk, k_index_bs),
            segments_bt=pick(segments_bt, q_index_bt),
            kv_segments_bs=pick(segments_bt, k_index_bs),
            q_index=q_index_bt,
            k_index=k_index_bs,
            window=window,
        )
        assert_close(part, np.asarray(pick(whole, q_index_bt), np.float64), terms=TIME)

    @pytest.mark.parametrize("sink", [None, -1e4])
    def test_query_that_sees_no_key_gives_zeros(self, name, sink):
        inputs, sinks_h = operands(), None if sink is None else jnp.full(HEADS, sink)
        index_t = jnp.arange(TIME)
        indices = {"q_index": index_t, "k_index": index_t + 3}
        y_bthk, *gradients = with_gradients(name, *inputs, sinks_h=sinks_h, **indices)
        assert (y_bthk != 0).any((0, 2, 3)).tolist() == [t >= 3 for t in range(TIME)]
        assert (gradients[0] != 0).any((0, 2, 3)).tolist() == [t > 3 for t in range(TIME)]  # one key: no choice
        assert all(jnp.isfinite(g).all() for g in gradients)

    def test_large_scores_do_not_overflow(self, name):
        q_bthk, k_bsgk, v_bsgk, grad_bthk = operands()
        for sign, sinks_h in ((1, None), (-1, jnp.full(HEADS, 1e8)), (1, jnp.full(HEADS, -1e8))):
            inputs = (sign * 1e4 * q_bthk, 1e4 * k_bsgk, v_bsgk, grad_bthk)
            actual = with_gradients(name, *inputs, sinks_h=sinks_h)
            assert all(jnp.isfinite(a).all() for a in actual)

    @pytest.mark.parametrize("window", [None, 4])
    def test_ranks_hold_parts_of_the_queries(self, name, window):
        changes = {"window": window, "sinks_h": jnp.linspace(-2, 3, HEADS)} if window else {}
        q_bthk, k_bsgk, v_bsgk, grad_bthk = (a[:, :10] for a in operands())
        segments_bt = jnp.array(SEGMENTS)[:, :10]

        def run(q_bthk, k_bsgk, v_bsgk, grad_bthk, segments_bt, kv_segments_bs, q_index_t):
            slices = {"segments_bt": segments_bt, "kv_segments_bs": kv_segments_bs, "q_index": q_index_t}
            return with_gradients(name, q_bthk, k_bsgk, v_bsgk, grad_bthk, **slices, **changes)

        split, whole = P(None, "context"), P()
        sharded = jax.shard_map(
            run,
            mesh=Mesh(np.array(jax.devices()[:2]), ("context",)),
            in_specs=(split, whole, whole, split, split, whole, P("context")),
            out_specs=(split, split, whole, whole, whole)[: 5 if changes else 4],
            check_vma=True,
        )
        inputs = (q_bthk, k_bsgk, v_bsgk, grad_bthk)
        actual = jax.jit(sharded)(*inputs, segments_bt, segments_bt, jnp.arange(10))
        for a, wanted in zip(actual, expected(*inputs, segments_bt.tolist(), **changes), strict=True):
            assert_close(a, wanted, terms=SIZE + TIME * HEADS // GROUPS)


@pytest.mark.parametrize("time", [1, 5, 128, 129, 300])
def test_ids_that_recur_are_runs_of_their_own_in_long_rows(time):
    """Also where XLA sums in blocks of tokens."""
    draw = np.random.default_rng(time)
    segments_bt = draw.integers(0, 2, (BATCH, time)).astype(np.int32)
    changes_bt = np.pad(segments_bt[:, 1:] != segments_bt[:, :-1], ((0, 0), (1, 0)))
    runs_bt = np.cumsum(changes_bt, axis=1, dtype=np.int32)
    q, k, v = (draw.standard_normal((BATCH, time, GROUPS, SIZE), np.float32) for _ in range(3))
    attended = partial(attention, q, k, v, scale=SCALE, implementation="full")
    # With indices, segments are compared as they are given.
    numbered = attended(segments_bt=runs_bt, q_index=np.arange(time), k_index=np.arange(time))
    np.testing.assert_array_equal(attended(segments_bt=segments_bt), numbered)


def test_blocked_holds_one_block_of_scores():
    q_bthk, k_bsgk, v_bsgk = (jnp.zeros((1, 1024, heads, 2)) for heads in (4, 2, 2))
    step = jax.jit(jax.grad(lambda *a: attention(*a, scale=1.0, implementation="blocked").sum(), argnums=(0, 1, 2)))
    scores = 4 * 1024 * 1024 * 4
    assert step.lower(q_bthk, k_bsgk, v_bsgk).compile().memory_analysis().temp_size_in_bytes < scores / 2


def test_refusals():
    q_bthk, k_bsgk, v_bsgk, _ = operands()
    run = partial(attention, scale=SCALE, implementation="full")
    with pytest.raises(ValueError, match="implementation='fast': expected one of"):
        attention(q_bthk, k_bsgk, v_bsgk, scale=SCALE, implementation="fast")
    with pytest.raises(ValueError, match="5 query heads over 2 key heads: expected a multiple"):
        run(q_bthk[:, :, :5], k_bsgk, v_bsgk)
    with pytest.raises(ValueError, match=r"v has shape \(2, 10, 2, 3\): expected \(2, 11, 2, 3\)"):
        run(q_bthk, k_bsgk, v_bsgk[:, 1:])
    with pytest.raises(ValueError, match=r"kv_segments has shape \(2, 11\): expected \(2, 10\)"):
        run(q_bthk, k_bsgk[:, 1:], v_bsgk[:, 1:], segments_bt=jnp.array(SEGMENTS))
    with pytest.raises(ValueError, match="expected both or neither"):
        run(q_bthk, k_bsgk, v_bsgk, kv_segments_bs=jnp.array(SEGMENTS))
    with pytest.raises(ValueError, match=r"q_index has shape \(3,\): expected \(11,\) or \(2, 11\)"):
        run(q_bthk, k_bsgk, v_bsgk, q_index=jnp.arange(3))
    with pytest.raises(ValueError, match=r"sinks has shape \(2,\): expected \(6,\)"):
        run(q_bthk, k_bsgk, v_bsgk, sinks_h=jnp.zeros(GROUPS))
    with pytest.raises(ValueError, match="window=0: expected 1 or more"):
        run(q_bthk, k_bsgk, v_bsgk, window=0)


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs a GPU, and JAX_PLATFORMS=cuda,cpu in front of the command"
)
class TestCudnn:
    """Against the reference in float32, for rows of one run, of few, of several and of more than the packed form takes,
    at each form's most."""

    LENGTHS = (
        ((160,), (160,)),
        ((3, 100, 57), (160,)),
        ((1, 128, 31), (64, 64, 32)),
        ((20,) * 8, (159, 1)),
        ((16,) * 8 + (31, 1), (160,)),
        ((5,) * 32, (160,)),
        ((4,) * 40, (160,)),
    )

    @staticmethod
    def draw(lengths):
        shapes = ((4, 16), (2, 16), (2, 16), (4, 16))
        keys = jax.random.split(jax.random.key(2), 4)
        arrays = [jax.random.normal(k, (2, 160, *s), jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
        return arrays, jnp.array([np.repeat(np.arange(len(row)), row) for row in lengths])

    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_equals_the_reference(self, lengths):
        inputs, segments_bt = self.draw(lengths)
        actual = with_gradients("cudnn", *inputs, segments_bt=segments_bt)
        wanted = with_gradients("full", *(a.astype(jnp.float32) for a in inputs), segments_bt=segments_bt)
        for a, w in zip(actual, wanted, strict=True):
            assert jnp.linalg.norm(a.astype(jnp.float32) - w) < 1e-2 * jnp.linalg.norm(w)

    @pytest.mark.parametrize("lengths", LENGTHS[1:])
    def test_a_document_does_not_see_another(self, lengths):
        (q_bthk, k_bsgk, v_bsgk, _), segments_bt = self.draw(lengths)
        first = lengths[0][0]
        changed = [a.at[0, :first].add(1) for a in (q_bthk, k_bsgk, v_bsgk)]
        one = attend("cudnn", q_bthk, k_bsgk, v_bsgk, segments_bt=segments_bt)
        two = attend("cudnn", *changed, segments_bt=segments_bt)
        np.testing.assert_array_equal(one[0, first:], two[0, first:])
        assert (one[0, :first] != two[0, :first]).any()


def test_cudnn_refuses_what_it_lacks(monkeypatch):
    q_bthk, k_bsgk, v_bsgk, _ = operands()
    attend_to = partial(attention, q_bthk, k_bsgk, scale=SCALE, implementation="cudnn")
    with pytest.raises(ValueError, match="with indices or segments of keys: expected whole rows"):
        attend_to(v_bsgk, q_index=jnp.arange(TIME))
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="needs a GPU and finds 'cpu'"):
            attend_to(v_bsgk)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="with window=3 or sinks: expected neither"):
        attend_to(k_bsgk, window=3)
    with pytest.raises(ValueError, match="with window=None or sinks: expected neither"):
        attend_to(k_bsgk, sinks_h=jnp.zeros(HEADS))
    with pytest.raises(ValueError, match="expected equal t and k"):
        attend_to(v_bsgk)
    with pytest.raises(ValueError, match="with q of float32: expected all bfloat16 or all float16"):
        attend_to(k_bsgk)
