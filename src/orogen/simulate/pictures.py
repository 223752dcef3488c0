"""The pictures of a predicted step: its timeline, where its time and its memory go, the roofline of each layer, how it
scales, and how it compares with other plans.

Every figure is drawn once, in the light theme; `report.svg` makes it follow the page's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from orogen.parallel.schedule import FORWARD
from orogen.report.pictures import LIGHT, bare_figure, plain_figure, style_axes
from orogen.report.series import short_number
from orogen.simulate.hardware import GIB
from orogen.simulate.prediction import MEMORY_PARTS, TIME_PARTS, Prediction, Roofline
from orogen.simulate.timeline import Work

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PASSES = 1600  # of a picture: more would be too narrow to see, and too many elements for a browser
# Of categories; each is legible on a light and on a dark ground.
COLOURS = ("#3a7fcd", "#e2773c", "#3f9e6d", "#8d6cc4", "#c9a227", "#c75b7a", "#5aa7b5", "#8a8f98", "#7a5c43",
           "#7d9a2e")  # fmt: skip
QUIET = "#8a8f98"
FORWARD_COLOUR, BACKWARD_COLOUR = COLOURS[0], COLOURS[1]
LEAST = 0.002  # operations of less than this share of the time of all are left out of the roofline

Tips = dict[str, str]


class Drawn(NamedTuple):
    """A figure; the caption says how to read it. tips: by an artist's gid, the text under the pointer."""

    name: str
    heading: str
    caption: str
    figure: "Figure"
    tips: Tips


class Scaled(NamedTuple):
    """A prediction on more or fewer devices. kind: `weak` (the batch grows with the devices) or `strong` (it does
    not)."""

    kind: str
    devices: int
    tokens_per_second: float


class Candidate(NamedTuple):
    """Another plan for the same run. name: the fields in which it differs from the default."""

    name: str
    memory_bytes: float
    tokens_per_second: float
    chosen: bool


def pictures(
    prediction: Prediction, scaled: Sequence[Scaled] = (), candidates: Sequence[Candidate] = ()
) -> list[Drawn]:
    """All pictures that there are numbers for, in reading order."""
    drawn = [draw_time(prediction), draw_memory(prediction), draw_roofline(prediction)]
    if len({work.stage for work in prediction.timeline}) > 1:
        drawn.insert(0, draw_timeline(prediction.timeline))
    if scaled:
        drawn.append(draw_scaling(scaled, prediction))
    if candidates:
        drawn.append(draw_front(candidates, prediction.memory_limit_bytes))
    return drawn


def draw_timeline(works: Sequence[Work]) -> Drawn:
    """Each stage's passes over time; a long step shows only its beginning and its end."""
    stages = 1 + max(work.stage for work in works)
    end = max(work.end for work in works)
    windows = [(0.0, end)]
    if len(works) > MAX_PASSES:
        width = end * MAX_PASSES / len(works) / 2
        windows = [(0.0, width), (end - width, end)]
    figure = bare_figure(LIGHT, height=min(9.0, 1.6 + 0.24 * stages))
    tips: Tips = {}
    panels = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    for index, (axes, window) in enumerate(zip(panels, windows, strict=True)):
        style_axes(axes, LIGHT, grid=False)
        for work in works:
            if work.end > window[0] and work.start < window[1]:
                tips |= _draw_pass(axes, work, f"pass-{index}-{len(tips)}")
        axes.set(xlim=[1e3 * t for t in window], ylim=(stages - 0.4, -0.6), xlabel="ms from the start of the step")
        axes.locator_params(axis="y", integer=True)
    panels[0].set_ylabel("stage")
    _name_colours(figure, {"forward": FORWARD_COLOUR, "backward": BACKWARD_COLOUR})
    caption = "One row per stage; gaps are the bubble, in which a stage waits for another. Point at a pass to read it."
    if len(windows) > 1:
        caption += f" Of {len(works):,} passes, only those of the first and the last {1e3 * width:,.0f} ms are drawn."
    return Drawn("timeline", "Timeline of the pipeline", caption, figure, tips)


def _draw_pass(axes: "Axes", work: Work, gid: str) -> Tips:
    from matplotlib.patches import Rectangle

    forward = work.operation == FORWARD
    colour = FORWARD_COLOUR if forward else BACKWARD_COLOUR
    start, span = 1e3 * work.start, 1e3 * (work.end - work.start)
    alpha = 1.0 if work.chunk % 2 == 0 else 0.6  # chunks alternate, so that neighbours can be told apart
    patch = Rectangle((start, work.stage - 0.42), span, 0.84, color=colour, alpha=alpha, linewidth=0, gid=gid)
    axes.add_patch(patch)
    name = "forward" if forward else "backward"
    where = f"stage {work.stage}, chunk {work.chunk}, microbatch {work.microbatch}"
    return {gid: f"{name}: {where}, {start:,.2f} to {start + span:,.2f} ms"}


def draw_time(prediction: Prediction) -> Drawn:
    """Where the time of a step goes on the stage that is busy longest."""
    parts = {part: prediction.seconds.get(part, 0.0) for part in TIME_PARTS}
    figure, axes = plain_figure(LIGHT, height=1.7)
    tips = _stack(axes, "step", {part: 1e3 * seconds for part, seconds in parts.items()}, "{:,.1f} ms")
    axes.set(xlabel="ms", yticks=[], xlim=(0, 1e3 * prediction.step_seconds))
    _name_colours(figure, _used(parts))
    caption = (
        "Of the stage that is busy longest. tensor, context, expert, data and stage are communication beside which "
        "nothing is computed; communication that is hidden takes no time here. host is where the devices wait for the "
        "program that launches their work."
    )
    return Drawn("time", "Where a step's time goes", caption, figure, tips)


def draw_memory(prediction: Prediction) -> Drawn:
    """Bytes of one device of each stage, by what they hold."""
    stages = prediction.memory
    figure, axes = plain_figure(LIGHT, height=min(9.0, 1.7 + 0.26 * len(stages)))
    tips: Tips = {}
    for row, stage in enumerate(stages):
        sizes = {part: stage.parts.get(part, 0.0) / GIB for part in MEMORY_PARTS}
        tips |= _stack(axes, f"stage {stage.stage}", sizes, "{:,.2f} GiB", row=row)
    limit = prediction.memory_limit_bytes / GIB
    axes.axvline(limit, color=LIGHT.ink, linewidth=1.2, linestyle=(0, (4, 3)))
    fullest = max(prediction.device_memory_bytes / GIB, limit)
    axes.set(xlabel="GiB", ylabel="stage", xlim=(0, 1.04 * fullest), ylim=(len(stages) - 0.4, -0.6))
    axes.set_yticks(range(0, len(stages), max(1, len(stages) // 16)))
    used = {part: max(stage.parts.get(part, 0.0) for stage in stages) for part in MEMORY_PARTS}
    _name_colours(figure, _used(used))
    caption = f"One device of each stage; the dashed line is what a device has, {limit:,.0f} GiB."
    if host := max(stage.host for stage in stages):
        caption += f" The host of a device holds up to {host / GIB:,.1f} GiB besides."
    return Drawn("memory", "Memory by stage", caption, figure, tips)


def _stack(axes: "Axes", name: str, sizes: Mapping[str, float], unit: str, *, row: int = 0) -> Tips:
    """A bar of parts; zero parts have no rectangle."""
    tips: Tips = {}
    left = 0.0
    for colour, (part, size) in zip(COLOURS, sizes.items(), strict=False):
        if size > 0:
            gid = f"{name}-{part}".replace(" ", "-")
            axes.barh(row, size, left=left, height=0.8, color=colour, linewidth=0)[0].set_gid(gid)
            tips[gid] = f"{name}, {part}: {unit.format(size)}"
            left += size
    return tips


def _used(parts: Mapping[str, float]) -> dict[str, str]:
    """The colours of parts that are not zero."""
    return {part: colour for colour, (part, size) in zip(COLOURS, parts.items(), strict=False) if size > 0}


def draw_roofline(prediction: Prediction) -> Drawn:
    """Each operation's FLOP/s against its FLOPs per byte, below what the device can do."""
    whole = sum(line.seconds * line.count for line in prediction.rooflines)
    lines = [line for line in prediction.rooflines if line.flops > 0 and line.bytes > 0]
    lines = [line for line in lines if line.seconds * line.count >= LEAST * whole]
    units = list(dict.fromkeys(line.unit for line in lines))
    colours = dict(zip(units, COLOURS, strict=False))
    figure, axes = plain_figure(LIGHT, height=4.6)
    tips: Tips = {}
    for index, line in enumerate(lines):
        gid, share = f"roofline-{index}", line.seconds * line.count / whole
        x, y = line.flops / line.bytes, line.flops / line.seconds / 1e12
        size = 14 + 900 * share
        axes.scatter([x], [y], s=size, color=colours.get(line.unit, QUIET), alpha=0.75, linewidths=0, gid=gid)
        tips[gid] = _roofline_tip(line, share)
    _draw_ceilings(axes, lines)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s")
    _name_colours(figure, colours)
    caption = (
        "One dot per operation and pass, its area its share of the time; below the slope the memory limits it, below "
        "the flat line the arithmetic. Lines are the fastest that any operation here is predicted to reach."
    )
    return Drawn("roofline", "Roofline by layer", caption, figure, tips)


def _draw_ceilings(axes: "Axes", lines: Sequence[Roofline]) -> None:
    flops = max((line.flops / line.compute_seconds for line in lines if line.compute_seconds > 0), default=0.0)
    bandwidth = max((line.bytes / line.memory_seconds for line in lines if line.memory_seconds > 0), default=0.0)
    if flops and bandwidth:
        low, high = (edge(line.flops / line.bytes for line in lines) for edge in (min, max))
        ridge = flops / bandwidth
        xs = [min(low, ridge) / 2, ridge, max(high, ridge) * 2]
        axes.plot(xs, [min(flops, bandwidth * x) / 1e12 for x in xs], color=LIGHT.ink, linewidth=1.2, zorder=0)


def _roofline_tip(line: Roofline, share: float) -> str:
    numbers = f"{line.flops / 1e9:,.1f} GFLOP, {line.bytes / 1e6:,.1f} MB, {1e3 * line.seconds:,.3f} ms"
    times = f"{line.count:g} times per step"
    return f"{line.unit} {line.operation}, {line.phase}: {numbers}, {line.bound} bound; {times}, {share:.1%} of all"


def draw_scaling(scaled: Sequence[Scaled], prediction: Prediction) -> Drawn:
    """Tokens per second and device, on more devices."""
    figure, axes = plain_figure(LIGHT, height=3.6)
    tips: Tips = {}
    colours = {"weak": FORWARD_COLOUR, "strong": BACKWARD_COLOUR}
    for kind, colour in colours.items():
        points = sorted(
            (point.devices, point.tokens_per_second / point.devices) for point in scaled if point.kind == kind
        )
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6)
        for devices, rate in points:
            gid = f"scaling-{kind}-{devices}"
            axes.scatter([devices], [rate], s=26, color=colour, gid=gid)
            tips[gid] = f"{kind}, {devices:,} devices: {rate:,.0f} tokens/s per device, {devices * rate:,.0f} in all"
    axes.axhline(prediction.tokens_per_second_per_device, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
    counts = sorted({point.devices for point in scaled})
    axes.set(xscale="log", xlabel="devices", ylabel="tokens/s per device", ylim=(0, None))
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(short_number)
    _name_colours(figure, {f"{kind} scaling": colour for kind, colour in colours.items()})
    caption = (
        "More data-parallel ranks. weak: the batch grows with the devices. strong: the batch stays, so each rank has "
        "fewer microbatches. The dashed line is this plan's rate, which ideal scaling would keep."
    )
    return Drawn("scaling", "Scaling", caption, figure, tips)


def draw_front(candidates: Sequence[Candidate], limit: float) -> Drawn:
    """Rate against memory; the front has the plans of which no other is both faster and smaller."""
    figure, axes = plain_figure(LIGHT, height=4.0)
    tips: Tips = {}
    front = pareto(candidates)
    for index, plan in enumerate(candidates):
        gid = f"plan-{index}"
        colour = LIGHT.accent if plan.chosen else COLOURS[0] if plan in front else QUIET
        place = [plan.memory_bytes / GIB], [plan.tokens_per_second]
        axes.scatter(*place, s=70 if plan.chosen else 24, color=colour, marker="*" if plan.chosen else "o", gid=gid)
        tips[gid] = f"{plan.name}: {plan.memory_bytes / GIB:,.1f} GiB, {plan.tokens_per_second:,.0f} tokens/s"
    steps = [(plan.memory_bytes / GIB, plan.tokens_per_second) for plan in front]
    axes.step(*zip(*steps, strict=True), where="post", color=COLOURS[0], linewidth=1.2, zorder=0)
    axes.axvline(limit / GIB, color=LIGHT.ink, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set(xlabel="GiB of the fullest device", ylabel="tokens/s", xlim=(0, None))
    axes.set_ylim(0, 1.08 * max(plan.tokens_per_second for plan in candidates))
    axes.yaxis.set_major_formatter(short_number)
    colours = {"this plan": LIGHT.accent, "no other is both faster and smaller": COLOURS[0], "others": QUIET}
    _name_colours(figure, colours)
    caption = "Plans that the search found for as many devices; the dashed line is what a device has."
    return Drawn("front", "Speed against memory", caption, figure, tips)


def pareto(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates of which no other is both faster and smaller, from the smallest to the fastest."""
    front: list[Candidate] = []
    smallest_first: Callable[[Candidate], Any] = lambda plan: (plan.memory_bytes, -plan.tokens_per_second)  # noqa: E731
    for plan in sorted(candidates, key=smallest_first):
        if not front or plan.tokens_per_second > front[-1].tokens_per_second:
            front.append(plan)
    return front


def _name_colours(figure: "Figure", colours: Mapping[str, str]) -> None:
    """A legend above the panels."""
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    columns = min(len(handles), 7)
    figure.legend(
        handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=LIGHT.ink
    )
