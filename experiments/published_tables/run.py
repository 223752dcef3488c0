"""Predicts every published row and compares: `python experiments/published_tables/run.py`.

Writes `results.jsonl` and draws `figure.png` from it; `--draw` only draws.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from figure import draw
from tables import FOLDER, PASSES, Row, both_seconds, cluster, config, fitted, judged, read_rows

from orogen.simulate.predict import predict
from orogen.simulate.prediction import Prediction

RESULTS = FOLDER / "results.jsonl"
Result = dict[str, Any]


def compare(row: Row, *, chosen: bool) -> Result:
    """A row's prediction beside what was published, in seconds; error: the prediction over it, less one."""
    run = config(row)
    began = time.perf_counter()
    found = predict(run, cluster(row), most=PASSES)
    took = time.perf_counter() - began
    seconds, published = both_seconds(row, run.model, found)
    return {
        "id": row["id"], "table": row["table"], "hardware": row["hardware"], "devices": row["devices"],
        "fitted": chosen, "published_seconds": published, "predicted_seconds": seconds,
        "error": seconds / published - 1, "parts": {name: part for name, part in found.seconds.items() if part},
        "gib": found.device_memory_bytes / 2**30, "flops": found.flops["orogen"], "constants": per_token(row, found),
        "took_seconds": round(took, 3),
    }  # fmt: skip


def per_token(row: Row, found: Prediction) -> dict[str, float]:
    """GFLOP per token by the row's numbers, TFLOP/s over tokens/s, and by ours in the same convention."""
    numbers = row["published"]
    if not {"tflops_per_device", "tokens_per_second_per_device"} <= numbers.keys():
        return {}
    published = 1e3 * numbers["tflops_per_device"] / numbers["tokens_per_second_per_device"]
    counted = found.flops[row["convention"]] / row["batch"] / row["sequence"] / 1e9
    return {"published": published, "counted": counted, "error": counted / published - 1}


# Parts of a device's memory as arXiv:2603.07685 adds them up; our parameters are its master weights.
MEMORY = {
    "weights-gradients": ("working", "gradients"), "master-optimizer": ("parameters", "optimizer"),
    "activations": ("activations", "temporary"),
}  # fmt: skip


def print_memory(rows: Sequence[Row]) -> None:
    """Of the rows about memory, GB on the fullest device beside what was published; they are not judged."""
    print("\n| memory | published GB | predicted GB |\n|---|---|---|")
    for row in rows:
        if row["kind"] == "memory":
            stages = predict(config(row), cluster(row), most=PASSES).memory
            stage = max(stages, key=lambda stage: stage.total)
            parts = MEMORY.get(row["published"]["part"], tuple(stage.parts))
            held = sum(stage.parts[part] for part in parts) / 1e9
            print(f"| {row['id']} | {row['published']['memory_gb']} | {held:.1f} |")


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The rank correlation; equal numbers share the mean of their ranks. NaN with fewer than three."""
    if len(xs) < 3:
        return math.nan
    return statistics.correlation(_ranks(xs), _ranks(ys))


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]


def rate(result: Result, which: str) -> float:
    """What the order of a table is judged by: FLOP/s per device, counted alike for both."""
    return result["flops"] / result[f"{which}_seconds"] / result["devices"]


def print_tables(results: Sequence[Result]) -> None:
    print("| row | fitted | published s | predicted s | error |\n|---|---|---|---|---|")
    for result in results:
        times = f"{result['published_seconds']:.4g} | {result['predicted_seconds']:.4g} | {result['error']:+.1%}"
        print(f"| {result['id']} | {'yes' if result['fitted'] else ''} | {times} |")
    print("\n| table | rows | not fitted | median error | worst | Spearman |\n|---|---|---|---|---|---|")
    for table in dict.fromkeys(result["table"] for result in results):
        print(_summary(table, [result for result in results if result["table"] == table]))
    print(_summary("all", results, whole=True))
    print("\n| GFLOP per token | published | counted | error |\n|---|---|---|---|")
    for result in results:
        if found := result["constants"]:
            print(f"| {result['id']} | {found['published']:.2f} | {found['counted']:.2f} | {found['error']:+.2%} |")


def _summary(name: str, results: Sequence[Result], *, whole: bool = False) -> str:
    errors = [abs(result["error"]) for result in results if not result["fitted"]]
    order = spearman([rate(r, "published") for r in results], [rate(r, "predicted") for r in results])
    rank = "" if whole or math.isnan(order) else f"{order:.2f}"
    judged_ones = f"{statistics.median(errors):.1%} | {max(errors):.1%}" if errors else "| "
    return f"| {name} | {len(results)} | {len(errors)} | {judged_ones} | {rank} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true")
    if not parser.parse_args().draw:
        chosen = set(fitted())
        results = [compare(row, chosen=row["id"] in chosen) for row in judged(read_rows())]
        RESULTS.write_text("".join(json.dumps(result) + "\n" for result in results))
    results = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    draw(results, FOLDER / "figure.png")
    print_tables(results)
    print_memory(read_rows())


if __name__ == "__main__":
    main()
