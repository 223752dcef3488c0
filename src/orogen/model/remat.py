"""Recomputation in the backward pass: which policy of `jax.checkpoint` a layer runs under."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from orogen.config.remat import Remat
from orogen.parallel.placement import DEVICE, HOST

# Operations as expensive to recompute as matrix products: our own kernels (those of Mosaic GPU are called inside a
# function with a batching rule), and the router's sorting, whose results are small. A policy sees the operations of a
# custom derivative rule, but not those inside another function with such a rule, so our rules call kernels directly.
FUSED = ("pallas_call", "custom_vmap_call", "sort", "top_k")


def checkpointed(call: Callable[..., Any], remat: Remat, *, weights_behind: bool) -> Callable[..., Any]:
    """`call`, a function of weights and three other arguments, whose gradient saves the intermediates that `remat`
    keeps and recomputes the others.

    The recomputation reads its operands through an optimization barrier, so that XLA does not merge it with the forward
    computation. weights_behind: whether the weights pass the barrier too. That is right where much is computed from
    weights alone; elsewhere it would only copy each layer's weights out of their stack.
    """
    # With prevent_cse per argument, jax 0.11.2 raises an AssertionError if a derivative rule holds a constant array.
    behind = (weights_behind, True, True, True)
    return call if remat.kind == "none" else jax.checkpoint(call, policy=_policy(remat), prevent_cse=behind)


@functools.cache
def _policy(remat: Remat) -> Callable[..., Any]:
    """The policy for `jax.checkpoint`: whether, and where, an operation's result is saved."""
    offloads = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(remat.host),
        offload_src=DEVICE, offload_dst=HOST,
    )  # fmt: skip

    def keeps(primitive: Any, *operands: Any, **parameters: Any) -> Any:
        if primitive.name == "name" and parameters["name"] in remat.host:
            return offloads(primitive, *operands, **parameters)
        if primitive.name == "name":
            return remat.keeps(parameters["name"])
        return remat.kind == "elementwise" and _is_product(primitive, operands)

    return keeps


def _is_product(primitive: Any, operands: tuple[Any, ...]) -> bool:
    """Whether an operation costs as much as a matrix product. Products with batch axes do not count: they belong to
    attention, whose core is saved by name or recomputed."""
    if primitive.name == "dot_general":
        return all(len(operand.shape) == 2 for operand in operands)
    return primitive.name in FUSED
