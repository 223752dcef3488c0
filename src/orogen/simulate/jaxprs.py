"""Reads the collectives and matrix products of a traced program from its jaxpr; those in loops count once per
iteration."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.extend import core

from orogen.cost.ledger import sent_bytes
from orogen.simulate.hlo import Table, add

# JAX primitives that communicate, and the HLO operation that each becomes.
PRIMITIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "collective-permute",
    "ragged_all_to_all": "ragged-all-to-all",
}
RAGGED = PRIMITIVES["ragged_all_to_all"]


def jaxpr_collectives(jaxpr: core.Jaxpr, sizes: Mapping[str, int]) -> Table:
    """The collectives in `jaxpr`, each counted once per iteration of the loops around it. sizes: of the mesh axes."""
    table: Table = {}
    for times, equation in equations(jaxpr, lambda e: _sent(e, sizes)):
        operation = PRIMITIVES.get(equation.primitive.name)
        if operation is not None:
            key = operation, tuple(name for name in sizes if name in _named(equation))
            count = 1 if operation == RAGGED else len(equation.invars)
            add(table, key, times * count, times * _sent(equation, sizes))
    return table


def _sent(equation: core.JaxprEqn, sizes: Mapping[str, int]) -> float:
    operation = PRIMITIVES.get(equation.primitive.name)
    if operation is None:
        return 0
    sizes_of = [math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in _operands(equation)]
    # A ragged exchange sends no more than its result has room for.
    held = min(sizes_of) if operation == RAGGED else sum(sizes_of)
    return sent_bytes(operation, held, math.prod(sizes[name] for name in _named(equation)))


def _named(equation: core.JaxprEqn) -> tuple[str, ...]:
    named: Any = equation.params["axes" if "axes" in equation.params else "axis_name"]
    return (named,) if isinstance(named, str) else tuple(named)


def _operands(equation: core.JaxprEqn) -> Sequence[Any]:
    """The operands that are sent; of a ragged exchange the data and the output, not the offsets and sizes."""
    return equation.invars[:2] if equation.primitive.name == "ragged_all_to_all" else equation.invars


def product_flops(jaxpr: core.Jaxpr) -> int:
    """FLOPs of the matrix products in `jaxpr`, two per multiply-add; each product counts once per iteration of the
    loops around it."""
    return sum(times * product(equation) for times, equation in equations(jaxpr, product))


def product(equation: core.JaxprEqn) -> int:
    """FLOPs of a matrix product; 0 for any other equation."""
    if equation.primitive.name not in ("dot_general", "ragged_dot_general"):
        return 0
    left, right = (_shape(v) for v in equation.invars[:2])
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[i] for i in contracted)
    # Each row is multiplied by one group's matrix, whether the result keeps rows (r, m) or sums over them (g, k, m).
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), _ = numbers.dot_dimension_numbers
    shared = {*contracted, *numbers.rhs_group_dimensions}
    return 2 * math.prod(left) * math.prod(size for i, size in enumerate(right) if i not in shared)


def _shape(variable: Any) -> tuple[int, ...]:
    """The shape of a jaxpr's variable; () for None and for anything but an array."""
    return getattr(getattr(variable, "aval", None), "shape", ())


def equations(
    jaxpr: core.Jaxpr, weigh: Callable[[core.JaxprEqn], float], times: int = 1
) -> Iterator[tuple[int, core.JaxprEqn]]:
    """(how often it runs, equation) for every equation, inner jaxprs included. Of a cond, only the heaviest branch; of
    a choice by platform, the accelerators' branch if anything in it has weight.

    Raises ValueError on a while loop, whose trip count is unknown, if anything in it has weight.
    """
    weight = lambda inner: sum(times * weigh(e) for times, e in equations(inner, weigh))  # noqa: E731
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [opened(j) for j in _inner(equation)]
        yield times, equation
        if name == "cond":
            # In a choice by platform the last branch is for the platforms that are not named: accelerators.
            by_platform = equation.params.get("branches_platforms") and weight(inner[-1])
            inner = [inner[-1] if by_platform else max(inner, key=weight)]
        if name == "while" and any(weight(j) for j in inner):
            raise ValueError(
                "a while loop that communicates or multiplies matrices; expected a scan, whose trip count is known"
            )
        for each in inner:
            yield from equations(each, weigh, times * (equation.params["length"] if name == "scan" else 1))


def _inner(equation: core.JaxprEqn) -> Iterator[Any]:
    if equation.primitive.name == "custom_vjp_call":
        yield equation.params["call_jaxpr"]
        return
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.Jaxpr | core.ClosedJaxpr):
                yield each


def opened(jaxpr: Any) -> core.Jaxpr:
    """The bare jaxpr of a Jaxpr or a ClosedJaxpr."""
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
