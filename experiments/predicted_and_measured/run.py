"""Our own runs on one and two GPUs beside their predictions: `python experiments/predicted_and_measured/run.py`.

Writes `results.jsonl` and draws `figure.png` from it. `--predict` adds to `predicted.jsonl` the runs of `measure.py`
that it lacks, before they are measured; they are compared with that file ever after.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from measure import NEW, workload

from orogen.bench.workload import Workload
from orogen.config.cluster import ClusterConfig
from orogen.config.plan import FOR_GPU
from orogen.report.pictures import LIGHT
from orogen.simulate.pictures import COLOURS
from orogen.simulate.predict import predict

FOLDER = Path(__file__).parent
ONE, TWO = FOLDER.parent / "gpu_throughput/train.jsonl", FOLDER.parent / "two_gpus/results.jsonl"
NEW_TIMES, PREDICTED, RESULTS = (FOLDER / f"{name}.jsonl" for name in ("measured", "predicted", "results"))
# Of gpu_throughput, the lines of the program as it is now say how they were timed; reproducible ones run other kernels.
CURRENT = ("one call, timed with one run ahead", "the same call", "with one run ahead")

# New runs were predicted in turn, each time with the constants that the runs before them had given.
TURNS = {"first three": slice(0, 3), "next seven": slice(3, 10), "last seven": slice(10, 17)}

Result = dict[str, Any]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def known_runs() -> Iterator[tuple[str, Workload, str, float]]:
    """(name, what ran, hardware, measured seconds) of the runs of earlier experiments."""
    for record in read(ONE):
        if record.get("note") in CURRENT:
            part = "whole_step" if "whole_step" in record else "forward_backward"
            name = f"{record['model']}, {record['rows']} x {record['sequence_length']:,}, {part.replace('_', ' ')}"
            fp8 = ", FP8" if record["plan"].get("linear") == "fp8" else ""
            yield name + fp8, workload_of(record, part), hardware_of(record), record[part]["ms"] / 1e3
    for record in read(TWO):
        if "plan" in record:
            yield record["case"], workload_of(record, "whole_step"), hardware_of(record), record["ms"] / 1e3


def workload_of(record: dict[str, Any], part: str) -> Workload:
    # The benchmark names the kernels itself, those that the model has.
    plan = {name: value for name, value in record["plan"].items() if FOR_GPU.get(name) != value}
    bindings = [f"PlanConfig.{name}={value!r}" for name, value in plan.items()]
    if "pattern" in record:
        bindings.append(f"ModelConfig.pattern={record['pattern']!r}")
    return Workload(
        model=record["model"], rows=record["rows"], sequence_length=record["sequence_length"], part=part,
        bindings=tuple(bindings),
    )  # fmt: skip


def hardware_of(record: dict[str, Any]) -> str:
    return next(name for name in ("h100", "h200") if name.upper() in record["device"])


def predicted_seconds(work: Workload, hardware: str) -> float:
    """Of a whole step, or of both passes of one: then without the optimizer, and what the host does once per step."""
    found = predict(work.config(), ClusterConfig(hardware=hardware))
    once = 0 if work.part == "whole_step" else found.seconds["optimizer"] + found.seconds["host"]
    return found.step_seconds - once


def compare() -> list[Result]:
    """All runs; the new ones with the predictions that were made before."""
    found = [
        {"name": name, "hardware": hardware, "measured_seconds": seconds, "new": False,
         "predicted_seconds": predicted_seconds(work, hardware)}
        for name, work, hardware, seconds in known_runs()
    ]  # fmt: skip
    before = {record["name"]: record for record in read(PREDICTED)} if PREDICTED.exists() else {}
    times = read(NEW_TIMES) if NEW_TIMES.exists() else []
    found += [{**before[time["name"]], "measured_seconds": time["ms"] / 1e3, "new": True} for time in times]
    return [{**result, "error": result["predicted_seconds"] / result["measured_seconds"] - 1} for result in found]


def draw(results: Sequence[Result], path: Path) -> None:
    """The error of each run."""
    figure = Figure(figsize=(10, 0.34 * len(results) + 1.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(results):
        axes.barh(row, 100 * result["error"], height=0.6, color=COLOURS[1] if result["new"] else COLOURS[0])
    axes.set_yticks(range(len(results)), [f"{result['name']} ({result['hardware']})" for result in results], fontsize=8)
    axes.invert_yaxis()
    axes.axvspan(-5, 5, color=LIGHT.grid, zorder=0)
    axes.axvline(0, color=LIGHT.ink, linewidth=1)
    axes.set(xlabel="error of the prediction, % (band: 5 %; orange: before it was measured)")
    axes.spines[:].set_visible(False)
    figure.savefig(path)


def print_table(results: Sequence[Result]) -> None:
    print("| run | hardware | measured ms | predicted ms | error |\n|---|---|---|---|---|")
    for result in results:
        times = f"{1e3 * result['measured_seconds']:.1f} | {1e3 * result['predicted_seconds']:.1f}"
        mark = "**" if result["new"] else ""
        print(f"| {mark}{result['name']}{mark} | {result['hardware']} | {times} | {result['error']:+.1%} |")
    earlier, new = ([abs(result["error"]) for result in results if result["new"] == made] for made in (False, True))
    for what, errors in {"earlier": earlier, "new": new, **{name: new[part] for name, part in TURNS.items()}}.items():
        if errors:
            print(f"\n{what} runs: median {statistics.median(errors):.1%}, worst {max(errors):.1%} of {len(errors)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--predict", action="store_true")
    if parser.parse_args().predict:
        lines = read(PREDICTED)
        known = {line["name"] for line in lines}
        lines += [
            {"name": name, "hardware": "h200", "predicted_seconds": predicted_seconds(workload(name), "h200")}
            for name in NEW
            if name not in known
        ]
        PREDICTED.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return
    RESULTS.write_text("".join(json.dumps(result) + "\n" for result in compare()))
    results = read(RESULTS)
    draw(results, FOLDER / "figure.png")
    print_table(results)


if __name__ == "__main__":
    main()
