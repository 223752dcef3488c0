"""Folds several factorizations of one ordered list of devices into a single mesh: their common refinement.

A factorization is an ordered list of (axis, size), outermost first. Its boundaries are the cumulative products of its
sizes, from the innermost axis outwards: where it splits the device list. If the boundaries of all factorizations form a
chain in which each divides the next, then a mesh with one axis between every two neighbouring boundaries serves them
all: each axis of a factorization is a tuple of mesh axes. No jax here: the simulator folds clusters that do not exist.
Source: MoE Parallel Folding, arXiv:2504.14960.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Factorization = Sequence[tuple[str, int]]


class Folding(NamedTuple):
    """A mesh, as (mesh axis, size) outermost first, and, for each logical axis, the mesh axes above size one
    that it is split over."""

    axes: tuple[tuple[str, int], ...]
    logical: Mapping[str, tuple[str, ...]]


class FoldError(ValueError):
    """Factorizations that share no mesh."""


def refine(*factorizations: Factorization) -> Folding:
    """The coarsest mesh that all `factorizations` are groupings of.

    Mesh axes are named after the first factorization: an axis that must be split is named `tensor.0`, `tensor.1`,
    outermost first. Raises FoldError if sizes have different products or two boundaries do not divide each other.
    """
    total = math.prod(size for _, size in factorizations[0])
    boundaries = {1}
    for factorization in factorizations:
        product = math.prod(size for _, size in factorization)
        if product != total:
            raise FoldError(f"{describe(factorization)} is {product} devices; {describe(factorizations[0])} is {total}")
        boundaries.update(_boundaries(factorization))
    chain = sorted(boundaries)
    for low, high in zip(chain, chain[1:], strict=False):
        if high % low:
            crossing = [next(f for f in factorizations if boundary in _boundaries(f)) for boundary in (low, high)]
            both = " and ".join(describe(f) for f in sorted(crossing, key=factorizations.index))
            raise FoldError(f"{both} share no mesh: boundaries at {low} and {high} devices cross")
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
    fsdp_size: int | None = None,
    outer: Mapping[str, tuple[str, int]] | None = None,
) -> Folding:
    """The mesh of a plan: dense layers on stage x data x context x tensor, experts on the same devices in
    another factorization.

    fsdp_size: groups of this many neighbours of data x context (None: all of them) form the axis `fsdp`, over which a
    copy of the dense layers may be sharded; `expert_fsdp` is the part of expert_data inside one such group.
    outer: {name: (axis, size)} also makes `name` a logical axis of its own, the outer `size` ranks of `axis`, for
    arrays with fewer pieces than the axis has ranks (2 key heads over tensor 4); `axis` must be data, context or
    tensor. Raises FoldError, with the factorizations that do not fold and the nearest legal sizes in the message.
    """
    dense = [("stage", stage), ("data", data), ("context", context), ("tensor", tensor)]
    ranks = data * context * tensor
    experts = _experts(stage, ranks, expert, expert_tensor)
    legal = lambda: _nearest_experts(dense, expert, expert_tensor)  # noqa: E731
    if ranks % (expert * expert_tensor):
        raise FoldError(
            f"expert {expert} x expert_tensor {expert_tensor} does not divide the {ranks} devices of a stage "
            f"({describe(dense)}); nearest legal: {legal()}"
        )
    try:
        refine(dense, experts)
    except FoldError as error:
        raise FoldError(f"{error}; nearest legal: {legal()}") from None
    parts = _with_fsdp(dense, experts, data * context if fsdp_size is None else fsdp_size)
    for name, (axis, size) in (outer or {}).items():
        parts = _with_split(parts, name, axis, size)
    return refine(*parts)


def expert_shards(neighbours: int, *, tensor: int, expert: int, expert_tensor: int) -> int:
    """The number of replicas of each expert within a group of `neighbours` ranks of data x context."""
    return max(1, neighbours * tensor // (expert * expert_tensor))


def nearest(size: int, legal: Iterable[int]) -> list[int]:
    """The two of `legal` that are closest to `size` by ratio; of two equally close ones the larger."""
    return sorted(legal, key=lambda other: (abs(math.log(other / size)), -other))[:2]


def describe(factorization: Factorization) -> str:
    """`data 2 x tensor 4`, outermost first, without axes of size one."""
    return " x ".join(f"{axis} {size}" for axis, size in factorization if size > 1) or "1 device"


def _experts(stage: int, ranks: int, expert: int, expert_tensor: int) -> Factorization:
    replicas = ranks // (expert * expert_tensor)
    return [("stage", stage), ("expert_data", replicas), ("expert", expert), ("expert_tensor", expert_tensor)]


def _with_fsdp(dense: Factorization, experts: Factorization, size: int) -> list[Factorization]:
    """The dense and expert factorizations, and both again with their data axes split into groups of `size` ranks."""
    sizes = dict(dense) | dict(experts)
    ranks, tensor = sizes["data"] * sizes["context"], sizes["tensor"]

    def split_at(size: int) -> list[Factorization]:
        shards = expert_shards(size, tensor=tensor, expert=sizes["expert"], expert_tensor=sizes["expert_tensor"])
        groups = [experts[0], ("fsdp_copies", ranks // size), ("fsdp", size), ("tensor", tensor)]
        if sizes["expert_data"] % shards:  # a group of neighbours then overlaps only part of a set of experts
            return [groups]
        expert_groups = [("expert_fsdp_copies", sizes["expert_data"] // shards), ("expert_fsdp", shards), *experts[2:]]
        return [groups, [experts[0], *expert_groups]]

    def found() -> str:
        legal = (n for n in _divisors(ranks) if _folds(dense, experts, *split_at(n)))
        return ", ".join(f"fsdp_size {n}" for n in nearest(size, legal))

    if ranks % size:
        raise FoldError(f"fsdp_size {size} does not divide data x context = {ranks}; nearest legal: {found()}")
    parts = [dense, experts, *split_at(size)]
    try:
        refine(*parts)
    except FoldError as error:
        raise FoldError(f"fsdp_size {size}: {error}; nearest legal: {found()}") from None
    return parts


def _with_split(parts: Sequence[Factorization], name: str, axis: str, size: int) -> list[Factorization]:
    """`parts`, and the first of them (the dense layers) again with `axis` split into `size` pieces and their copies."""
    whole = dict(parts[0])[axis]

    def split_at(size: int) -> Factorization:
        inner = [(name, size), (f"{name}_copies", whole // size)]
        return [part for key, length in parts[0] for part in (inner if key == axis else [(key, length)])]

    def found() -> str:
        legal = (n for n in _divisors(whole) if _folds(*parts, split_at(n)))
        return ", ".join(f"{name} {n}" for n in nearest(size, legal))

    if whole % size:
        raise FoldError(
            f"{name} has {size} pieces for {axis} {whole}; expected a divisor or a multiple; nearest legal: {found()}"
        )
    try:
        refine(*parts, split_at(size))
    except FoldError as error:
        raise FoldError(f"{error}; nearest legal: {found()}") from None
    return [*parts, split_at(size)]


def _folds(*factorizations: Factorization) -> bool:
    try:
        refine(*factorizations)
    except FoldError:
        return False
    return True


def _divisors(size: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return sorted({*small, *(size // d for d in small)})


def _spans(factorization: Factorization) -> list[tuple[str, int, int]]:
    """(axis, start, end): the axis steps through devices `start` apart, and spans `end` of them."""
    spans, start = [], 1
    for axis, size in reversed(factorization):
        spans.append((axis, start, start * size))
        start *= size
    return spans


def _boundaries(factorization: Factorization) -> set[int]:
    return {end for _, _, end in _spans(factorization)}


def _atom_names(named: Factorization, atoms: Sequence[tuple[int, int]]) -> dict[tuple[int, int], str]:
    names = {}
    for axis, start, end in _spans(named):
        inside = [atom for atom in reversed(atoms) if start <= atom[0] and atom[1] <= end]
        for index, atom in enumerate(inside):
            names[atom] = axis if len(inside) == 1 else f"{axis}.{index}"
    return names


def _nearest_experts(dense: Factorization, expert: int, expert_tensor: int) -> str:
    """The three legal (expert, expert_tensor) closest to the requested ones by ratio."""
    stage, ranks = dict(dense)["stage"], math.prod(size for axis, size in dense if axis != "stage")
    legal = [
        (abs(math.log(e / expert)) + abs(math.log(t / expert_tensor)), -e, e, t)
        for e in _divisors(ranks)
        for t in _divisors(ranks // e)
        if _folds(dense, _experts(stage, ranks, e, t))
    ]
    return ", ".join(f"expert {e} x expert_tensor {t}" for _, _, e, t in sorted(legal)[:3])
