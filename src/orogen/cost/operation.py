"""The operations of a layer on one device: their products, and the bytes that they read and write.

Letters of dimensions: m rows, k contracted, n columns.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Operation(NamedTuple):
    """One kind of work of a layer, for one microbatch on one device.

    kind: matmul, grouped, attention, scores, ssd or memory. flops, bytes: of the forward pass; back: of the backward
    pass. shape: (m, k, n) of a product, whose gradients have (m, n, k) and (k, m, n). makes: the name of what it
    computes (config/remat.py), "" if that has none. kernels: launches of the forward pass; the backward pass has twice
    as many. groups: experts of a grouped product. length: tokens that attention sees at most. last: whether no gradient
    needs its result.
    """

    name: str
    kind: str
    flops: float
    bytes: float
    back: tuple[float, float]
    shape: tuple[float, float, float] = (0, 0, 0)
    makes: str = ""
    kernels: float = 1
    groups: float = 1
    length: float = 1
    last: bool = False


def product(name: str, m: float, k: float, n: float, size: int, *, makes: str = "", last: bool = False) -> Operation:
    """A product of (m, k) and (k, n) with `size` bytes per number, and its two gradients."""
    flops, moved = 2 * m * k * n, size * (m * k + k * n + m * n)
    return Operation(name, "matmul", flops, moved, (2 * flops, 2 * moved), (m, k, n), makes, last=last)


def memory(name: str, forward: float, backward: float, *, makes: str = "", kernels: float = 1) -> Operation:
    """Elementwise work that reads and writes so many bytes."""
    return Operation(name, "memory", 0, forward, (0, backward), makes=makes, kernels=kernels)


def names(operations: Iterable[Operation]) -> list[str]:
    """Their names, in order."""
    return [operation.name for operation in operations]
