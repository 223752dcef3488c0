"""Which outputs of a jaxpr depend on which of its inputs, seen through loops and calls."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

PARAMETERS, BATCH = 1, 2
BOTH = PARAMETERS | BATCH


def dependence(jaxpr: jex.Jaxpr, inputs: Sequence[int], consts: int = 0) -> list[int]:
    """For each output, the flags (or-ed) of all inputs that it depends on. consts: the flags of the constants."""
    found: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True)) | dict.fromkeys(jaxpr.constvars, consts)
    read = lambda atom: 0 if isinstance(atom, jex.Literal) else found[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        found.update(zip(equation.outvars, _outputs(equation, [read(a) for a in equation.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, inputs: list[int]) -> list[int]:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _scan(params, inputs)
    if name in ("jit", "pjit", "closed_call", "remat2", "checkpoint"):
        inner = params["jaxpr"]
        inner = inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner
        return dependence(inner, inputs)
    every = 0
    for flags in inputs:
        every |= flags
    return [every] * len(equation.outvars)


def _scan(params: dict[str, Any], inputs: list[int]) -> list[int]:
    """Of a loop: what the carry depends on grows until it no longer does."""
    consts, carried = params["num_consts"], params["num_carry"]
    body = params["jaxpr"].jaxpr
    carry = inputs[consts : consts + carried]
    while True:
        outputs = dependence(body, [*inputs[:consts], *carry, *inputs[consts + carried :]])
        grown = [a | b for a, b in zip(carry, outputs[:carried], strict=True)]
        if grown == carry:
            return carry + outputs[carried:]
        carry = grown
