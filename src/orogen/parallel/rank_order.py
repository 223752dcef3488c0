"""Sums over CPU devices of several processes, in the order of their ranks.

Within one process, XLA adds the devices' terms in the order of their ranks. Across processes it leaves a sum to gloo,
whose ring begins at another rank for each part of an array, so sums of three or more terms differ in their last bits.
With the lowering rules below, gloo exchanges the terms and each process adds them in the order of the ranks: a run then
has the same bits however its devices are divided over processes. That costs more traffic, which is acceptable on CPUs,
where such runs are tests.

Sums that the partitioner inserts outside shard_map do not pass through here.
"""

import math
from collections.abc import Callable
from typing import Any

from jax._src.interpreters.mlir import _lowerings as rules  # the rules to replace, which jax exports to nobody
from jax._src.lax.parallel import psum_invariant_p, psum_p, reduce_scatter_p
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo as hlo

Rule = Callable[..., Any]


def sum_in_rank_order() -> None:
    """Makes programs lowered for the CPU from now on add in the order of the ranks."""
    for primitive in (psum_p, psum_invariant_p, reduce_scatter_p):
        mlir.register_lowering(primitive, _ordered(rules[primitive].rule), platform="cpu")


def _ordered(rule: Rule) -> Rule:
    """The rule of a sum over ranks, as an all-gather, a sum, and the maximum of that over the ranks, which is the sum
    again. The maximum makes XLA fuse the operations around it as it would around the rule's own."""

    def lower(ctx: Any, x: Any, **parameters: Any) -> Any:
        outputs = rule(ctx, x, **parameters)
        ranks = parameters["axis_size"] if "axis_size" in parameters else _ranks(ctx, parameters["axes"])
        if ranks < 3:  # two terms have one sum
            return outputs
        operation = _collective(outputs[0])
        wide = _wide(x)
        flat = _reshaped(wide, [1, math.prod(x.type.shape)])
        stacked = ir.RankedTensorType.get([ranks, *flat.type.shape[1:]], flat.type.element_type)
        names = ("replica_groups", "channel_handle", "use_global_device_ids")
        given = {name: operation.attributes[name] for name in names if name in operation.attributes}
        gathered = hlo.AllGatherOp([stacked], [flat], all_gather_dim=0, **given)
        total = _reshaped(_sum(gathered.results[0]), x.type.shape)
        for unused in dict.fromkeys((outputs[0].owner, operation)):
            unused.erase()
        outputs = rule(ctx, total if total.type == x.type else hlo.convert(x.type, total), **parameters)
        _maximise(_collective(outputs[0]))
        return outputs

    return lower


def _ranks(ctx: Any, axes: Any) -> int:
    shape = ctx.module_context.axis_context.mesh.shape
    return math.prod(shape[axis] for axis in axes)


def _collective(result: Any) -> Any:
    """The operation that has a reducer: an untiled scatter is reshaped after it."""
    operation = result.owner
    return operation if len(operation.regions) else operation.operands[0].owner


def _sum(terms: Any) -> Any:
    """The sum of the rows, first to last."""
    ranks, size = terms.type.shape
    total = None
    for rank in range(ranks):
        edges = ([rank, 0], [rank + 1, size], [1, 1])
        term = hlo.slice(terms, *(ir.DenseI64ArrayAttr.get(edge) for edge in edges))
        total = term if total is None else hlo.add(total, term)
    return total


def _maximise(operation: Any) -> None:
    """Puts a maximum in place of the sum of the operation's reducer."""
    block = operation.regions[0].blocks[0]
    add = block.operations[0]
    with ir.InsertionPoint(add):
        greater = hlo.maximum(*block.arguments)
    add.operation.results[0].replace_all_uses_with(greater)
    add.operation.erase()


def _wide(x: Any) -> Any:
    """`x` in float32 if it is a narrower float: XLA:CPU adds those in float32, and rounds once."""
    if isinstance(x.type.element_type, ir.BF16Type | ir.F16Type):
        return hlo.convert(ir.RankedTensorType.get(x.type.shape, ir.F32Type.get()), x)
    return x


def _reshaped(x: Any, shape: Any) -> Any:
    return hlo.reshape(ir.RankedTensorType.get(list(shape), x.type.element_type), x)
