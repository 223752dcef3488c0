"""Keys of other context ranks: how they reach this rank, and which of them are visible to its queries.

Each rank's tokens are two parts, the first early and the second late in the sequence (`parallel.context`). Of the four
pairs of one of this rank's parts with one of another's, exactly two are visible, each of them whole. The second part's
queries always see the first part's keys. If the keys' rank is before this one, the first part's queries see them too;
else the second part's queries also see the second part's keys. Among a rank's own tokens, in their order, the mask is
causal.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.parallel.plan import Plan
from orogen.parallel.varying import vary_like

# What to do with the keys of one other rank: (carry, keys, rank of the keys) -> (carry, shares for that rank).
Step = Callable[[Any, Any, Array], tuple[Any, Any]]


def around(step: Step, carry: Any, keys: Any, shares: Any, plan: Plan) -> tuple[Any, Any]:
    """The carry after a `step` for every other rank, nearest first; and the sum of the shares that the steps of all
    ranks computed for this one, and of its own `shares`.

    Keys travel around the ring; shares follow them, one rank further. Communication and computation overlap: a step
    sends the next keys before it computes, and adds the shares that it received only afterwards.
    """
    ranks = plan.size("context")

    def visit(state, *, last: bool):
        keys, owner, shares, carry = state
        following = keys if last else _shifted(keys, plan)
        before = _shifted(shares, plan)
        carry, added = step(carry, keys, owner)
        return following, (owner - 1) % ranks, jax.tree.map(jnp.add, before, added), carry

    state = (_shifted(keys, plan), jnp.asarray(plan.index("context") - 1, jnp.int32) % ranks, shares, carry)
    state = vary_like(state, state)
    if ranks > 2:
        state, _ = lax.scan(lambda state, _: (visit(state, last=False), None), state, None, length=ranks - 2)
    _, _, shares, carry = visit(state, last=True)
    return carry, _shifted(shares, plan)


def gathered(step: Step, carry: Any, keys: Any, shares: Any, plan: Plan) -> tuple[Any, Any]:
    """As `around`, by one all-gather of the keys and one reduce-scatter of the shares."""
    ranks, rank = plan.size("context"), plan.index("context")
    keys_r = jax.tree.map(lambda a: plan.gather(a[None], "context", dim=0), keys)
    put = lambda all_r, a, owner: lax.dynamic_update_index_in_dim(all_r, a, owner, 0)  # noqa: E731
    shares_r = jax.tree.map(lambda a: put(jnp.zeros((ranks, *a.shape), a.dtype), a, rank), shares)

    def visit(state, owner):
        carry, shares_r = state
        of_owner = jax.tree.map(lambda a_r: lax.dynamic_index_in_dim(a_r, owner, 0, keepdims=False), keys_r)
        carry, added = step(carry, of_owner, owner)
        return (carry, jax.tree.map(lambda all_r, a: put(all_r, a, owner), shares_r, added)), None

    owners = (rank - 1 - jnp.arange(ranks - 1, dtype=jnp.int32)) % ranks
    state = vary_like((carry, shares_r), (carry, shares_r, keys_r, owners))
    (carry, shares_r), _ = lax.scan(visit, state, owners)
    return carry, jax.tree.map(lambda a: plan.scatter(a, "context", dim=0)[0], shares_r)


def visible(query_side: Any, keys: Any, owner: Array, plan: Plan) -> tuple[tuple[Any, Any], tuple[Any, Any], Array]:
    """The two pairs of queries and keys that see each other, and whether the keys' rank is before this one: the first
    pair's queries are then the first part's, and both pairs' keys are the first part's."""
    ahead = owner < plan.index("context")
    (first, second), (k_first, k_second) = halves(query_side), halves(keys)
    return (select(ahead, first, second), k_first), (second, select(ahead, k_first, k_second)), ahead


def halves(tree: Any) -> tuple[Any, Any]:
    """The first and the second part of each leaf, along time: the last axis of an index, else the second."""
    half = lambda a, i: jnp.split(a, 2, axis=min(a.ndim - 1, 1))[i]  # noqa: E731
    first, second = (jax.tree.map(lambda a, i=i: half(a, i), tree) for i in range(2))
    return first, second


def rejoined(first: Any, second: Any) -> Any:
    """The inverse of `halves` for leaves with a batch."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), first, second)


def select(condition: Array, then: Any, otherwise: Any) -> Any:
    """`then` or `otherwise`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), then, otherwise)


def _shifted(tree: Any, plan: Plan) -> Any:
    """What the rank before this one has."""
    return jax.tree.map(lambda a: plan.shift(a, "context", 1), tree)
