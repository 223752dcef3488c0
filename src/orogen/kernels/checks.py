"""Checks of an operation's arguments, made before an implementation sees them."""

from collections.abc import Mapping
from typing import TypeVar

from jax import Array

Implementation = TypeVar("Implementation")


def chosen(implementations: Mapping[str, Implementation], name: str) -> Implementation:
    """The implementation of this name. Raises ValueError listing the known names."""
    if name not in implementations:
        raise ValueError(f"implementation={name!r}: expected one of {sorted(implementations)}")
    return implementations[name]


def require_shapes(expected: Mapping[str, tuple[Array | None, *tuple[tuple[int, ...], ...]]], beside: str) -> None:
    """Raises ValueError naming the first operand whose shape is none of those listed after it; an operand may be None.

    beside: the operands that determine the expected shapes, for the message.
    """
    for name, (operand, *shapes) in expected.items():
        if operand is not None and operand.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {operand.shape}: expected {wanted} to match {beside}")
