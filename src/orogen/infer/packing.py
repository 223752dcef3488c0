"""Small arrays over rows as one array of 32-bit words: each array that a call takes from the host costs a transfer.

Letters: b rows, w words.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def pack(tree: Any) -> np.ndarray:
    """(b, w) int32: the bits of a tree's arrays, on the host. They are of 32 bits or bool, and have the same rows."""
    return np.concatenate([_words(np.asarray(a)) for a in jax.tree.leaves(tree)], axis=1)


def unpack(packed_bw: Array, like: Any) -> Any:
    """The tree that was packed, on the device. like: another one with arrays of the same dtypes, of any rows."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([a[0].size for a in leaves])
    found = [_array(part, a) for part, a in zip(jnp.split(packed_bw, ends[:-1], axis=1), leaves, strict=True)]
    return jax.tree.unflatten(structure, found)


def _words(a: np.ndarray) -> np.ndarray:
    a = a.astype(np.int32) if a.dtype == bool else np.ascontiguousarray(a)
    return a.view(np.int32).reshape(len(a), a[0].size)


def _array(part_bw: Array, like: np.ndarray) -> Array:
    a = part_bw.reshape(len(part_bw), *like.shape[1:])
    return a != 0 if like.dtype == bool else lax.bitcast_convert_type(a, like.dtype)
