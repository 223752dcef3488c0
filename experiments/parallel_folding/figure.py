"""The experiment's figure, from the records of results.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orogen.report.pictures import LIGHT, png

Record = Mapping[str, Any]

PALE = "#e9a77f"
MAPPINGS = {"folded": LIGHT.strong, "unfolded": LIGHT.accent, "unfolded, same memory": PALE}
DEVICES = 1024  # the largest number, with which every layout exists


def draw(records: Sequence[Record]) -> bytes:
    figure = Figure(figsize=(13, 9), dpi=110, layout="constrained", facecolor=LIGHT.ground)
    places = figure.subplots(2, 2)
    shown = [r for r in records if r["kind"] == "counted" and r["devices"] == DEVICES]
    _inside(places[0, 0], shown)
    _bytes(places[0, 1], [r for r in shown if r["model"] == "Mixtral-8x22B"])
    _ratios(places[1, 0], shown)
    _published(places[1, 1], [r for r in records if r["kind"] == "published"])
    for axes in places.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=LIGHT.grid)
    return png(figure)


def _dense(record: Record) -> str:
    return f"{record['tensor']}x{record['context']}"


def _inside(axes: Axes, records: Sequence[Record]) -> None:
    """Experts over 8 devices. The title says that no group over more devices fits into a node; this is checked."""
    if any(r["share_in_node"] for r in records if r["split"] > 8):
        raise ValueError("an expert group over more than 8 devices lies in one node; expected none")
    for index, (mapping, colour) in enumerate(MAPPINGS.items()):
        cases = [r for r in records if r["mapping"] == mapping and r["model"] == "Mixtral-8x22B"]
        places = [place + 0.27 * (index - 1) for place in range(len(cases))]
        heights = [100 * r["share_in_node"] for r in cases]
        boxes = axes.bar(places, heights, 0.25, color=colour, label=mapping)
        axes.bar_label(boxes, labels=["" if height else "0" for height in heights], fontsize=9)
    _label(axes, records, "expert groups inside a node of 8, experts over 8 (over 16 and 64: none at all)", "%")
    axes.set_ylim(0, 125)
    axes.set_yticks(range(0, 101, 25))
    axes.legend(fontsize=8, ncols=3, loc="upper center")


def _bytes(axes: Axes, records: Sequence[Record]) -> None:
    for index, (mapping, colour) in enumerate(MAPPINGS.items()):
        cases = [r["capacity_1"] for r in records if r["mapping"] == mapping]
        places = [place + 0.27 * (index - 1) for place in range(len(cases))]
        near, far = ([case[link] / 1e6 for case in cases] for link in ("in_node", "between"))
        axes.bar(places, near, 0.25, color=colour, alpha=0.45, label=f"{mapping}: in the node")
        axes.bar(places, far, 0.25, bottom=near, color=colour, hatch="///", edgecolor="white", label="between nodes")
    _label(axes, records, "Mixtral-8x22B, experts over 8: bytes that a device sends per layer and sequence", "MB")
    axes.set_ylim(0, 540)
    axes.legend(fontsize=8, ncols=3, loc="upper center")


def _ratios(axes: Axes, records: Sequence[Record]) -> None:
    for mapping, line in (("unfolded", "-"), ("unfolded, same memory", "--")):
        for split, marker in ((8, "o"), (64, "s")):
            # All models have the same ratios: every collective sends a fixed multiple of one device's assignments.
            cases = [r for r in records if r["mapping"] == mapping and r["split"] == split]
            cases = [r for r in cases if r["model"] == "Qwen2-57B-A14B"]
            colour = LIGHT.strong if split == 8 else LIGHT.accent
            label = f"{mapping}, experts over {split}"
            heights = [r["over_folded"] for r in cases]
            axes.plot(range(len(cases)), heights, line, marker=marker, color=colour, label=label)
    axes.axhline(1, color=LIGHT.ink, linewidth=0.8)
    axes.set_yscale("log")
    ticks = [1, 2, 5, 10, 20]
    axes.set_yticks(ticks, labels=[f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.9, 45)
    _label(axes, records, "time of the layer's bytes on their links: unfolded / folded, any model", None)
    axes.legend(fontsize=8, ncols=2, loc="upper center")


def _published(axes: Axes, records: Sequence[Record]) -> None:
    bars = (
        (-0.27, lambda r: r["gain_measured"], LIGHT.strong, "measured by the paper"),
        (0.0, lambda r: r["gain_counted"]["copied"], LIGHT.accent, "counted, experts replicated over context"),
        (0.27, lambda r: r["gain_counted"]["spread"], PALE, "counted, experts spread over data x context"),
    )
    for offset, gain, colour, label in bars:
        cases = [(place + offset, gain(r)) for place, r in enumerate(records)]
        drawn = [(place, 100 * value) for place, value in cases if not isinstance(value, str)]
        boxes = axes.bar([p for p, _ in drawn], [v for _, v in drawn], 0.25, color=colour, label=label)
        axes.bar_label(boxes, fmt="%.1f", fontsize=9)
        for place in (p for p, value in cases if isinstance(value, str)):
            axes.text(place, 0.2, "cannot exist", rotation=90, ha="center", va="bottom", fontsize=8, color=colour)
    names = [f"{r['devices']} H100, length {r['length']:,}" for r in records]
    axes.set_xticks(range(len(records)), labels=names, fontsize=8)
    axes.set_ylabel("MFU gain, %")
    axes.set_title("Mixtral-8x22B, the paper's own pairs of plans", fontsize=10, loc="left")
    axes.set_ylim(0, 8.5)
    axes.legend(fontsize=8, loc="upper right")


def _label(axes: Axes, records: Sequence[Record], title: str, unit: str | None) -> None:
    names = list(dict.fromkeys(_dense(r) for r in records))
    axes.set_xticks(range(len(names)), labels=names)
    axes.set_xlabel("tensor x context of the dense layers")
    axes.set_title(title, fontsize=10, loc="left")
    if unit:
        axes.set_ylabel(unit)
