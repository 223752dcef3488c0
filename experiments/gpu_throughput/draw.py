"""Draws a roofline for each benchmark of one operation in peers.jsonl: python experiments/gpu_throughput/draw.py

Lines of the same benchmark share a figure, with the ceilings of the last one.
"""

import json
from pathlib import Path
from typing import Any

from orogen.bench.roofline import draw_roofline

HERE = Path(__file__).parent


def main() -> None:
    """Draws one figure per benchmark."""
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
