"""Draws a roofline of each benchmark of one operation in peers.jsonl: python experiments/gpu_throughput/draw.py

Lines of one benchmark share a picture, with the last one's ceilings.
"""

import json
from pathlib import Path
from typing import Any

from orogen.bench.roofline import draw_roofline

HERE = Path(__file__).parent


def main() -> None:
    """One picture a benchmark."""
    drawn: dict[str, dict[str, Any]] = {}
    for line in (HERE / "peers.jsonl").read_text().splitlines():
        facts = json.loads(line)
        if "ceilings" in facts:
            before = drawn.get(facts["bench"], {"records": []})["records"]
            drawn[facts["bench"]] = {**facts, "records": [*before, *facts["records"]]}
    for name, facts in drawn.items():
        draw_roofline(facts, HERE / f"roofline_{name}.png")


if __name__ == "__main__":
    main()
