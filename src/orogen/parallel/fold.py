"""Folds several factorizations of one ordered list of devices into a single mesh: their common refinement.

A factorization is an ordered list of (axis, size), outermost first. Read from the innermost axis outwards, each one
cuts the device list at the cumulative products of its sizes. If all cuts together form a chain in which each divides
the next, the mesh between neighbouring cuts serves every factorization: each of its axes is a tuple of mesh axes.
No jax here: the simulator folds clusters that do not exist. Source: MoE Parallel Folding, arXiv:2504.14960.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Factorization = Sequence[tuple[str, int]]


class Folding(NamedTuple):
    """A mesh, as (mesh axis, size) outermost first, and the mesh axes of size above one behind each logical axis."""

    axes: tuple[tuple[str, int], ...]
    logical: Mapping[str, tuple[str, ...]]


class FoldError(ValueError):
    """Factorizations that share no mesh."""


def refine(*factorizations: Factorization) -> Folding:
    """The coarsest mesh that all `factorizations` are groupings of.

    Mesh axes are named after the first factorization: an axis that must be cut is named `tensor.0`, `tensor.1`,
    outermost first. Raises FoldError if sizes have different products or two cuts do not divide each other.
    """
    total = math.prod(size for _, size in factorizations[0])
    cuts = {1}
    for factorization in factorizations:
        product = math.prod(size for _, size in factorization)
        if product != total:
            raise FoldError(f"{describe(factorization)} is {product} devices; {describe(factorizations[0])} is {total}")
        cuts.update(end for _, _, end in _spans(factorization))
    chain = sorted(cuts)
    for low, high in zip(chain, chain[1:], strict=False):
        if high % low:
            both = " and ".join(describe(f) for f in factorizations)
            raise FoldError(f"{both} share no mesh: cuts at {low} and {high} devices cross")
    atoms = list(zip(chain, chain[1:], strict=False))
    names = _atom_names(factorizations[0], atoms)
    logical = {
        axis: tuple(names[low, high] for low, high in reversed(atoms) if start <= low and high <= end)
        for factorization in factorizations
        for axis, start, end in _spans(factorization)
    }
    return Folding(tuple((names[low, high], high // low) for low, high in reversed(atoms)), logical)


def fold(
    *,
    stage: int,
    data: int,
    context: int,
    tensor: int,
    expert: int,
    expert_tensor: int,
    cuts: Mapping[str, tuple[str, int]] | None = None,
) -> Folding:
    """The mesh of a plan: dense layers on stage x data x context x tensor, experts on the same devices otherwise.

    cuts: {name: (axis, size)} also makes `name` a logical axis of its own, the outer `size` ranks of `axis`, for
    arrays with fewer pieces than the axis has ranks (2 key heads over tensor 4); `axis` must be data, context or
    tensor. Raises FoldError, with both factorizations and the nearest legal expert sizes in the message.
    """
    dense = [("stage", stage), ("data", data), ("context", context), ("tensor", tensor)]
    ranks = data * context * tensor
    nearest = lambda: _nearest(dense, expert, expert_tensor)  # noqa: E731
    if ranks % (expert * expert_tensor):
        raise FoldError(
            f"expert {expert} x expert_tensor {expert_tensor} does not divide the {ranks} devices of a stage "
            f"({describe(dense)}); nearest legal: {nearest()}"
        )
    experts = _experts(stage, ranks, expert, expert_tensor)
    try:
        refine(dense, experts)
    except FoldError as error:
        raise FoldError(f"{error}; nearest legal: {nearest()}") from None
    return refine(dense, experts, *(_cut(dense, name, axis, size) for name, (axis, size) in (cuts or {}).items()))


def describe(factorization: Factorization) -> str:
    """`data 2 x tensor 4`, outermost first, without axes of size one."""
    return " x ".join(f"{axis} {size}" for axis, size in factorization if size > 1) or "1 device"


def _experts(stage: int, ranks: int, expert: int, expert_tensor: int) -> Factorization:
    replicas = ranks // (expert * expert_tensor)
    return [("stage", stage), ("expert_data", replicas), ("expert", expert), ("expert_tensor", expert_tensor)]


def _cut(dense: Factorization, name: str, axis: str, size: int) -> Factorization:
    whole = dict(dense)[axis]
    if whole % size:
        raise FoldError(f"{name} has {size} pieces for {axis} {whole}; expected a divisor or a multiple")
    return [
        part
        for key, length in dense
        for part in ([(name, size), (f"{name}_copies", whole // size)] if key == axis else [(key, length)])
    ]


def _spans(factorization: Factorization) -> list[tuple[str, int, int]]:
    """(axis, start, end): the axis steps through devices `start` apart, and spans `end` of them."""
    spans, start = [], 1
    for axis, size in reversed(factorization):
        spans.append((axis, start, start * size))
        start *= size
    return spans


def _atom_names(named: Factorization, atoms: Sequence[tuple[int, int]]) -> dict[tuple[int, int], str]:
    names = {}
    for axis, start, end in _spans(named):
        inside = [atom for atom in reversed(atoms) if start <= atom[0] and atom[1] <= end]
        for index, atom in enumerate(inside):
            names[atom] = axis if len(inside) == 1 else f"{axis}.{index}"
    return names


def _nearest(dense: Factorization, expert: int, expert_tensor: int) -> str:
    """The three legal (expert, expert_tensor) closest to those asked for, by ratio."""
    stage, ranks = dict(dense)["stage"], math.prod(size for axis, size in dense if axis != "stage")
    divisors = [d for d in range(1, ranks + 1) if ranks % d == 0]
    legal = []
    for e in divisors:
        for t in (d for d in divisors if ranks % (e * d) == 0):
            try:
                refine(dense, _experts(stage, ranks, e, t))
            except FoldError:
                continue
            legal.append((abs(math.log(e / expert)) + abs(math.log(t / expert_tensor)), -e, e, t))
    return ", ".join(f"expert {e} x expert_tensor {t}" for _, _, e, t in sorted(legal)[:3])
