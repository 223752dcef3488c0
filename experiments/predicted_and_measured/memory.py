"""Memory of the whole steps that ran on one and two GPUs, beside the formulas: `python
experiments/predicted_and_measured/memory.py` writes `memory.jsonl` and prints its table.

What was measured is what XLA allocated there for the step: arguments, results and temporaries of one GPU.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run import CURRENT, ONE, TWO, hardware_of, read, workload_of

from orogen.config.cluster import ClusterConfig
from orogen.simulate.predict import predict

RESULTS = Path(__file__).parent / "memory.jsonl"
GB = 1e9


def measured() -> Iterator[tuple[str, dict[str, Any], float]]:
    """(name, record, GB per GPU)."""
    for record in read(ONE):
        if record.get("note") in CURRENT and "whole_step" in record:
            yield f"{record['model']}, one GPU, 4 microbatches", record, record["whole_step"]["gb"]
    for record in read(TWO):
        if "plan" in record:
            yield record["case"], record, record["gb"]
    for record in read(TWO.with_name("second.jsonl")):
        if "stash" not in record.get("plan", {"stash": ""}):  # a plan with it is no longer there
            yield f"{record['case']}, second run", record, record["gb"]


def main() -> None:
    lines = []
    for name, record, allocated in measured():
        hardware = hardware_of(record)
        found = predict(workload_of(record, "whole_step").config(), ClusterConfig(hardware=hardware))
        parts = max(found.memory, key=lambda stage: stage.total).parts
        predicted = found.device_memory_bytes / GB
        lines.append({
            "name": name, "hardware": hardware, "measured_gb": allocated, "predicted_gb": round(predicted, 2),
            "error": round(predicted / allocated - 1, 4), "parts_gb": {k: round(v / GB, 2) for k, v in parts.items()},
        })  # fmt: skip
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print("| whole step | hardware | measured GB | predicted GB | error |\n|---|---|---|---|---|")
    for line in lines:
        sizes = f"{line['measured_gb']:.1f} | {line['predicted_gb']:.1f} | {line['error']:+.1%}"
        print(f"| {line['name']} | {line['hardware']} | {sizes} |")


if __name__ == "__main__":
    main()
