"""The check of an operation's operands before an implementation sees them."""

from collections.abc import Mapping

from jax import Array


def require_shapes(expected: Mapping[str, tuple[Array | None, *tuple[tuple[int, ...], ...]]], beside: str) -> None:
    """Raises ValueError that names the first operand that has none of the shapes behind it; None has any.

    beside: what the shapes follow from.
    """
    for name, (operand, *shapes) in expected.items():
        if operand is not None and operand.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {operand.shape}: expected {wanted} beside {beside}")
