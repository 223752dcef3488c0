"""Results for people and programs: a table, JSON, and a picture with the length on its x-axis."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orogen.config.files import write_atomically
from orogen.evaluate.run import Results
from orogen.report.pictures import LIGHT, png
from orogen.report.tasks import draw_results


def table(results: Results) -> list[str]:
    """One line per task and metric."""
    grid = [("task", "metric", "value")]
    for task, metrics in results.items():
        grid += [(task, metric, _number(value)) for metric, value in metrics.items()]
    widths = [max(len(row[column]) for row in grid) for column in range(3)]
    return [f"{a.ljust(widths[0])}  {b.ljust(widths[1])}  {c.rjust(widths[2])}" for a, b, c in grid]


def plain(results: Results) -> dict[str, dict[str, float | None]]:
    """The results as JSON has them, which has no NaN and no infinity: such a number becomes null."""
    return {
        task: {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        for task, metrics in results.items()
    }


def write_results(folder: Path, results: Results, facts: Mapping[str, Any]) -> list[Path]:
    """Writes `results.json`, with `facts` beside the results, `results.txt` and `results.png`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, "results": plain(results)}, indent=2, allow_nan=False)
    contents = {"results.json": f"{text}\n".encode(), "results.txt": "\n".join([*table(results), ""]).encode()}
    contents["results.png"] = png(draw_results(results, LIGHT))
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4f}"
