"""Fits L = a C^-b to the results of each architecture, seed by seed, and draws them: fit.json and figure.png, or
large_fit.json and large.png.

PYTHONPATH=src python experiments/scaling/fit.py [--design large]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from orogen.sweep.effects import paired

HERE = Path(__file__).parent
ARCHITECTURES = ("transformer", "hybrid")


def laws(lines: list[dict[str, Any]], architecture: str) -> dict[int, tuple[float, float]]:
    """By seed, log a and b of the least squares in logarithms."""
    found = {}
    for seed in sorted({line["seed"] for line in lines}):
        of = [x for x in lines if x["seed"] == seed and x["arm"][0].startswith(architecture)]
        slope, constant = np.polyfit(np.log([x["flops"] for x in of]), np.log([x["value"] for x in of]), 1)
        found[seed] = (float(constant), float(-slope))
    return found


FILES = {  # results, fit and figure of each design
    "study": ("results.jsonl", "fit.json", "figure.png"),
    "large": ("large.jsonl", "large_fit.json", "large.png"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fits a law to the results of each architecture.")
    parser.add_argument("--design", choices=FILES, default="study")
    results, fit, figure = (HERE / name for name in FILES[parser.parse_args().design])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    lines = [line for line in lines if not line["search"]]
    fits = {name: laws(lines, name) for name in ARCHITECTURES}
    facts: dict[str, Any] = {}
    for name, law in fits.items():
        effect = paired({seed: b for seed, (_, b) in law.items()}, dict.fromkeys(law, 0.0))
        assert effect is not None
        constant = float(np.mean([a for a, _ in law.values()]))
        of = [x for x in lines if x["arm"][0].startswith(name)]
        misses = [np.log(x["value"]) - constant + effect.difference * np.log(x["flops"]) for x in of]
        facts[name] = {
            "exponent": effect.difference, "low": effect.low, "high": effect.high, "log_a": constant,
            "largest_residual": float(np.abs(misses).max()),
        }  # fmt: skip
    exponents = [{seed: b for seed, (_, b) in fits[name].items()} for name in ARCHITECTURES]
    effect = paired(exponents[1], exponents[0])
    assert effect is not None
    facts["hybrid - transformer"] = {"exponent": effect.difference, "low": effect.low, "high": effect.high}
    fit.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))
    draw(lines, facts, figure)


def draw(lines: list[dict[str, Any]], facts: dict[str, Any], file: Path) -> None:
    figure = Figure(figsize=(6, 4), dpi=130, layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(ARCHITECTURES, "os", strict=True):
        of, fit = [x for x in lines if x["arm"][0].startswith(name)], facts[name]
        flops_n = np.array(sorted({x["flops"] for x in of}))
        points = axes.plot([x["flops"] for x in of], [x["value"] for x in of], marker, markersize=5, alpha=0.7)
        law_n = np.exp(fit["log_a"]) * flops_n ** -fit["exponent"]
        label = f"{name}: exponent {fit['exponent']:.3f} [{fit['low']:.3f}, {fit['high']:.3f}]"
        axes.plot(flops_n, law_n, color=points[0].get_color(), label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations of training", ylabel="held-out loss, nats per byte")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(file)


if __name__ == "__main__":
    main()
