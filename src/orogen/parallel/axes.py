"""Logical axes: the names of arrays' axes, and the mesh axes that each is split over."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from orogen.parallel.fold import Folding

MeshAxes = tuple[str, ...]
# The logical axes (b, t) of the residual stream, as devices hold it between layers; and of arrays that hold each token
# on one rank only, as routed experts take them.
STREAM, TOKENS = ("stream_rows", "stream_time"), ("token_rows", "token_time")
# Parameter axes over which fully sharded data parallelism splits; vectors ("norm") stay whole: they are tiny.
SHARDED = ("embed", "expert_embed")


def make_rules(folding: Folding, *, fully_sharded: bool) -> dict[str, MeshAxes]:
    """Every logical axis name, except STREAM and TOKENS, with its mesh axes. fully_sharded: whether the rules are of
    arrays that FSDP shards."""
    axes = folding.logical
    tensor = axes["tensor"]
    return {
        "stage": axes["stage"],
        # activations: rows of the batch, and the tokens of a row; the ranks of `tensor` split either or neither
        "batch": axes["data"],
        "context": axes["context"],
        "tensor": tensor,
        # parameters of dense layers
        "embed": axes["fsdp"] if fully_sharded else (),
        "norm": (),
        "taps": (),
        "state": (),
        "positions": (),
        "vocab": tensor,
        "heads": tensor,
        "kv_heads": axes.get("kv_heads", tensor),
        "mlp": tensor,
        "mamba_heads": tensor,
        "groups": axes.get("groups", tensor),
        "group_peers": axes.get("norm_groups_copies", ()),
        # parameters of routed experts
        "expert": axes["expert"],
        "expert_tensor": axes["expert_tensor"],
        "expert_ranks": axes["expert"] + axes["expert_tensor"],
        "expert_mlp": axes["expert_tensor"],
        "expert_embed": axes["expert_fsdp"] if fully_sharded else (),
    }


def stream_rules(rules: Mapping[str, MeshAxes], stream: str) -> dict[str, MeshAxes]:
    """`rules` with STREAM and TOKENS for a `stream` that the ranks of `tensor` hold by `time`, by `rows` or `whole`."""
    batch, context, tensor = (rules[axis] for axis in ("batch", "context", "tensor"))
    by_time, by_rows, whole = (batch, context + tensor), (batch + tensor, context), (batch, context)
    held = {"time": by_time, "rows": by_rows, "whole": whole}[stream]
    # If every rank holds the whole stream, each still routes only its own tokens.
    alone = by_time if stream == "whole" else held
    return {**rules, **dict(zip(STREAM, held, strict=True)), **dict(zip(TOKENS, alone, strict=True))}


def spec_of(rules: Mapping[str, MeshAxes], axes: tuple[str | None, ...]) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes. Raises KeyError on an unknown axis, ValueError if one mesh
    axis would split two of them."""
    parts = [() if axis is None else rules[axis] for axis in axes]
    used = [name for part in parts for name in part]
    if len(set(used)) != len(used):
        raise ValueError(f"{axes} -> {parts}: one mesh axis splits two array axes")
    return PartitionSpec(*(part or None for part in parts))


def full_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The variable's axes, preceded by one for each leading dimension that stacking layers has added. The first of
    these is `stage` if the variable is marked as `staged`; the others are None."""
    metadata, ndim = variable.get_metadata(), variable.get_value().ndim
    stacked = (None,) * (ndim - len(metadata["axes"]))
    if metadata.get("staged"):
        stacked = ("stage", *stacked[1:])
    return stacked + tuple(metadata["axes"])


def map_variables(on_variable: Callable, tree: Any, otherwise: Callable | None = None) -> Any:
    """`tree` with the value of each variable replaced by `on_variable(variable)`. Other leaves stay, or become
    `otherwise(leaf)`."""

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):  # optax leaves an empty Variable for a masked parameter
            return leaf.replace(on_variable(leaf)) if jax.tree.leaves(leaf) else leaf
        return otherwise(leaf) if otherwise else leaf

    return jax.tree.map(visit, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))
