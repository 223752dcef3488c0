"""The roofline plot of a benchmark: achieved TFLOP/s against FLOPs per byte, under measured ceilings."""

from pathlib import Path
from typing import Any

import numpy as np


def draw_roofline(facts: dict[str, Any], file: Path) -> None:
    """Draws every timed record of `bench` (see orogen.bench.operation) into `file`; its suffix names the format.

    Each point is one work at one shape; each marker is one implementation. The roof is the lower of FLOPs per byte x
    the copy's bandwidth, and the rate of a large matrix product.
    """
    from matplotlib.figure import Figure

    records = [record for record in facts["records"] if "tflops" in record]
    top, slope = facts["ceilings"]["matmul_tflops"], facts["ceilings"]["copy_tb_per_second"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensities = [record["flops_per_byte"] for record in records] or [top / slope]
    reach = np.geomspace(min(intensities) / 4, max(*intensities, top / slope) * 4, 200)
    axes.loglog(
        reach, np.minimum(reach * slope, top), color="black", label=f"{top:g} TFLOP/s, {slope:g} TB/s, measured"
    )
    for number, name in enumerate(dict.fromkeys(record["implementation"] for record in records)):
        mine = [record for record in records if record["implementation"] == name]
        at = [record["flops_per_byte"] for record in mine], [record["tflops"] for record in mine]
        axes.plot(*at, "osD^vP*X"[number % 8], label=name, alpha=0.8)
    for label, x, y in _highest(records):
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="FLOPs per byte", ylabel="TFLOP/s", title=f"{facts['bench']} on {facts['device']}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def _highest(records: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """The label of each work, and the point of its fastest implementation."""
    found: dict[str, tuple[float, float]] = {}
    for record in records:
        label, point = f"{record['shape']} {record['work']}", (record["flops_per_byte"], record["tflops"])
        if label not in found or point[1] > found[label][1]:
            found[label] = point
    return [(label, *point) for label, point in found.items()]
