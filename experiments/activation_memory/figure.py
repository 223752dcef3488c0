"""The experiment's figure, from the records of results.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from orogen.report.pictures import LIGHT, png

Record = Mapping[str, Any]

TABLE = ("tensor", "tensor, sequence", "tensor, selective", "tensor, sequence, selective", "full")
SHOWN = (("Nemotron-H 8B", "M"), ("Mamba-1 8B", "m"), ("Nemotron-3 Nano", "E"), ("Nemotron-3 Super", "E"))


def draw(records: Sequence[Record]) -> bytes:
    figure = Figure(figsize=(14, 10), dpi=110, layout="constrained", facecolor=LIGHT.ground)
    table, names, compiled, cost = figure.subplots(2, 2).flat
    _table(table, [r for r in records if r["kind"] == "paper"])
    _names(names, [r for r in records if r["kind"] == "hybrid"])
    _compiled(compiled, [r for r in records if r["kind"] == "compiled"])
    _cost(cost, [r for r in records if r["kind"] == "hybrid"])
    for axes in (table, names, compiled, cost):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="x" if axes is names else "y", color=LIGHT.grid)
    return png(figure)


def _shades(count: int) -> list[Any]:
    return [colormaps["viridis"](i / max(count - 1, 1)) for i in range(count)]


def _table(axes: Axes, records: Sequence[Record]) -> None:
    """Each model's techniques relative to its `tensor`, as in the paper's figure 7."""
    models = list(dict.fromkeys(r["model"] for r in records))
    found = {(r["model"], r["technique"]): r for r in records}
    for index, (technique, colour) in enumerate(zip(TABLE, _shades(len(TABLE)), strict=True)):
        places = [place + 0.16 * (index - 2) for place in range(len(models))]
        share = lambda field, t=technique: [  # noqa: E731
            100 * found[m, t][field] / found[m, "tensor"][field] for m in models
        ]
        boxes = axes.bar(places, share("bytes"), 0.15, color=colour, label=technique)
        axes.bar_label(boxes, fmt="%.0f", fontsize=7)
        label = "formula with dropout" if technique == "full" else None
        axes.plot(places, share("formula_with_dropout"), "_", color=LIGHT.ink, markersize=10, label=label)
    axes.set_xticks(range(len(models)), labels=models)
    axes.set_ylabel("% of `tensor`")
    axes.set_ylim(0, 135)
    axes.set_title(
        "what a Transformer layer keeps, tensor 8 (traced; equal to the formula without dropout)", fontsize=10
    )
    axes.legend(fontsize=7, ncols=3, loc="upper center")


def _names(axes: Axes, records: Sequence[Record]) -> None:
    policies = ("none", "paper", "selective", "full")
    bars = [(model, letter, p) for model, letter in SHOWN for p in policies]
    found = {(r["model"], r["letter"], r["remat"]): r["names"] for r in records}
    names = list(dict.fromkeys(n for bar in bars for n in found[bar]))
    start = [0.0] * len(bars)
    for name, colour in zip(names, _distinct(len(names)), strict=True):
        sizes = [found[bar].get(name, 0) / 2**20 for bar in bars]
        axes.barh(range(len(bars)), sizes, left=start, color=colour, label=name)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    labels = [f"{model} {letter}: {policy}" for model, letter, policy in bars]
    axes.set_yticks(range(len(bars)), labels=labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("MiB that a layer keeps per sequence")
    axes.set_title("by name, other layers at their true width (traced)", fontsize=9)
    axes.legend(fontsize=7, ncols=1, loc="center left", bbox_to_anchor=(1, 0.5))


def _compiled(axes: Axes, records: Sequence[Record]) -> None:
    """The temporary bytes that one more repetition adds to the compiled stack, in sbh of 16-bit numbers."""
    groups = list(dict.fromkeys((r["model"], r["width"]) for r in records))
    policies = list(dict.fromkeys(r["remat"] for r in records))
    for index, (policy, colour) in enumerate(zip(policies, _shades(len(policies)), strict=True)):
        found = [next(r for r in records if (r["model"], r["width"], r["remat"]) == (*g, policy)) for g in groups]
        places = [place + 0.16 * (index - 2) for place in range(len(groups))]
        boxes = axes.bar(places, [r["temporary"] / 2 / r["sbh"] for r in found], 0.15, color=colour, label=policy)
        axes.bar_label(boxes, fmt="%.1f", fontsize=7)
        label = "traced" if policy == policies[-1] else None
        axes.plot(places, [r["traced"] / r["sbh"] for r in found], "_", color=LIGHT.ink, markersize=10, label=label)
    axes.set_xticks(range(len(groups)), labels=[f"{model},\n{width} width" for model, width in groups])
    axes.set_ylabel("bytes / sbh, halved for float32")
    axes.set_title("temporary bytes that XLA allocates for one more layer of a scanned stack", fontsize=9)
    axes.legend(fontsize=7, ncols=3)


def _cost(axes: Axes, records: Sequence[Record]) -> None:
    """Bytes saved against operations added, one point per policy and layer."""
    layers = list(dict.fromkeys((r["model"], r["letter"]) for r in records))
    plain = {(r["model"], r["letter"]): r["bytes"] for r in records if r["remat"] == "none"}
    marks = {"paper": "s", "selective": "o", "elementwise": "^", "full": "D"}
    for (model, letter), colour in zip(layers, _shades(len(layers)), strict=True):
        for r in records:
            if (r["model"], r["letter"]) == (model, letter) and r["remat"] != "none":
                saved = 100 * (1 - r["bytes"] / plain[model, letter])
                mark = marks.get(r["remat"], "x")
                label = f"{model} {letter}" if r["remat"] == "selective" else None
                axes.plot(saved, 100 * r["flops_added"], mark, color=colour, label=label)
    axes.set_xlabel("% of the bytes of `none` saved")
    axes.set_ylabel("% of matrix products added")
    axes.set_title(
        "squares: paper, circles: selective, crosses: by names, triangles: elementwise, diamonds: full", fontsize=10
    )
    axes.legend(fontsize=7)


def _distinct(count: int) -> list:
    """Distinct colours: those of one map, then of another."""
    return [colormaps["tab20"](i) if i < 20 else colormaps["Dark2"](i - 20) for i in range(count)]
