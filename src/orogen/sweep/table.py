"""The table and the picture of a sweep, drawn from its results alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orogen.config.files import write_atomically
from orogen.config.sweep import SweepConfig, arm_name
from orogen.report.pictures import LIGHT, png
from orogen.report.series import short_number
from orogen.sweep.effects import CONFIDENCE, MOST_PAIRS, Effect, main_effects, paired
from orogen.sweep.results import numbers_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = Mapping[tuple[str, ...], Mapping[int, float]]


class Row(NamedTuple):
    """One arm: its results by seed, and its effect against the control, None for the control itself and for an arm that
    shares no seed with it."""

    values: tuple[str, ...]
    results: Mapping[int, Mapping[str, Any]]
    effect: Effect | None

    @property
    def name(self) -> str:
        """The arm's name."""
        return arm_name(self.values)

    @property
    def metric_n(self) -> np.ndarray:
        """The metric of each seed."""
        return np.array([result["value"] for result in self.results.values()], np.float64)


def compared(
    sweep: SweepConfig, results: Mapping[tuple[str, ...], Mapping[int, Mapping[str, Any]]], number: str | None = None
) -> list[Row]:
    """A row per arm that has a result, the control first. results: by the arm's values, by seed. number: the one that
    is compared; None: the metric."""
    if number is not None:
        results = {
            arm: {seed: {**result, "value": numbers_of(result)[number]} for seed, result in by_seed.items()}
            for arm, by_seed in results.items()
        }
    values = values_of(results)
    control = values.get(sweep.control, {})
    arms = sorted(results, key=lambda arm: arm != sweep.control)
    return [
        Row(arm, results[arm], None if arm == sweep.control else paired(values[arm], control))
        for arm in arms if results[arm]
    ]  # fmt: skip


def values_of(results: Mapping[tuple[str, ...], Mapping[int, Mapping[str, Any]]]) -> Values:
    """The metric alone, by arm and seed."""
    return {arm: {seed: r["value"] for seed, r in by_seed.items()} for arm, by_seed in results.items()}


def markdown(sweep: SweepConfig, table: Sequence[Row]) -> str:
    """The table; below it the main effects if the matrix has several axes, and a table of each further number."""
    control = arm_name(sweep.control)
    lines = [
        f"| arm | parameters | steps | tokens | FLOPs | learning rate | {sweep.metric}, mean ± sd (seeds) "
        f"| difference from {control} [{CONFIDENCE:.0%}] | detectable | seeds to tell | verdict | seconds |",
        "|---" * 12 + "|",
    ]
    for row in table:
        one = next(iter(row.results.values()))
        cells = [
            row.name, short_number(one["parameters"]), f"{one['steps']:,}", short_number(one["tokens"]),
            f"{one['flops']:.3g}", f"{one['learning_rate']:g}", _mean(row), *_cells(row.effect, _better(sweep)),
            f"{math.fsum(r['seconds'] for r in row.results.values()):.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += _main_lines(sweep, table)
    done = {row.values: row.results for row in table}
    for number in sweep.further:
        lines += _further_lines(number, control, compared(sweep, done, number))
    return "\n".join(lines) + "\n"


def _further_lines(number: str, control: str, table: Sequence[Row]) -> list[str]:
    """The table of a further number; its verdicts are `lower` and `higher`, since no field says which is better."""
    head = f"| arm | {number}, mean ± sd (seeds) | difference from {control} [{CONFIDENCE:.0%}] "
    lines = ["", f"{head}| detectable | seeds to tell | verdict |", "|---" * 6 + "|"]
    for row in table:
        lines.append("| " + " | ".join([row.name, _mean(row), *_cells(row.effect, ("lower", "higher"))]) + " |")
    return lines


def _mean(row: Row) -> str:
    spread = f" ± {row.metric_n.std(ddof=1):.4f}" if len(row.metric_n) > 1 else ""
    return f"{row.metric_n.mean():.4f}{spread} ({len(row.metric_n)})"


def _main_lines(sweep: SweepConfig, table: Sequence[Row]) -> list[str]:
    if len(sweep.matrix) < 2:
        return []
    values = values_of({row.values: row.results for row in table})
    axes = list(sweep.matrix)
    lines = [
        "",
        f"| main effect, all else equal | difference [{CONFIDENCE:.0%}] | detectable | seeds to tell | verdict |",
        "|---" * 5 + "|",
    ]
    for (axis, value), effect in main_effects(values, sweep.control).items():
        name = f"{axes[axis]}: {value} against {sweep.control[axis]}"
        lines.append("| " + " | ".join([name, *_cells(effect, _better(sweep))]) + " |")
    return lines


def _better(sweep: SweepConfig) -> tuple[str, str]:
    """What a negative and a positive difference mean."""
    return ("better", "worse") if sweep.lower_is_better else ("worse", "better")


def _cells(effect: Effect | None, words: tuple[str, str]) -> list[str]:
    """Difference, detectable difference, needed seeds and verdict. words: for a negative and a positive difference."""
    if effect is None:
        return ["–", "–", "–", "–"]
    if not math.isfinite(effect.low):
        return [f"{effect.difference:+.4f} [one pair]", "–", "–", "cannot be told"]
    interval = f"{effect.difference:+.4f} [{effect.low:+.4f}, {effect.high:+.4f}]"
    needed = f"{effect.needed:.0f}" if math.isfinite(effect.needed) else f"over {MOST_PAIRS:,}"
    verdict = "cannot be told" if effect.sign == 0 else words[effect.sign > 0]
    return [interval, f"{effect.detectable:.4f}", needed, verdict]


def draw(path: Path, sweep: SweepConfig, table: Sequence[Row]) -> None:
    """Writes a PNG, with two panels per number: left each seed's by arm, right the differences from the control with
    their intervals."""
    from matplotlib.figure import Figure

    done, count = {row.values: row.results for row in table}, len(sweep.numbers)
    figure = Figure(figsize=(10, (1.4 + 0.42 * len(table)) * count), dpi=130, layout="constrained")
    better = "lower" if sweep.lower_is_better else "higher"
    panels = figure.subplots(count, 2, sharey=True, squeeze=False)
    for number, (left, right) in zip(sweep.numbers, panels, strict=True):
        label = f"{number} ({better} is better)" if number == sweep.metric else number
        _draw_number(left, right, compared(sweep, done, number), label)
        right.set(xlabel=f"difference from {arm_name(sweep.control)}, paired by seed, {CONFIDENCE:.0%} interval")
    write_atomically(path, png(figure))


def _draw_number(left: "Axes", right: "Axes", table: Sequence[Row], label: str) -> None:
    heights = np.arange(len(table))[::-1]
    for place, row in zip(heights, table, strict=True):
        left.plot(row.metric_n, [place] * len(row.metric_n), "o", color=LIGHT.faint, markersize=6)
        left.plot(row.metric_n.mean(), place, "|", color=LIGHT.strong, markersize=16, markeredgewidth=2)
        if row.effect is not None:
            _draw_effect(right, row.effect, place)
    right.axvline(0, color=LIGHT.ink, linewidth=0.8)
    left.set_yticks(heights, [row.name for row in table])
    left.set(xlabel=f"{label}; | is the mean")
    for axes in (left, right):
        axes.locator_params(axis="x", nbins=5)  # more labels of four decimals overlap
        axes.grid(axis="x", color=LIGHT.grid)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _draw_effect(axes: "Axes", effect: Effect, place: float) -> None:
    if math.isfinite(effect.low):
        axes.plot([effect.low, effect.high], [place, place], color=LIGHT.strong, linewidth=2)
    axes.plot(effect.difference, place, "o", color=LIGHT.accent, markersize=6)
