"""Predicts steps of Mixtral 8x22B with folded and unfolded experts, coarse and fine: results.jsonl and figure.png.

PYTHONPATH=src python experiments/folding_mfu/run.py
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "published_tables"))

from tables import PASSES, Row, cluster, config, published_seconds, read_rows  # noqa: E402

from orogen.config.model import ModelConfig  # noqa: E402
from orogen.simulate.predict import predict  # noqa: E402

MAPPINGS = {"mcore": "unfolded", "folded": "folded"}
GRAIN = 8


def fine(model: ModelConfig) -> ModelConfig:
    """Mixtral 8x22B-G8T8: eight times as many experts of an eighth, 8 per token, which are half of the operations."""
    return dataclasses.replace(
        model, n_routed_experts=GRAIN * model.n_routed_experts, num_experts_per_tok=8,
        moe_intermediate_size=model.moe_intermediate_size // GRAIN,
    )  # fmt: skip


def line(row: Row, cell: str, mapping: str, *, grain: str) -> dict[str, Any]:
    run = config(row)
    if grain == "fine":
        run = dataclasses.replace(run, model=fine(run.model)).check()
    found = predict(run, cluster(row), most=PASSES)
    published = published_seconds(row, run.model, found.flops) if grain == "coarse" and "published" in row else None
    return {
        "cell": cell, "mapping": mapping, "grain": grain, "devices": row["devices"], "sequence": row["sequence"],
        "step_seconds": found.step_seconds, "exchange_seconds": found.seconds["expert"],
        "published_seconds": published,
    }  # fmt: skip


def main() -> None:
    lines = []
    for row in read_rows():
        table, _, name = row["id"].partition("/")
        mapping = MAPPINGS.get(name.split("-")[0])
        if not table.startswith("folding") or table == "folding-fp8" or mapping is None:
            continue
        cell = f"{row['devices']} GPUs, {row['sequence']} tokens, batch {row['batch']}"
        for grain in ("coarse", "fine"):
            lines.append(line(row, cell, mapping, grain=grain))
        if mapping == "folded" and table == "folding":
            wide = {key: value for key, value in row.items() if key != "published"}
            wide["plan"] = {**row["plan"], "expert": 16}
            lines.append(line(wide, cell, "two_nodes", grain="fine"))
    (HERE / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    show(lines)


def show(lines: list[dict[str, Any]]) -> None:
    """The table, and the picture of its ratios."""
    by = {(x["cell"], x["grain"], x["mapping"]): x for x in lines}
    cells = list(dict.fromkeys(x["cell"] for x in lines))
    shares = "share of the step that exchanges: coarse unfolded, folded; fine unfolded, folded"
    print(f"| cell | published | coarse | fine | {shares} |")
    print("|---" * 5 + "|")
    ratios: dict[str, list[float]] = {"published": [], "coarse": [], "fine": []}
    for cell in cells:
        pairs = {grain: [by[cell, grain, mapping] for mapping in MAPPINGS.values()] for grain in ("coarse", "fine")}
        before, after = (x["published_seconds"] for x in pairs["coarse"])
        ratios["published"].append(before / after)
        for grain, (unfolded, folded) in pairs.items():
            ratios[grain].append(unfolded["step_seconds"] / folded["step_seconds"])
        parts = [f"{x['exchange_seconds'] / x['step_seconds']:.0%}" for pair in pairs.values() for x in pair]
        numbers = " | ".join(f"{ratio[-1]:.3f}" for ratio in ratios.values())
        print(f"| {cell} | {numbers} | {', '.join(parts)} |")
    for (cell, grain, mapping), x in by.items():
        if mapping == "two_nodes":
            folded = by[cell, grain, "folded"]
            times = x["exchange_seconds"] / folded["exchange_seconds"]
            share = x["exchange_seconds"] / x["step_seconds"]
            print(f"\n{cell}, fine, expert 16: exchange {times:.1f} x that of expert 8, {share:.0%} of the step")
    figure = Figure(figsize=(7, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for (name, ratio), marker in zip(ratios.items(), "os^", strict=True):
        axes.plot(ratio, range(len(cells)), marker, label=name)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cells)), cells)
    axes.set(xlabel="step time unfolded over folded")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "figure.png")


if __name__ == "__main__":
    main()
