"""Where the published carvings stand among all candidates that keep their budgets; writes results.jsonl and the figure.

No weights: memory, parameters and simulated speed alone.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from orogen.compress.candidates import total_costs
from orogen.compress.search import feasible_costs, rank_of, search_models
from orogen.compress.speed import Speed
from orogen.config.load import load, load_search
from orogen.config.model import ModelConfig
from orogen.report.pictures import LIGHT

HERE = pathlib.Path(__file__).parent
CONFIGS = HERE.parent.parent / "gin_configs"
# Published, by search: the model, and (name, changes of the search's bindings) under which it is ranked.
NANO, NEMOTRON_H = "nemotron_nano2", "nemotron_h_47b"
CHUNK = 16384  # tokens; the default of NVIDIA's own count for elastic models (megatron/elastification)
PUBLISHED = {NANO: "nemotron_nano_9b_v2", NEMOTRON_H: "nemotron_h_47b"}
RANKED = {
    NANO: {
        "layers, then parameters; at most 8.9 B": {},
        "parameters; at most 8.9 B": {"order": ("parameters",)},
        "parameters; bytes alone": {"order": ("parameters",), "most_parameters": None},
        "layers, then parameters; bytes alone": {"most_parameters": None},
        "parameters; bytes with a prompt's chunk": {
            "order": ("parameters",),
            "most_parameters": None,
            "prefill_chunk": CHUNK,
        },
        "layers, then parameters; bytes with a prompt's chunk": {"most_parameters": None, "prefill_chunk": CHUNK},
        "parameters; bytes with a prompt's chunk, the 9B's layers": {
            "order": ("parameters",),
            "most_parameters": None,
            "prefill_chunk": CHUNK,
            "layers": ("M:27-27", "*:4-4", "-:25-25"),
        },
    },
    NEMOTRON_H: {
        "parameters; bytes alone": {},
        "parameters; bytes alone, 98 layers": {"depth": (98, 98)},
    },
}
SPEED = 156.42  # tokens/s on one A10G, 8 requests, 8,192 tokens in and 16,384 out (arXiv:2508.14444, table 10)


def costs_of(model: ModelConfig, search: Any) -> dict[str, float]:
    counts = np.array([[model.layers.main.count(letter) for letter in dict.fromkeys(model.layers.main)]])
    costs = {name: float(value[0]) for name, value in total_costs(model, search, counts).items()}
    return costs | {"layers": float(len(model.layers.main))}


def whole_speed(speed: Speed, model: ModelConfig) -> float:
    """New tokens per second of a round of requests, their prompts included, read one after another."""
    found = speed.predict(model)
    new = found.slots * found.new_tokens
    return new / (found.slots * found.first_token_seconds + found.new_tokens * found.step_seconds)


def candidate_speeds(parent: ModelConfig, search: Any, speed: Speed) -> list[dict[str, Any]]:
    """The first candidates by layers and parameters, of all depths and of those that the report compares, with their
    bytes and simulated speed on the A10G."""
    best = []
    for depth, listed in ((None, 3), (56, 1), (54, 1), (52, 1)):
        ranked = dataclasses.replace(search, order=("layers", "parameters"), best=listed)
        ranked = ranked if depth is None else dataclasses.replace(ranked, depth=(depth, depth))
        best += [one for one in search_models(parent, ranked, speed).best if one not in best]
    return [one.facts() | {"whole_speed": whole_speed(speed, one.model)} for one in best]


def main() -> None:
    rows = []
    for name, published in PUBLISHED.items():
        parent, search, cluster, engine = load_search([CONFIGS / "search" / f"{name}.gin"])
        model = load([CONFIGS / "models" / f"{published}.gin"])[0].model
        for criterion, changes in RANKED[name].items():
            ranked = dataclasses.replace(search, **changes)
            speed, began = Speed(ranked, cluster, engine), time.monotonic()
            best = search_models(parent, ranked, speed)
            seconds = time.monotonic() - began
            feasible = feasible_costs(parent, ranked, speed)
            costs = costs_of(model, ranked)
            rows.append({
                "search": name, "criterion": criterion, "candidates": best.candidates, "feasible": best.feasible,
                "rank": rank_of(feasible, ranked.order, costs), "gib": costs["gib"], "parameters": costs["parameters"],
                "parent_gib": costs_of(parent, ranked)["gib"], "largest": float(feasible["parameters"].max()),
                "seconds": seconds, "best": [one.facts() for one in best.best[:3]],
            })  # fmt: skip
    parent, search, cluster, engine = load_search(
        [CONFIGS / "search" / f"{NANO}.gin", HERE / "a10g.gin"], ["SearchConfig.order = ('tokens_per_second',)"]
    )
    model, speed = load([CONFIGS / "models" / f"{PUBLISHED[NANO]}.gin"])[0].model, Speed(search, cluster, engine)
    rates = {"speed": whole_speed(speed, model), "parent_speed": whole_speed(speed, parent)}
    rows.append({"search": NANO, **rates, "published": SPEED, "candidates": candidate_speeds(parent, search, speed)})
    draw(parent, model, search, speed)
    (HERE / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        print(json.dumps({key: value for key, value in row.items() if key != "best"}))


def draw(parent: ModelConfig, model: ModelConfig, search: Any, speed: Speed) -> None:
    """Parameters and decoding speed of all candidates within the bytes, and the published one."""
    wide = dataclasses.replace(search, most_parameters=None, order=("tokens_per_second",))
    feasible = feasible_costs(parent, wide, speed)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = {52: "#cbd5e1", 53: "#b6c2d1", 54: "#93a7bd", 55: "#6b87a5", 56: LIGHT.strong}
    for depth, colour in colours.items():
        of = feasible["layers"] == depth
        axes.scatter(
            feasible["parameters"][of] / 1e9, 1 / feasible["seconds"][of], s=2, color=colour, label=f"{depth} layers"
        )
    costs, rate = costs_of(model, search), speed.predict(model).tokens_per_second
    axes.plot(costs["parameters"] / 1e9, rate, "*", color=LIGHT.accent, markersize=14, label="Nemotron Nano 2 9B")
    axes.set_xlabel("parameters, billions")
    axes.set_ylabel("decoded tokens/s, 8 requests, simulated A10G")
    axes.legend(fontsize=8)
    figure.savefig(HERE / "figure.png", dpi=110)


if __name__ == "__main__":
    main()
