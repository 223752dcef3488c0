"""Rows in slots, of different ages, in padded pieces, equal whole rows without a cache. Letters: b rows, t time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.model.small import config, one_device, randomised, relative_error

from orogen.layers.documents import Documents, documents
from orogen.model.block import Stack, repeats
from orogen.model.cache import caches, map_layers
from orogen.model.slots import Paged, Slots, rolled_back, with_tables

# Rings of 3 + 5 places go round three times in the longest row. Row 1 begins as row 0 does.
LENGTHS, PIECE, DRAFTS, PAGE, REACH, SHARED = (27, 9, 18, 1), 5, 2, 2, 15, 4
WINDOW: dict[str, Any] = {"sliding_window": 3, "attention_sinks": True}
LATENT: dict[str, Any] = {
    "rope_theta": 100.0, "q_lora_rank": 6, "kv_lora_rank": 7, "qk_nope_head_dim": 3, "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}  # fmt: skip
PATTERNS: dict[str, dict[str, Any]] = {"Mw*": WINDOW, "m+E": LATENT, "M*M*-": {"rope_theta": 100.0, "head_dim": 6}}
TOLERANCE = {"float32": 4e-6, "bfloat16": 3e-2}


class Rig:
    """A stack, rows for it, and what the training path makes of them. replay: of its slots."""

    def __init__(self, pattern: str, replay: int, dtype: str):
        model = config(pattern=pattern, mtp_depths=0, **PATTERNS[pattern])
        graph, state = nnx.split(jax.eval_shape(lambda: Stack(repeats(pattern), model, nnx.Rngs(0))))
        self.dtype, self.replay, self.rng = jnp.dtype(dtype), replay, np.random.default_rng(1)
        self.state = jax.tree.map(lambda a: jnp.asarray(a, dtype), randomised(state, np.random.default_rng(0)))
        plan, rows = one_device(model), len(LENGTHS)
        x_btd = self.noise(rows, max(LENGTHS), model.hidden_size)
        self.x_btd = x_btd.at[1, :SHARED].set(x_btd[0, :SHARED])
        whole = documents((np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int32))
        run = jax.jit(lambda state, x_btd: nnx.merge(graph, state)(x_btd, whole, plan)[0])
        self.expected_btd = run(self.state, self.x_btd)
        room = Slots(rows, rows * REACH, PAGE, REACH, PIECE, DRAFTS if replay else 0, replay)
        # No row has its pages in order.
        table_bp = self.rng.permutation(rows * REACH).reshape(rows, REACH).astype(np.int32)
        table_bp[1, : SHARED // PAGE] = table_bp[0, : SHARED // PAGE]
        stack = nnx.merge(graph, self.state)
        started = jax.eval_shape(lambda: stack.start(room, self.dtype))
        self.leads = jax.tree.map(lambda a, names: a.ndim - len(names), started, stack.cache_axes(room))
        started = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), started)
        self.start = with_tables(map_layers(poisoned, started), table_bp)

        def piece(state, given, x_btd, docs, back_b):
            y_btd, kept = nnx.merge(graph, state)(x_btd, docs, plan, given)
            return y_btd, rolled_back(caches(kept), back_b) if replay else caches(kept)

        self._piece = jax.jit(piece)

    def noise(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.normal(size=shape), self.dtype)

    def feed(self, given: Any, places_b, counts_b, wrong_b, tokens: int) -> tuple[list[np.ndarray], Any]:
        """Feeds each row the next `counts_b` of its tokens, then `wrong_b` tokens of something else, which are taken
        back. Returns outputs of the former."""
        x_btd = np.array(self.noise(len(places_b), tokens, self.x_btd.shape[2]))
        for row, (place, count) in enumerate(zip(places_b, counts_b, strict=True)):
            x_btd[row, :count] = self.x_btd[row, place : place + count]
        time_t = np.arange(tokens)
        docs = Documents(
            (time_t < (counts_b + wrong_b)[:, None]).astype(np.int32), (places_b[:, None] + time_t).astype(np.int32)
        )
        y_btd, given = self._piece(self.state, given, x_btd, docs, wrong_b)
        return [np.asarray(y_btd[row, :count]) for row, count in enumerate(counts_b)], given


def poisoned(one: Any) -> Any:
    """Pages of which another sequence has made anything."""
    filled = lambda a: np.full_like(a, np.nan)  # noqa: E731
    return one._replace(values=jax.tree.map(filled, one.values)) if isinstance(one, Paged) else one


def shared(given: Any, leads: Any) -> Any:
    """With what row 0 keeps beside pages in row 1 as well."""

    def copied(one: Any, lead: Any) -> Any:
        rows = lambda a, n: jnp.take(a, jnp.array([0, 0, 2, 3]), axis=n)  # noqa: E731
        return one if isinstance(one, Paged) else jax.tree.map(rows, one, lead)

    return map_layers(copied, given, leads)


def served(rig: Rig) -> list[np.ndarray]:
    """The outputs of all rows, in pieces of random lengths, some of no token, most with wrong ones behind."""
    none_b, lengths_b = np.zeros(len(LENGTHS), np.int32), np.array(LENGTHS)
    places_b = np.array([SHARED, 0, 0, 0], np.int32)
    parts, given = rig.feed(rig.start, none_b, places_b, none_b, PIECE)
    given = shared(given, rig.leads)
    found = [[parts[0]], [parts[0]], [], []]
    places_b[1] = SHARED
    while (places_b < lengths_b).any():
        tokens = int(rig.rng.choice([1, DRAFTS + 1, PIECE]))
        counts_b = np.minimum(rig.rng.integers(0, tokens + 1, len(LENGTHS)), lengths_b - places_b)
        most_b = np.minimum(tokens - counts_b, DRAFTS if 2 * tokens <= rig.replay else 0)
        wrong_b = np.where(counts_b > 0, rig.rng.integers(0, most_b + 1), 0).astype(np.int32)
        parts, given = rig.feed(given, places_b, counts_b, wrong_b, tokens)
        for row, part in enumerate(parts):
            found[row].append(part)
        places_b = (places_b + counts_b).astype(np.int32)
    return [np.concatenate(parts) for parts in found]


@pytest.mark.parametrize(
    ("pattern", "replay", "dtype"),
    [
        ("Mw*", 0, "float32"), ("m+E", 0, "float32"), ("M*M*-", 0, "bfloat16"),
        ("Mw*", 6, "bfloat16"), ("m+E", 6, "float32"), ("M*M*-", 16, "float32"),
    ],
)  # fmt: skip
def test_pieces_of_rows_equal_the_rows(pattern, replay, dtype):
    """Where something is replayed, with tokens that are taken back again."""
    rig = Rig(pattern, replay, dtype)
    found = served(rig)
    for row, length in enumerate(LENGTHS):
        expected_td = np.asarray(rig.expected_btd[row, :length], np.float32)
        assert relative_error(found[row].astype(np.float32), expected_td) < TOLERANCE[dtype], row


def test_a_kernel_that_reads_pages_sees_nothing_beyond_a_rows_last_token():
    """Pieces of which rows have three, one, no and all of their four tokens; everything else in the pages is NaN."""
    rng, counts_b, first_b = np.random.default_rng(2), np.array([3, 1, 0, 4]), np.array([5, 0, 0, 2])
    rows, tokens, groups, per_group, size, page = 4, 4, 2, 3, 8, 2
    table_bp = rng.permutation(rows * 5).reshape(rows, 5).astype(np.int32)
    k_bsgk, v_bsgk = rng.normal(size=(2, rows, 10, groups, size)).astype(np.float32)
    known_bs = np.arange(10) < (first_b + counts_b)[:, None]
    pools = []
    for a_bsgk in (k_bsgk, v_bsgk):
        pool = np.full((rows * 5, page, groups, size), np.nan, np.float32)
        pool[table_bp] = np.where(known_bs[..., None, None], a_bsgk, np.nan).reshape(rows, 5, page, groups, size)
        pools.append(jnp.asarray(pool))
    q_bthk = rng.normal(size=(rows, tokens, groups * per_group, size)).astype(np.float32)
    valid_bt = np.arange(tokens) < counts_b[:, None]
    docs = Documents(jnp.asarray(valid_bt, jnp.int32), jnp.asarray(first_b[:, None] + np.arange(tokens), jnp.int32))
    plan = dataclasses.replace(one_device(config(pattern="*", mtp_depths=0)), decode_kernels="triton_interpreted")
    cache = Paged(tuple(pools), jnp.asarray(table_bp))
    y_bthk = cache.attend(jnp.asarray(q_bthk), docs, plan, sinks_h=None, window=None, scale=0.3)
    for row, time in zip(*np.nonzero(valid_bt), strict=True):
        seen = first_b[row] + time + 1
        for head in range(groups * per_group):
            score_s = 0.3 * k_bsgk[row, :seen, head // per_group] @ q_bthk[row, time, head]
            weight_s = np.exp(score_s - score_s.max())
            expected_k = weight_s @ v_bsgk[row, :seen, head // per_group] / weight_s.sum()
            np.testing.assert_allclose(y_bthk[row, time, head], expected_k, atol=2e-6)
