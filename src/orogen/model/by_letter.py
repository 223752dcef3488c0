"""The layers of a stack by their letter: one array per parameter, whose rows are the layers in the order of the
pattern.

Letters: v chunks per stage, r rows, one per layer.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from orogen.model.block import Items, Repeat, letters

ByLetter = dict[str, Any]


def by_letter(stack: Any, items: Items, *, lead: int = 0) -> ByLetter:
    """The arrays of a Stack's layers by letter; the layers of a letter lie along axis `lead`, in pattern order.

    stack: a Stack's state, or a tuple such as its statistics; all its arrays share the axes before `lead`.
    """
    stacks = []
    for item, child in zip(items, _children(stack, len(items)), strict=True):
        if child is None:
            continue
        if isinstance(item, Repeat):
            merge = lambda a: a.reshape(*a.shape[:lead], -1, *a.shape[lead + 2 :])  # noqa: E731
            inner = by_letter(child, item.items, lead=lead + 1)
            stacks.append({letter: jax.tree.map(merge, tree) for letter, tree in inner.items()})
        else:
            stacks.append({item: jax.tree.map(lambda a: jnp.expand_dims(a, lead), child)})
    return joined(stacks, lead=lead)


def stacked(layers: Mapping[str, Any], items: Items, *, lead: int = 0) -> tuple[Any, ...]:
    """The inverse of `by_letter`: one entry per item, None where a letter has no arrays."""
    children, start = [], dict.fromkeys(layers, 0)
    for item in items:
        pattern = letters((item,))
        parts = {}
        for letter in [letter for letter in layers if letter in pattern]:
            end = start[letter] + pattern.count(letter)
            part = functools.partial(lax.slice_in_dim, start_index=start[letter], limit_index=end, axis=lead)
            parts[letter], start[letter] = jax.tree.map(part, layers[letter]), end
        if isinstance(item, Repeat):
            split = lambda a, n=item.count: a.reshape(*a.shape[:lead], n, -1, *a.shape[lead + 1 :])  # noqa: E731
            children.append(stacked(jax.tree.map(split, parts), item.items, lead=lead + 1))
        else:
            children.append(jax.tree.map(lambda a: a.squeeze(lead), parts[item]) if item in parts else None)
    return tuple(children)


def joined(stacks: Sequence[ByLetter], *, lead: int = 0) -> ByLetter:
    """The rows of several stacks, concatenated, as a chunk holds them."""
    together = functools.partial(concatenated, lead)
    found: dict[str, list[Any]] = {}
    for stack in stacks:
        for letter, tree in stack.items():
            found.setdefault(letter, []).append(tree)
    return {letter: jax.tree.map(together, *trees) for letter, trees in found.items()}


def add_rows(total: Array, rows_r: Array, chunk: Array) -> Array:
    """`total` (1, v, r, …) with `rows_r` added to the first rows of chunk `chunk`, in place."""
    zero = jnp.zeros_like(chunk)
    start = (zero, chunk) + (zero,) * (total.ndim - 2)
    old = lax.dynamic_slice(total, start, (1, 1, *rows_r.shape))
    return lax.dynamic_update_slice(total, old + rows_r[None, None], start)


def state_of(children: tuple[Any, ...]) -> dict[str, Any]:
    """The state of a Stack whose items have these arrays, nested like `block.Items`; empty if none has any."""
    nested = [state_of(child) if isinstance(child, tuple) else child for child in children]
    found = {index: child for index, child in enumerate(nested) if child}
    return {"children": found} if found else {}


def _children(stack: Any, count: int) -> Sequence[Any]:
    """One entry per item of a Stack, from a tuple, or from its state, which lacks items without arrays."""
    if isinstance(stack, tuple):
        return stack
    children = stack.get("children", {})
    return [children.get(index) for index in range(count)]


def concatenated(axis: int, *arrays: Array) -> Array:
    """The arrays concatenated along `axis`; a single array as it is."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def plain(tree: Any) -> Any:
    """Nested dicts of variables, from an nnx.State or a part of one."""
    return {name: plain(part) for name, part in tree.items()} if isinstance(tree, Mapping) else tree
