"""Draws predicted against published times."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from orogen.report.pictures import LIGHT
from orogen.simulate.pictures import COLOURS

MARKERS = {"a100": "o", "h100": "s", "gb200": "^", "gb300": "D"}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: predicted against published seconds. Right: the error of each row, by table. Rings are fitted rows."""
    figure = Figure(figsize=(12, 6.4), dpi=130, layout="constrained")
    axes, errors = figure.subplots(1, 2, width_ratios=(1, 1.1))
    tables = list(dict.fromkeys(result["table"] for result in results))
    for result in results:
        colour = COLOURS[tables.index(result["table"]) % len(COLOURS)]
        style = {
            "marker": MARKERS[result["hardware"]], "s": 34, "edgecolors": colour, "linewidths": 1.2,
            "facecolors": "none" if result["fitted"] else colour,
        }  # fmt: skip
        axes.scatter([result["published_seconds"]], [result["predicted_seconds"]], **style)
        errors.scatter([100 * result["error"]], [tables.index(result["table"])], **style)
    times = [result[f"{which}_seconds"] for result in results for which in ("published", "predicted")]
    span = [min(times) / 1.5, max(times) * 1.5]
    axes.plot(span, span, color=LIGHT.ink, linewidth=1)
    axes.fill_between(span, [0.8 * x for x in span], [1.2 * x for x in span], color=LIGHT.grid, zorder=0)
    axes.set(xscale="log", yscale="log", xlabel="published, seconds", ylabel="predicted, seconds", xlim=span, ylim=span)
    errors.axvspan(-20, 20, color=LIGHT.grid, zorder=0)
    errors.axvline(0, color=LIGHT.ink, linewidth=1)
    errors.set_yticks(range(len(tables)), tables)
    errors.invert_yaxis()
    errors.set(xlabel="error, % (band: 20 %)")
    for name, marker in MARKERS.items():
        axes.scatter([], [], marker=marker, color=LIGHT.ink, label=name)
    axes.scatter([], [], marker="o", facecolors="none", edgecolors=LIGHT.ink, label="fitted")
    axes.legend(frameon=False, loc="upper left")
    for panel in (axes, errors):
        panel.spines[:].set_visible(False)
        panel.grid(color=LIGHT.grid, linewidth=0.8)
    figure.savefig(path)
