"""Which outputs of a jaxpr depend on which of its inputs, looking through loops and calls."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

PARAMETERS, BATCH = 1, 2
BOTH = PARAMETERS | BATCH


def dependence(jaxpr: jex.Jaxpr, inputs: Sequence[int], consts: int = 0) -> list[int]:
    """For each output, the union (bitwise or) of the flags of all inputs that it depends on. consts: the flags of the
    jaxpr's constants."""
    found: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True)) | dict.fromkeys(jaxpr.constvars, consts)
    read = lambda atom: 0 if isinstance(atom, jex.Literal) else found[atom]  # noqa: E731
    for equation in jaxpr.eqns:
        found.update(zip(equation.outvars, _outputs(equation, [read(a) for a in equation.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _outputs(equation: Any, inputs: list[int]) -> list[int]:
    """The flags of an equation's outputs; those of an unknown primitive depend on all inputs."""
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _scan(equation, inputs)
    if name in ("jit", "pjit", "closed_call", "remat2", "checkpoint"):
        return dependence(_open(params.get("jaxpr", params.get("call_jaxpr"))), inputs)
    every = 0
    for flags in inputs:
        every |= flags
    return [every] * len(equation.outvars)


def _open(jaxpr: jex.ClosedJaxpr | jex.Jaxpr) -> jex.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def _scan(equation: Any, inputs: list[int]) -> list[int]:
    """The flags of a loop's outputs: those of the carry grow until they reach a fixed point."""
    body = _open(equation.params["jaxpr"])
    # A loop passes its body the constants and the carry whole, and slices of the rest, so the numbers of dimensions
    # tell them apart. The parameters that count them have different names in different versions of jax.
    alike = lambda outer, inner: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))  # noqa: E731
    carried = alike(equation.outvars, body.outvars)
    consts = alike(equation.invars, body.invars) - carried
    carry = inputs[consts : consts + carried]
    while True:
        outputs = dependence(body, [*inputs[:consts], *carry, *inputs[consts + carried :]])
        grown = [a | b for a, b in zip(carry, outputs[:carried], strict=True)]
        if grown == carry:
            return carry + outputs[carried:]
        carry = grown
