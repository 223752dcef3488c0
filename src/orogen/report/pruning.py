"""The picture of a pruning: how the importance of units is spread, and what was cut."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from orogen.report.pictures import Theme, add_legend, bare_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Panel
    from matplotlib.figure import Figure

MANY = 12  # curves of layers that are drawn; more would be one dark area


class Axis(NamedTuple):
    """A size before and after, and for each layer (or the residual stream) the scores of all its units, the largest
    first, and those of the units that stay."""

    before: int
    after: int
    curves: Sequence[tuple[np.ndarray, np.ndarray]]

    @property
    def importance(self) -> float:
        """The share of the scores' sum that stays, averaged over layers."""
        shares = [kept.sum() / every.sum() for every, kept in self.curves if every.sum() > 0]
        return float(np.mean(shares)) if shares else 1.0


Axes = Mapping[str, Axis]


class Layers(NamedTuple):
    """The pattern, a score per layer (None: none were needed), and the layers that were removed, in that order."""

    pattern: str
    scores: Sequence[float] | None
    removed: Sequence[int]

    @property
    def importance(self) -> float:
        """The share of the scores' sum that stays."""
        scores = np.asarray(self.scores or [0.0] * len(self.pattern))
        left = np.delete(scores, list(self.removed))
        return float(left.sum() / scores.sum()) if scores.sum() > 0 else 1.0


def draw_pruning(axes: Axes, layers: Layers | None, theme: Theme) -> "Figure":
    """One panel per size: sorted scores over their mean, a line per layer, and where they were cut; one for layers."""
    drawn = {field: axis for field, axis in axes.items() if axis.curves}
    with_layers = layers is not None and layers.scores is not None
    panels = max(len(drawn) + with_layers, 1)
    figure = bare_figure(theme, height=0.4 + 2.4 * panels)
    grid = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for panel in grid:
        style_axes(panel, theme, grid=True)
    for panel, (field, axis) in zip(grid, drawn.items(), strict=False):
        _draw_axis(panel, field, axis, theme)
    if layers is not None and layers.scores is not None:
        _draw_layers(grid[len(drawn)], layers, theme)
    return figure


def _draw_axis(panel: "Panel", field: str, axis: Axis, theme: Theme) -> None:
    shown = np.unique(np.linspace(0, len(axis.curves) - 1, MANY).astype(int))
    for number in shown:
        every, _ = axis.curves[number]
        fraction = (np.arange(len(every)) + 0.5) / len(every)
        panel.plot(fraction, every / max(every.mean(), 1e-30), color=theme.strong, linewidth=1, alpha=0.5)
    label = f"{axis.after:,} of {axis.before:,} stay, with {axis.importance:.1%} of the importance"
    panel.axvline(axis.after / axis.before, color=theme.accent, linewidth=1.4, label=label)
    panel.set_xlim(0, 1)
    panel.set_ylim(bottom=0)
    panel.set_xlabel(f"share of units, the most important first: {field}")
    panel.set_ylabel("importance / mean")
    add_legend(panel, theme)


def _draw_layers(panel: "Panel", layers: Layers, theme: Theme) -> None:
    scores = np.asarray(layers.scores)
    colours = [theme.accent if number in layers.removed else theme.strong for number in range(len(scores))]
    panel.bar(np.arange(len(scores)), scores, color=colours)
    panel.set_xticks(np.arange(len(scores)), labels=list(layers.pattern))
    panel.set_xlabel(f"layers; {len(layers.removed)} are removed, in orange")
    panel.set_ylabel("score of the layer")
    if scores.min() > 0:
        panel.set_yscale("log")
