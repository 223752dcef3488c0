"""A plan as a table: the mesh, the logical axes, and where each parameter lives."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from orogen.parallel.axes import full_axes
from orogen.parallel.plan import Plan
from orogen.parallel.schedule import Schedule


def describe_plan(
    plan: Plan, params: nnx.State, segments: Sequence[str] = (), filled: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Mesh axes, logical axes, and for each parameter its shape, its axes and its shape on one device, inside the step
    and between steps; for a pipeline, also the costs of its schedule and the parameters that a stage holds.

    params: may be abstract. segments: the layers of a pipeline's segments. filled: by letter, the share of the stacked
    parameters' rows, over all stages, that hold a layer.
    """
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    sizes = dict(plan.mesh.shape)
    staged = [(path[1].key, leaf) for path, leaf in found if path[0].key == "layers" and full_axes(leaf)[0] == "stage"]
    return {
        "devices": plan.config.devices,
        "mesh": sizes,
        "logical_axes": {axis: list(names) for axis, names in plan.rules.items()},
        **({"pipeline": _pipeline(plan.schedule, segments) | _held(staged, filled or {})} if plan.schedule else {}),
        "parameters": {_name(path): _describe(leaf, plan, sizes) for path, leaf in found},
    }


def _pipeline(schedule: Schedule, segments: Sequence[str]) -> dict[str, Any]:
    return {
        "schedule": schedule.kind,
        "segments": list(segments),
        "virtual": schedule.virtual,
        "ticks": schedule.ticks,
        "bubble": float(schedule.bubble),
        "in_flight": list(schedule.in_flight),
        "stash_slots": max(schedule.stash_slots),
    }


def _held(staged: Sequence[tuple[str, nnx.Variable]], filled: Mapping[str, float]) -> dict[str, int]:
    """How many layer parameters each stage has room for, and how many it would need if layers were spread evenly."""
    sizes = [(filled[letter], math.prod(leaf.get_value().shape[1:])) for letter, leaf in staged]
    return {
        "layer_parameters": sum(size for _, size in sizes),
        "layer_parameters_if_even": round(sum(layers * size for layers, size in sizes)),
    }


def plan_lines(facts: dict[str, Any]) -> list[str]:
    """The facts of `describe_plan` as lines of text: one per axis and per parameter."""
    mesh = " x ".join(f"{name} {size}" for name, size in facts["mesh"].items())
    axes = [f"  {axis:<14} {' x '.join(names)}" for axis, names in facts["logical_axes"].items() if names]
    grid = [
        (
            name,
            _times(p["shape"]),
            " ".join(a or "·" for a in p["axes"]),
            _times(p["device_shape"]),
            _times(p["stored_shape"]),
        )
        for name, p in facts["parameters"].items()
    ]
    header = ("parameter", "shape", "axes", "on a device", "stored on a device")
    return [
        f"mesh: {mesh} ({facts['devices']} devices)",
        "logical axes that are split:",
        *axes,
        *_pipeline_lines(facts),
        "",
        *_table([header, *grid]),
    ]


def _pipeline_lines(facts: dict[str, Any]) -> list[str]:
    if "pipeline" not in facts:
        return []
    pipeline = facts["pipeline"]
    return [
        f"pipeline {pipeline['schedule']}: {pipeline['ticks']} ticks, bubble {pipeline['bubble']:.4g} of the busy "
        f"ticks, at most {pipeline['in_flight']} passes in flight per stage",
        *(f"  segment {number}: {segment or '-none-'}" for number, segment in enumerate(pipeline["segments"])),
        f"  a stage has room for {pipeline['layer_parameters']:,} layer parameters, for as many layers of each letter "
        f"as the fullest chunk has; {pipeline['layer_parameters_if_even']:,} if layers were spread evenly",
    ]


def _describe(leaf: nnx.Variable, plan: Plan, sizes: dict[str, int]) -> dict[str, Any]:
    shape, axes = leaf.get_value().shape, full_axes(leaf)

    def local(rules) -> list[int]:
        ways = [math.prod(sizes[name] for name in rules[axis]) if axis else 1 for axis in axes]
        return [size // way for size, way in zip(shape, ways, strict=True)]

    plan.spec(*axes)  # refuses a mesh axis used twice
    return {
        "shape": list(shape),
        "axes": list(axes),
        "device_shape": local(plan.rules),
        "stored_shape": local(plan.storage),
    }


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _table(grid: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in grid]
