"""What came of the runs of three.sh: a record of their evaluations, tables, and learning curves.

python experiments/rlvr/three.py FOLDER     # makes three.jsonl of the metrics that three.sh has written to FOLDER
python experiments/rlvr/three.py            # prints the tables of three.jsonl and draws three.png
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from orogen.report.pictures import LIGHT, bare_figure, png, style_axes

HERE = Path(__file__).parent
RECORD = HERE / "three.jsonl"
FAMILIES = ("largest", "counting", "addition")
HELDOUT, LAST = "heldout_reward", "whole_heldout_reward"
T_95 = 4.303  # Student's t for two degrees of freedom
STARTS = {"first", "more"}  # policies that are only scored


def condensed(file: Path) -> dict[str, Any]:
    """Of a run: held-out rewards by step, on some tasks on the way and on all of them at the end."""
    arm, run, seed = file.stem.split("-")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    curve = [{"step": r["step"]} | _rewards(r, HELDOUT) for r in rows if HELDOUT in r]
    train = [{name: r[f"reward/{name}"] for name in FAMILIES if f"reward/{name}" in r} for r in rows]
    mean = {name: [round(_mean(train, name, k), 4) for k in (slice(10), slice(-10, None))] for name in train[0]}
    step_ms = statistics.median(r["step_ms"] for r in rows)
    timed = {"step_ms": round(step_ms, 1)} if len(rows) > 1 else {}
    mismatch = max(r["mismatch_max"] for r in rows)
    return {
        "arm": arm, "run": run, "seed": int(seed), "steps": len(rows), "heldout": curve,
        "all": _rewards(rows[-1], LAST), "train_first_and_last_ten": mean, "mismatch_max": mismatch, **timed,
    }  # fmt: skip


def _rewards(row: dict[str, Any], name: str) -> dict[str, float]:
    return {family: row[f"{name}/{family}"] for family in FAMILIES if f"{name}/{family}" in row}


def _mean(rows: list[dict[str, float]], name: str, part: slice) -> float:
    return statistics.mean(row[name] for row in rows[part])


def by_seed(records: list[dict[str, Any]], arm: str, run: str | None = None) -> dict[str, list[float]]:
    """Held-out rewards of an arm on all tasks, by environment and seed; `run` None: each environment's own run."""
    found: dict[str, list[float]] = {}
    for name in FAMILIES:
        of = sorted((r["seed"], r["all"][name]) for r in records if r["arm"] == arm and r["run"] == (run or name))
        found[name] = [value for _, value in of]
    found["mean"] = [statistics.mean(values) for values in zip(*found.values(), strict=True)]
    return found


def difference(one: list[float], other: list[float]) -> str:
    """Of two arms, paired by seed, with its 95 % interval."""
    apart = [a - b for a, b in zip(one, other, strict=True)]
    mean, half = statistics.mean(apart), T_95 * statistics.stdev(apart) / len(apart) ** 0.5
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def show(records: list[dict[str, Any]]) -> None:
    """Prints a table of all arms, and of the differences that the predictions name."""
    arms = {
        "together": by_seed(records, "together", "three"), "alone": by_seed(records, "alone"),
        "ahead": by_seed(records, "ahead", "three"), "demonstrations": by_seed(records, "after", "first"),
        "more demonstrations": by_seed(records, "after", "more"), "then RL": by_seed(records, "after", "three"),
    }  # fmt: skip
    print("| held-out reward, by seed | " + " | ".join((*FAMILIES, "mean")) + " |\n|---|---|---|---|---|")
    for name, found in arms.items():
        print(f"| {name} | " + " | ".join(", ".join(f"{x:.2f}" for x in values) for values in found.values()) + " |")
    print("\n| difference, paired by seed [95 %] | " + " | ".join((*FAMILIES, "mean")) + " |\n|---|---|---|---|---|")
    for one, other in (("together", "alone"), ("ahead", "together"), ("then RL", "more demonstrations")):
        cells = [difference(arms[one][name], arms[other][name]) for name in arms[one]]
        print(f"| {one} - {other} | " + " | ".join(cells) + " |")


def draw(records: list[dict[str, Any]]) -> bytes:
    """Held-out rewards by step, one panel per environment, one line per run."""
    figure = bare_figure(LIGHT, height=3.2)
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    for axes, name in zip(panels, FAMILIES, strict=True):
        style_axes(axes, LIGHT, grid=True)
        for number, arm in enumerate(("together", "alone", "ahead", "after")):
            for count, record in enumerate(r for r in records if r["arm"] == arm and r["run"] not in STARTS):
                if name in record["all"]:
                    points = [(row["step"], row[name]) for row in record["heldout"]]
                    label = arm if count < len(FAMILIES) and record["seed"] == 0 else None
                    axes.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=1.2, alpha=0.8, label=label)
        axes.set(title=name, xlabel="step", ylim=(-0.03, 1.03))
    panels[0].set_ylabel("held-out reward")
    panels[-1].legend(frameon=False, fontsize=8)
    return png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="the metrics that three.sh has written")
    folder = parser.parse_args().folder
    if folder is not None:
        found = [condensed(file) for file in sorted(folder.glob("*-*-[0-9].jsonl"))]
        RECORD.write_text("".join(json.dumps(record) + "\n" for record in found))
    records = [json.loads(line) for line in RECORD.read_text().splitlines()]
    show(records)
    (HERE / "three.png").write_bytes(draw(records))


if __name__ == "__main__":
    main()
