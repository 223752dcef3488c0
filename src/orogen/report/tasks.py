"""Pictures of evaluations: by the length of the examples, and over a run's training."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from orogen.report.pictures import Picture, Theme, add_legend, bare_figure, style_axes
from orogen.report.series import Floats, Records, column, short_number, tokens_seen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREFIX = "evaluate/"  # of metrics of tasks in a run's records: evaluate/TASK/METRIC
MARKERS = "osD^vP*X<>"
MOST_MARKERS = 100  # points of a line above which they have none
Results = Mapping[str, Mapping[str, float]]
# By panel, lines: a label, and x and y of its points.
Panels = dict[str, dict[str, tuple[Any, Any]]]


def draw_results(results: Results, theme: Theme) -> "Figure":
    """One panel per metric: against the length, with a line per task, for metrics whose names end with @LENGTH; else
    one dot per task, for shares, bits per byte and perplexities."""
    by_length: Panels = {}
    single: dict[str, dict[str, float]] = {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, length = name.partition("@")
            if length:
                x, y = by_length.setdefault(metric, {}).setdefault(task, ([], []))
                x.append(int(length))
                y.append(value)
            elif not name.endswith("_stderr") and (0 <= value <= 1 or "per" in name) and math.isfinite(value):
                single.setdefault(metric, {})[task] = value
    panels = len(by_length) + len(single)
    figure = bare_figure(theme, height=0.4 + 2.6 * max(panels, 1))
    grid = figure.subplots(max(panels, 1), 1, squeeze=False)[:, 0]
    for axes, (metric, lines) in zip(grid, by_length.items(), strict=False):
        _draw_lines(axes, metric, lines, theme)
        _length_axis(axes, lines)
    for axes, (metric, values) in zip(grid[len(by_length) :], single.items(), strict=False):
        _draw_dots(axes, metric, values, theme)
    if not panels:
        style_axes(grid[0], theme, grid=True)
    return figure


def task_pictures(records: Records) -> list[Picture]:
    """The picture of the tasks that a run was evaluated on while it trained; none if there were none."""
    names = dict.fromkeys(name for record in records for name in record if name.startswith(PREFIX))
    panels: Panels = {}
    tokens_n = tokens_seen(records)
    for name in names:
        task, _, metric = name.removeprefix(PREFIX).rpartition("/")
        metric, _, length = metric.partition("@")
        if not metric.endswith("_stderr") and not metric.startswith(("tokens", "bytes", "documents")):
            label = f"{task}, {length} tokens" if length else task
            add_line(panels, metric, label, tokens_n, column(records, name))
    if not panels:
        return []
    caption = "The tasks that the run was evaluated on while it trained, one panel per metric."
    return [panels_picture("tasks", "Tasks", caption, panels)]


def add_line(panels: Panels, panel: str, label: str, tokens_n: Floats, value_n: Floats) -> None:
    """Adds a line to a panel, without the points that are not finite; nothing if no point is finite."""
    known_n = np.isfinite(value_n)
    if known_n.any():
        panels.setdefault(panel, {})[label] = (tokens_n[known_n], value_n[known_n])


def panels_picture(name: str, title: str, caption: str, panels: Panels) -> Picture:
    """A picture of panels over the tokens seen."""

    def draw(theme: Theme) -> "Figure":
        figure = bare_figure(theme, height=0.4 + 2.6 * len(panels))
        for axes, (metric, lines) in zip(
            figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True
        ):
            _draw_lines(axes, metric, lines, theme)
            axes.set_xlabel("tokens")
            axes.xaxis.set_major_formatter(short_number)
        return figure

    return Picture(name, title, caption, draw)


def _draw_lines(axes: "Axes", metric: str, lines: Mapping[str, tuple[Any, Any]], theme: Theme) -> None:
    from matplotlib import colormaps

    style_axes(axes, theme, grid=True)
    colours = colormaps["tab10"]
    for number, (label, (x, y)) in enumerate(lines.items()):
        marker = MARKERS[number % len(MARKERS)] if len(x) <= MOST_MARKERS else ""
        axes.plot(x, y, color=colours(number % 10), marker=marker, markersize=4, linewidth=1.4, label=label)
    axes.set_ylabel(metric)
    if all(0 <= value <= 1 for _, y in lines.values() for value in y) and metric != "nats":
        axes.set_ylim(-0.04, 1.04)
    add_legend(axes, theme, loc="best")


def _length_axis(axes: "Axes", lines: Mapping[str, tuple[Any, Any]]) -> None:
    lengths = sorted({length for x, _ in lines.values() for length in x})
    if lengths[-1] > lengths[0]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens of an example")


def _draw_dots(axes: "Axes", metric: str, values: Mapping[str, float], theme: Theme) -> None:
    style_axes(axes, theme, grid=True)
    axes.plot(list(values.values()), list(values), "o", color=theme.strong)
    axes.set_xlabel(metric)
    axes.set_ylim(len(values) - 0.5, -0.5)
    if all(0 <= value <= 1 for value in values.values()):
        axes.set_xlim(-0.02, 1.02)
