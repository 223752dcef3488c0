"""Measures pipeline schedules from their tables, writes results.jsonl, and draws every figure from that file alone."""

import hashlib
import json
import pathlib
from fractions import Fraction
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from orogen.parallel.schedule import FORWARD, IDLE, Schedule, make_schedule
from orogen.report.pictures import LIGHT
from orogen.simulate.timeline import Work, lockstep_time, timeline

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results.jsonl"
KINDS = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4))
STAGES, MICROBATCHES = (2, 4, 8), (8, 16, 32, 64)
HOPS = (0.05, 0.1, 0.2)  # of a stage's forward pass
DRAWN = {"stages": 4, "microbatches": 8}  # as in the figures of arXiv:2104.04473

# By chunk, dark to light: forward blue, backward orange.
FORWARD_COLOURS = (LIGHT.strong, LIGHT.faint)
BACKWARD_COLOURS = (LIGHT.accent, "#f3b48f")
KIND_COLOURS = {"gpipe": "#6b7280", "1f1b": LIGHT.strong, "interleaved 2": LIGHT.accent, "interleaved 4": "#15803d"}
KIND_MARKERS = {"gpipe": "s", "1f1b": "o", "interleaved 2": "^", "interleaved 4": "D"}

Run = dict[str, Any]


def measure(kind: str, virtual: int, stages: int, microbatches: int) -> Run:
    """One run. The unit of time is a stage's forward pass; a chunk takes 1 / virtual of it, a backward pass twice
    that."""
    setting = {"schedule": kind, "virtual": virtual, "stages": stages, "microbatches": microbatches}
    schedule = make_schedule(kind, stages=stages, microbatches=microbatches, virtual=virtual)
    chunk = Fraction(1, virtual)
    ideal = 3 * microbatches
    formula = Fraction(stages - 1, virtual * microbatches)
    free = max(work.end for work in timeline(schedule, forward=float(chunk)))
    run = {
        "config": hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:12],
        **setting,
        "ticks": schedule.ticks,
        "bubble": str(schedule.bubble),
        "formula": str(formula),
        "bubble_backward_twice": free / ideal - 1,
        "lockstep": lockstep_time(schedule, forward=float(chunk)) / ideal - 1,
        "with_hops": {hop: _end(schedule, chunk, hop) / ideal - 1 for hop in HOPS},
        "in_flight": schedule.in_flight,
        "stash_slots": schedule.stash_slots,
        "inbox_slots": [schedule.forward_slots, schedule.backward_slots],
    }
    if {"stages": stages, "microbatches": microbatches} == DRAWN and virtual <= 2:
        run["work_ticks"] = _cells(schedule)
        run["work_backward_twice"] = timeline(schedule, forward=float(chunk))
    return run


def _cells(schedule: Schedule) -> list[Work]:
    """The table's entries as passes of one tick each."""
    operation_ts, microbatch_ts, chunk_ts = (table.tolist() for table in schedule.tables[:3])
    return [
        Work(stage, operation_ts[t][stage], microbatch_ts[t][stage], chunk_ts[t][stage], t, t + 1)
        for t in range(schedule.ticks)
        for stage in range(schedule.stages)
        if operation_ts[t][stage] != IDLE
    ]


def _end(schedule: Schedule, chunk: Fraction, hop: float) -> float:
    return max(work.end for work in timeline(schedule, forward=float(chunk), hop=hop))


def name_of(run: Run) -> str:
    return run["schedule"] + (f" {run['virtual']}" if run["virtual"] > 1 else "")


def draw_timelines(runs: list[Run], field: str, *, unit: str, xlabel: str, path: pathlib.Path) -> None:
    """One panel per schedule, one row per stage, one cell per pass with the number of its microbatch."""
    drawn = [run for run in runs if field in run]
    longest = max(work[5] for run in drawn for work in run[field])
    figure = Figure(figsize=(13, 2.0 * len(drawn) + 0.9), dpi=150, layout="constrained")
    panels = figure.subplots(len(drawn), 1, sharex=True)
    for axes, run in zip(panels, drawn, strict=True):
        for stage, operation, microbatch, chunk, start, end in run[field]:
            colours = FORWARD_COLOURS if operation == FORWARD else BACKWARD_COLOURS
            axes.barh(stage, end - start, left=start, height=0.94, color=colours[chunk], edgecolor="white", linewidth=1)
            ink = "white" if chunk == 0 else LIGHT.ink
            size = 8 if longest < 40 * (end - start) else 6.5
            axes.text((start + end) / 2, stage, microbatch + 1, ha="center", va="center", fontsize=size, color=ink)
        held = [f"{count / run['virtual']:g}" for count in run["in_flight"]]
        axes.set_yticks(range(len(held)), [f"stage {stage}, holds {count}" for stage, count in enumerate(held)])
        axes.invert_yaxis()
        end = max(work[5] for work in run[field])
        title = f"{_long_name(run)}: {end:g} {unit}, bubble {run['bubble']}"
        axes.set_title(title, loc="left", fontsize=10, color=LIGHT.ink)
        axes.axvspan(end, 2 * longest, color="white", zorder=0)  # the time after the step is not idle
        axes.axvline(end, color=LIGHT.ink, linewidth=1, linestyle=(0, (3, 2)))
        _style(axes)
        axes.set_facecolor("#eef0f3")
        axes.set_xlim(0, longest * 1.005)
    panels[-1].set_xlabel(xlabel, color=LIGHT.ink)
    handles = [
        Patch(color=colour, label=label)
        for colour, label in (
            (FORWARD_COLOURS[0], "forward"),
            (BACKWARD_COLOURS[0], "backward"),
            (FORWARD_COLOURS[1], "forward, second chunk"),
            (BACKWARD_COLOURS[1], "backward, second chunk"),
            ("#eef0f3", "idle"),
        )
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=5, frameon=False, fontsize=9, labelcolor=LIGHT.ink)
    figure.savefig(path)


def _long_name(run: Run) -> str:
    names = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": f"Interleaved 1F1B, {run['virtual']} chunks per stage"}
    return names[run["schedule"]]


def draw_summary(runs: list[Run], path: pathlib.Path) -> None:
    """Bubbles against their formula, activations held by each stage, and the cost of lockstep, for eight stages."""
    eight = [run for run in runs if run["stages"] == max(STAGES)]
    figure = Figure(figsize=(13, 4.3), dpi=150, layout="constrained")
    bubbles, held, lockstep = figure.subplots(1, 3)
    fine_m = np.geomspace(min(MICROBATCHES), max(MICROBATCHES), 100)
    for name, colour in KIND_COLOURS.items():
        mine = [run for run in eight if name_of(run) == name]
        count_m = [run["microbatches"] for run in mine]
        look = {"color": colour, "marker": KIND_MARKERS[name], "label": name}
        if name != "gpipe":  # the same as 1f1b
            bubbles.plot(fine_m, (max(STAGES) - 1) / mine[0]["virtual"] / fine_m, color=colour, linewidth=1)
        hollow: Run = {"markerfacecolor": "none", "markersize": 11} if name == "gpipe" else {}
        bubbles.plot(count_m, [float(Fraction(run["bubble"])) for run in mine], linestyle="none", **look, **hollow)
        hollow |= {"linewidth": 1.4}
        lockstep.plot(count_m, [run["lockstep"] for run in mine], **look, **hollow)
        most = next(run for run in mine if run["microbatches"] == 32)
        held.plot([count / most["virtual"] for count in most["in_flight"]], linewidth=1.4, **look)
    bubbles.set_title(
        f"Idle over busy ticks, {max(STAGES)} stages; lines: (p − 1)/(v m)", loc="left", fontsize=10, color=LIGHT.ink
    )
    lockstep.set_title("Overhead if every tick waits for all stages", loc="left", fontsize=10, color=LIGHT.ink)
    for axes in (bubbles, lockstep):
        axes.set_xscale("log", base=2)
        axes.set_xticks(MICROBATCHES, [str(count) for count in MICROBATCHES])
        axes.set(xlabel="microbatches", ylim=(0, 1.3))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    held.set_title(f"Peak of microbatches held, of 32, {max(STAGES)} stages", loc="left", fontsize=10, color=LIGHT.ink)
    held.set(xlabel="stage", ylim=(0, 34))
    held.set_xticks(range(max(STAGES)))
    for axes in (bubbles, held, lockstep):
        axes.grid(color=LIGHT.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.label.set_color(LIGHT.ink)
        _style(axes)
    bubbles.legend(edgecolor="white", framealpha=1, fontsize=9, labelcolor=LIGHT.ink)
    figure.savefig(path)


def _style(axes: Axes) -> None:
    axes.tick_params(colors=LIGHT.ink, labelsize=9, length=0)
    axes.spines[:].set_visible(False)


def print_table(runs: list[Run]) -> None:
    hops = " | ".join(f"hop {hop}" for hop in HOPS)
    print(f"| schedule | p | m | v | ticks | bubble | formula | backward twice | lockstep | {hops} | held per stage |")
    print("|---" * (10 + len(HOPS)) + "|")
    for run in runs:
        held = " ".join(f"{count / run['virtual']:g}" for count in run["in_flight"])
        size = f"{run['stages']} | {run['microbatches']} | {run['virtual']} | {run['ticks']}"
        overheads = (run["bubble_backward_twice"], run["lockstep"], *run["with_hops"].values())
        cells = " | ".join(f"{overhead:.3f}" for overhead in overheads)
        print(f"| {run['schedule']} | {size} | {run['bubble']} | {run['formula']} | {cells} | {held} |")


def main() -> None:
    settings = [(*kind, p, m) for p in STAGES for m in MICROBATCHES for kind in KINDS]
    RESULTS.write_text("".join(json.dumps(measure(*setting)) + "\n" for setting in settings))
    runs = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    ticks = "tick: one pass of a chunk (half a stage where a stage has two chunks); microbatches are counted from 1"
    draw_timelines(runs, "work_ticks", unit="ticks", xlabel=ticks, path=HERE / "ticks.png")
    times = "time, in forward passes of a stage; backward takes twice as long as forward; stages wait only for data"
    draw_timelines(runs, "work_backward_twice", unit="units", xlabel=times, path=HERE / "timelines.png")
    draw_summary(runs, HERE / "figure.png")
    print_table(runs)


if __name__ == "__main__":
    main()
