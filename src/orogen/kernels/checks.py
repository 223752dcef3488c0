"""What an operation checks before an implementation sees its operands."""

from collections.abc import Mapping
from typing import TypeVar

from jax import Array

Implementation = TypeVar("Implementation")


def chosen(implementations: Mapping[str, Implementation], name: str) -> Implementation:
    """The implementation of that name. Raises ValueError that lists the names there are."""
    if name not in implementations:
        raise ValueError(f"implementation={name!r}: expected one of {sorted(implementations)}")
    return implementations[name]


def require_shapes(expected: Mapping[str, tuple[Array | None, *tuple[tuple[int, ...], ...]]], beside: str) -> None:
    """Raises ValueError that names the first operand that has none of the shapes that follow it; None has any.

    beside: what the shapes follow from.
    """
    for name, (operand, *shapes) in expected.items():
        if operand is not None and operand.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {operand.shape}: expected {wanted} beside {beside}")
