"""The pictures of a run's report, drawn from its metrics: loss, throughput, expert load, dropped assignments.

Every picture is drawn in a theme, so that a page can have a light and a dark version. matplotlib's objects are used
directly: nothing here touches pyplot or its global figures.
Letters: n records, e experts, c spans of steps, the columns of a heat map.
"""

import functools
import io
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orogen.report.series import (
    Floats,
    Records,
    bits_per_nat,
    column,
    dropped_share,
    load_over_even,
    running_mean,
    short_number,
    tokens_seen,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Where a legend may be.
Corner = Literal["upper left", "upper right", "lower right", "best"]

WIDTH = 10.0  # inches
DOTS_PER_INCH = 130
MAX_COLUMNS = 320  # of all heat maps in one line of the page: narrower columns could not be told apart
OCTAVES = 2.0  # a heat map's colours span 1/4 to 4 times an even share


class Theme(NamedTuple):
    """Colours of a picture. `loads` go from few tokens to many; the middle one, an even share, is close to `ground`."""

    ground: str
    ink: str
    grid: str
    faint: str
    strong: str
    accent: str
    loads: tuple[str, ...]


LIGHT = Theme(
    ground="#ffffff",
    ink="#24292f",
    grid="#e4e7eb",
    faint="#b5cdea",
    strong="#1f5fae",
    accent="#c2410c",
    loads=("#08264f", "#3a7fcd", "#f2f3f5", "#e2773c", "#6b1d02"),
)
DARK = Theme(
    ground="#161b22",
    ink="#d5dae1",
    grid="#30363d",
    faint="#2f4a6d",
    strong="#6cb0ff",
    accent="#ff9d5c",
    loads=("#b9dcff", "#3f86d6", "#232a33", "#cf6a2a", "#ffd0ab"),
)


class Picture(NamedTuple):
    """One figure; `caption` says how to read it."""

    name: str
    heading: str
    caption: str
    draw: Callable[[Theme], "Figure"]


def pictures(records: Records, baselines: Mapping[str, float]) -> list[Picture]:
    """The pictures that this run has numbers for, in reading order. `baselines`: held-out bits per byte, by name."""
    makers = (functools.partial(_loss, baselines=baselines), _throughput, _expert_load, _dropped, _rounding)
    return [picture for picture in (make(records) for make in makers) if picture is not None]


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


# Loss


def _loss(records: Records, *, baselines: Mapping[str, float]) -> Picture | None:
    known = np.isfinite(tokens_seen(records)) & np.isfinite(column(records, "loss"))
    if not known.any():
        return None
    caption = (
        "The faint line is each step's training loss, the strong line its running mean over a fiftieth of the run. The "
        "first steps may lie above the picture."
    )
    if np.isfinite(column(records, "heldout_loss")).any():
        caption += " The dots are the held-out text: dots that rise while the line falls mean overfitting."
    factor = bits_per_nat(records)
    if factor is not None:
        caption += (
            f" Training loss is converted by the held-out text's ratio, {factor:.4f} bits per byte for each nat per "
            "token."
        )
        if baselines:
            caption += " A dashed line is a baseline on the held-out text: dots below it beat it."
    return Picture("loss", "Loss", caption, functools.partial(_draw_loss, records, baselines))


def _draw_loss(records: Records, baselines: Mapping[str, float], theme: Theme) -> "Figure":
    factor = bits_per_nat(records)
    unit, key = ("nats per token", "heldout_loss") if factor is None else ("bits per byte", "heldout_bits_per_byte")
    lines = {} if factor is None else {name: float(value) for name, value in baselines.items()}
    tokens_n, loss_n, heldout_n = tokens_seen(records), column(records, "loss"), column(records, key)
    figure, axes = plain_figure(theme, height=4.4)
    mean_n = _draw_series(axes, tokens_n, loss_n * (factor or 1.0), theme, label="training, running mean")
    scored = np.isfinite(heldout_n)
    if scored.any():
        label = f"held-out, last {heldout_n[scored][-1]:.3f}"
        axes.plot(
            tokens_n[scored], heldout_n[scored], "o-", color=theme.accent, markersize=4, linewidth=1.4, label=label
        )
    settled_n = mean_n[len(mean_n) // 33 :]  # without the initial drop, which would flatten the rest
    shown = np.concatenate([settled_n, heldout_n[len(heldout_n) // 33 :], list(lines.values())])
    if len(shown := shown[np.isfinite(shown)]):
        margin = 0.05 * np.ptp(shown) or 0.1
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    _draw_baselines(axes, lines, theme)
    axes.set(xlabel="tokens", ylabel=unit)
    axes.xaxis.set_major_formatter(short_number)
    add_legend(axes, theme)
    return figure


def _draw_baselines(axes: "Axes", lines: Mapping[str, float], theme: Theme) -> None:
    """Dashed lines, labelled in the right margin; labels that would overlap are moved up."""
    low, high = axes.get_ylim()
    floor = -math.inf
    for name, value in sorted(lines.items(), key=lambda line: line[1]):
        axes.axhline(value, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)), alpha=0.65)
        floor = max(value, floor + 0.055 * (high - low))
        place = (1.01, (floor - low) / (high - low))
        axes.text(*place, f"{name} {value:.2f}", transform=axes.transAxes, va="center", color=theme.ink, fontsize=9)


# Throughput and dropped assignments


def _throughput(records: Records) -> Picture | None:
    if not np.isfinite(column(records, "tokens_per_second")).any():
        return None
    caption = (
        "Tokens per second in each step; the dashed line is the median. The first step includes compilation, and "
        "regular dips are pauses such as checkpoints; a slope means that something leaks or throttles."
    )
    return Picture("throughput", "Throughput", caption, functools.partial(_draw_throughput, records))


def _draw_throughput(records: Records, theme: Theme) -> "Figure":
    steps_n, rate_n = column(records, "step"), column(records, "tokens_per_second")
    finite_n = rate_n[np.isfinite(rate_n)]
    median = float(np.median(finite_n))
    figure, axes = plain_figure(theme, height=3.2)
    _draw_series(axes, steps_n, rate_n, theme, label="running mean")
    axes.axhline(median, color=theme.accent, linewidth=1.2, linestyle=(0, (4, 3)), label=f"median {median:,.0f}")
    axes.set(xlabel="step", ylabel="tokens per second", ylim=(0, 1.15 * np.quantile(finite_n, 0.99)))
    axes.yaxis.set_major_formatter(short_number)
    add_legend(axes, theme, loc="lower right")
    return figure


def _dropped(records: Records) -> Picture | None:
    steps_n, share_n = dropped_share(records)
    if not len(steps_n):
        return None
    caption = (
        "Share of the router's (token, expert) assignments dropped because the expert's capacity was full. It should "
        "fall as the router balances its load; a dispatch without capacity keeps it at zero."
    )
    return Picture("dropped_tokens", "Dropped tokens", caption, functools.partial(_draw_dropped, steps_n, share_n))


def _draw_dropped(steps_n: Floats, share_n: Floats, theme: Theme) -> "Figure":
    from matplotlib.ticker import PercentFormatter

    figure, axes = plain_figure(theme, height=2.8)
    _draw_series(axes, steps_n, share_n, theme, label=f"running mean; whole run {share_n.mean():.2%}")
    axes.set(xlabel="step", ylabel="dropped", ylim=(0, max(0.01, 1.05 * share_n.max())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    add_legend(axes, theme)
    return figure


# What rounding costs


def _rounding(records: Records) -> Picture | None:
    measured = [r for r in records if r.get("gradient_cosine")]
    if not measured:
        return None
    caption = (
        "Faint: the cosine between each layer's gradient with rounded operands and without; strong: the layer where it "
        "is least; coloured: the largest share of an operand's numbers that rounding turned into 0. A falling cosine "
        "or a rising share means that gradients die."
    )
    return Picture("rounding", "Rounding", caption, functools.partial(_draw_rounding, measured))


def _draw_rounding(measured: Records, theme: Theme) -> "Figure":
    figure, axes = plain_figure(theme, height=3.2)
    steps_n = column(measured, "step")
    axes.plot(steps_n, [r["gradient_cosine"] for r in measured], color=theme.faint, linewidth=0.8)
    axes.plot(steps_n, column(measured, "least_cosine"), ".-", color=theme.strong, label="least cosine of a layer")
    axes.plot(steps_n, column(measured, "most_flushed"), ".-", color=theme.accent, label="most numbers flushed to 0")
    axes.set(xlabel="step", ylim=(min(0.0, np.nanmin(column(measured, "least_cosine"))), 1.02))
    add_legend(axes, theme, loc="lower right")
    return figure


# Expert load


def _expert_load(records: Records) -> Picture | None:
    routed = [r for r in records if r.get("expert_load")]
    if not routed:
        return None
    recent = routed[-max(1, len(routed) // 10) :]
    span = np.array([recent[0]["step"], recent[-1]["step"] + 1], np.float64)
    loads = [load_over_even(recent, layer, span)[:, 0] for layer in range(len(recent[0]["expert_load"]))]
    layer = int(np.argmax([load.max() for load in loads]))
    idle = sum(int((load == 0).sum()) for load in loads)
    caption = (
        "One panel per MoE layer, counted from the input side; one row per expert. The background's colour is an even "
        "share, orange more, blue less; a row that stays strongly coloured is an expert that is not balanced. "
        f"In the last tenth of the run the fullest expert got {loads[layer].max():.2f} times an even share (layer "
        f"{layer}, expert {int(loads[layer].argmax())}), and {idle} of {sum(map(len, loads))} experts got nothing."
    )
    return Picture("expert_load", "Expert load", caption, functools.partial(_draw_load, routed))


def _draw_load(routed: Records, theme: Theme) -> "Figure":
    layers = len(routed[0]["expert_load"])
    across = 1 if layers == 1 else 2 if layers <= 8 else 4 if layers <= 24 else 5
    down = math.ceil(layers / across)
    experts = len(routed[0]["expert_load"][0])
    panel = min(2.5, max(1.5 if layers <= 8 else 0.95, 0.25 + experts / 110))  # inches; one dot per expert, up to 250
    figure = bare_figure(theme, height=0.8 + down * panel)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    columns = min(MAX_COLUMNS // across, len(routed))
    edges_c = np.linspace(routed[0]["step"], routed[-1]["step"] + 1, columns + 1)
    image = None
    for layer, axes in enumerate(grid.flat):
        if layer < layers:
            image = _draw_layer(axes, load_over_even(routed, layer, edges_c), edges_c, theme)
            axes.set_title(f"layer {layer}", fontsize=8, color=theme.ink, loc="left", pad=2)
        else:
            axes.set_visible(False)
    figure.supxlabel("step", fontsize=10, color=theme.ink)
    figure.supylabel("expert", fontsize=10, color=theme.ink)
    _draw_scale(figure, image, grid, theme)
    return figure


def _draw_layer(axes: "Axes", load_ec: Floats, edges_c: Floats, theme: Theme) -> Any:
    """Load on a logarithmic colour scale, so that half and twice an even share are equally far from even."""
    from matplotlib.colors import LinearSegmentedColormap

    octaves_ec = np.log2(np.maximum(load_ec, 2.0**-OCTAVES / 2))
    extent = (edges_c[0], edges_c[-1], -0.5, len(load_ec) - 0.5)
    colours = LinearSegmentedColormap.from_list("loads", theme.loads)
    image = axes.imshow(octaves_ec, cmap=colours, extent=extent, origin="lower", aspect="auto")
    image.set_clim(-OCTAVES, OCTAVES)
    style_axes(axes, theme, grid=False)
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="both", nbins=4, integer=True)
    return image


def _draw_scale(figure: "Figure", image: Any, grid: NDArray[Any], theme: Theme) -> None:
    shrink = min(1.0, 3.0 / figure.get_figheight())
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=shrink, pad=0.015, aspect=30)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "even", "2×", "4×"])
    bar.ax.tick_params(labelsize=8, colors=theme.ink)
    bar.outline.set_visible(False)


# What the pictures share


def bare_figure(theme: Theme, *, height: float) -> "Figure":
    """A figure without axes, as wide as the page and `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, layout="constrained", facecolor=theme.ground)


def plain_figure(theme: Theme, *, height: float) -> tuple["Figure", "Axes"]:
    """A figure of one panel with grid lines."""
    figure = bare_figure(theme, height=height)
    axes = figure.subplots()
    style_axes(axes, theme, grid=True)
    return figure, axes


def style_axes(axes: "Axes", theme: Theme, *, grid: bool) -> None:
    """Colours of a panel; without frame, and with grid lines or a filled ground."""
    axes.set_facecolor(theme.ground if grid else theme.grid)
    axes.tick_params(colors=theme.ink, labelsize=9, length=0 if grid else 2)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.spines[:].set_visible(False)
    if grid:
        axes.grid(color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)


def _draw_series(axes: "Axes", x_n: Floats, y_n: Floats, theme: Theme, *, label: str) -> Floats:
    """Draws each record faintly and the running mean strongly; returns the mean."""
    mean_n = running_mean(y_n)
    marker = "o" if len(y_n) == 1 else None  # a line through one point is invisible
    axes.plot(x_n, y_n, color=theme.faint, linewidth=0.8)
    axes.plot(x_n, mean_n, color=theme.strong, linewidth=1.8, marker=marker, label=label)
    return mean_n


def add_legend(axes: "Axes", theme: Theme, *, loc: Corner = "upper right") -> None:
    """The legend of a panel."""
    axes.legend(loc=loc, fontsize=9, labelcolor=theme.ink, facecolor=theme.ground, edgecolor=theme.grid, framealpha=0.9)
