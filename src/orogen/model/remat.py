"""Recomputation in the backward pass: which policy of `jax.checkpoint` a layer runs under."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from orogen.config.remat import Remat
from orogen.parallel.placement import DEVICE, HOST

# Operations as expensive to repeat as products of two matrices: our own kernels, those of Mosaic GPU within a function
# that says how to batch them, and the router's sorting, which gives little to keep. A policy sees the operations of a
# function's own derivative rule, not into another function with such a rule: rules of ours call kernels themselves.
FUSED = ("pallas_call", "custom_vmap_call", "sort", "top_k")


def checkpointed(call: Callable[..., Any], remat: Remat, *, weights_behind: bool) -> Callable[..., Any]:
    """`call`, of weights and three other arguments, whose gradient keeps the intermediates that `remat` names and
    recomputes the others.

    The recomputation reads its operands behind a barrier, so that XLA does not merge it with the first computation.
    Weights stand there too if `weights_behind`, where much is computed from them alone; otherwise not, since each
    layer's would be copied out of their stack.
    """
    # Chosen by argument, it is an AssertionError of jax 0.11.2 if a derivative's rule holds a constant array.
    behind = (weights_behind, True, True, True)
    return call if remat.kind == "none" else jax.checkpoint(call, policy=_policy(remat), prevent_cse=behind)


@functools.cache
def _policy(remat: Remat) -> Callable[..., Any]:
    """Whether, and where, what an operation gives is kept, as `jax.checkpoint` asks of each."""
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
    """Products with batch axes are of attention, whose core is kept by name or recomputed."""
    if primitive.name == "dot_general":
        return all(len(operand.shape) == 2 for operand in operands)
    return primitive.name in FUSED
