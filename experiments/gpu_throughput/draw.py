"""Draws a roofline of each benchmark of one operation in peers.jsonl: python experiments/gpu_throughput/draw.py"""

import json
from pathlib import Path

from orogen.bench.roofline import draw_roofline

HERE = Path(__file__).parent


def main() -> None:
    """One picture a line that has ceilings beside its records."""
    for line in (HERE / "peers.jsonl").read_text().splitlines():
        facts = json.loads(line)
        if "ceilings" in facts:
            draw_roofline(facts, HERE / f"roofline_{facts['bench']}.png")


if __name__ == "__main__":
    main()
