"""Draws `figure.png` from `arrivals_gpu.jsonl`: tokens per second by load, for both ways to dispatch."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LOADS = {
    "steady": "static batches,\nequal lengths", "static": "static batches", "all": "all waiting", "1.5": "Poisson, 1.5",
    "0.95": "Poisson, 0.95",
}  # fmt: skip


def main() -> None:
    rows = [json.loads(line) for line in (HERE / "arrivals_gpu.jsonl").read_text().splitlines()]
    ways = list(dict.fromkeys(row["dispatch"] for row in rows))
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for number, way in enumerate(ways):
        found = {str(row.get("load", row["work"])): row["tokens_per_s"] for row in rows if row["dispatch"] == way}
        places = [place + 0.4 * number for place in range(len(LOADS))]
        bars = axes.bar(places, [found[load] for load in LOADS], 0.38, label=f"dispatched {way}")
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    axes.set_xticks([place + 0.2 for place in range(len(LOADS))], list(LOADS.values()), fontsize=8)
    axes.set_ylabel("tokens per second")
    axes.set_title("R1, 64 slots, one H200: requests of drawn lengths", fontsize=9)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(HERE / "figure.png", dpi=130)


if __name__ == "__main__":
    main()
