"""The picture of a quantised model: the format of every layer's weights, and how sensitive each is to it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orogen.report.pictures import Theme, bare_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_formats(results: Sequence[Mapping[str, Any]], theme: Theme) -> "Figure":
    """One column per layer, one line per kind of weight, coloured by format. With sensitivities, a second panel has
    those of the formats that were chosen and of the others, by layer.

    results: of each layer and unit: layer, unit, format, scores.
    """
    units = list(dict.fromkeys(row["unit"] for row in results))
    formats = list(dict.fromkeys(row["format"] for row in sorted(results, key=lambda row: row["format"])))
    colours = dict(zip(formats, (theme.strong, theme.accent, theme.faint, theme.grid), strict=False))
    scored = [row for row in results if row["scores"]]
    figure = bare_figure(theme, height=1.2 + 0.35 * len(units) + (3.0 if scored else 0))
    panels = figure.subplots(2 if scored else 1, 1, squeeze=False, sharex=True)[:, 0]
    axes = panels[0]
    style_axes(axes, theme, grid=False)
    for name in formats:
        chosen = [row for row in results if row["format"] == name]
        x, y = [row["layer"] for row in chosen], [units.index(row["unit"]) for row in chosen]
        axes.scatter(x, y, marker="s", s=70, color=colours[name], edgecolors=theme.ink, linewidths=0.3, label=name)
    axes.set_yticks(range(len(units)), units)
    axes.set_ylim(len(units) - 0.5, -0.5)
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(formats), frameon=False)
    for text in legend.get_texts():
        text.set_color(theme.ink)
    panels[-1].set_xlabel("layer")
    if scored:
        _draw_scores(panels[1], scored, theme, colours)
    return figure


def _draw_scores(axes: Any, results: Sequence[Mapping[str, Any]], theme: Theme, colours: Mapping[str, str]) -> None:
    """Σ (g Δy)² of each choice, filled if it was made."""
    style_axes(axes, theme, grid=True)
    for row in results:
        for name, score in row["scores"].items():
            if score > 0:
                colour, chosen = colours.get(name, theme.faint), name == row["format"]
                axes.scatter(row["layer"], score, s=22, color=colour if chosen else "none", edgecolors=colour)
    axes.set_yscale("log")
    axes.set_ylabel("sensitivity Σ (g Δy)²")
