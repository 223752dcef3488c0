"""What is known of a pruning: `pruning.json`, from which the same model can be pruned again without text, a table, and
a picture."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from orogen.compress.choose import OF
from orogen.compress.depth import check_layer_scores
from orogen.compress.importance import Scores, check_scores
from orogen.compress.prune import Choice, Found, changed_sizes, no_distance
from orogen.config.checks import ConfigError
from orogen.config.json_file import ListOf, MapOf, Number, Record, Whole, read_json
from orogen.config.model import ModelConfig
from orogen.config.prune import PruneConfig
from orogen.report.pruning import Axes, Axis, Layers

FILE, PICTURE = "pruning.json", "pruning.png"
DIGITS = 7  # of a score in the file
NUMBERS = ListOf(Number())
FORM = Record({
    "scores": Record({
        "hidden": NUMBERS, "layers": ListOf(MapOf((NUMBERS, ListOf(NUMBERS)))),
        "of_layers": MapOf(NUMBERS),
    }),
    "rows": Whole(), "tokens": Whole(),
})  # fmt: skip
# By field, the units that it counts: their name in Kept, and the scores that they are ranked by, summed over an axis.
RANKED = {
    "intermediate_size": ("mlp", "mlp", None), "num_attention_heads": ("query_heads", "heads", None),
    "mamba_num_heads": ("mamba_heads", "mamba", 1), "mamba_head_dim": ("mamba_dims", "mamba", 0),
    "n_routed_experts": ("experts", "experts", None), "moe_intermediate_size": ("expert_width", "expert_width", None),
    "moe_shared_expert_intermediate_size": ("shared", "shared", None),
    "moe_latent_size": ("latent_in", "latent_in", None),
}  # fmt: skip


def record(
    checkpoint: Path, prune: PruneConfig, found: Found, choice: Choice, sizes: tuple[int, int]
) -> dict[str, Any]:
    """What `pruning.json` holds. sizes: the numbers of parameters before and after. The units that stay are indices in
    the old model, in the order in which the new one has them; layers are numbered along the old pattern."""
    of_layers = {} if choice.depth.scores is None else {prune.depth_scores: _rounded(choice.depth.scores)}
    if found.scores.changes is not None:
        of_layers["cosine"] = _rounded(found.scores.changes)
    hidden = choice.kept.hidden
    return {
        "checkpoint": str(checkpoint),
        "prune": dataclasses.asdict(prune),
        "parameters": list(sizes),
        "rows": found.rows,
        "tokens": found.tokens,
        "kept": {
            "layers": list(choice.kept.layers),
            "removed": list(choice.depth.removed),
            "hidden": None if hidden is None else hidden.tolist(),
            "units": [{name: index.tolist() for name, index in units.items()} for units in choice.kept.units],
        },
        "scores": {
            "hidden": _rounded(found.scores.hidden),
            "layers": [{name: _rounded(array) for name, array in units.items()} for units in found.scores.layers],
            "of_layers": of_layers,
        },
    }


def encoded(facts: Mapping[str, Any]) -> bytes:
    """The facts as the file's bytes: no NaN, one line per entry."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in facts.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read_scores(file: Path, model: ModelConfig, prune: PruneConfig) -> Found:
    """The scores of an earlier pruning of the same model. Raises ConfigError if they are of another one, or if they
    lack the scores of layers that are asked for."""
    facts = read_json(file / FILE if file.is_dir() else file, FORM)
    found, of_layers = facts["scores"], facts["scores"]["of_layers"]
    layers = [{name: _array(value, file) for name, value in units.items()} for units in found["layers"]]
    scores = Scores(_array(found["hidden"], file), layers, None)
    check_scores(model, scores, str(file))
    for kind, values in of_layers.items():
        check_layer_scores(model, values, f"{file}, {kind}")
    wanted = prune.depth_scores if prune.chooses_layers else None
    if wanted is not None and (wanted not in of_layers or prune.iterative):
        has = ", ".join(of_layers) or "none"
        why = "new ones for each layer" if prune.iterative else repr(wanted)
        raise ConfigError(f"{file} has scores of layers by {has}; PruneConfig.depth_scores asks for {why}")

    return Found(scores, of_layers.get(wanted), no_distance, facts["rows"], facts["tokens"])


def axes(model: ModelConfig, found: Found, choice: Choice) -> Axes:
    """By field of a size that changed, the sorted scores of the layers and how many of each layer's stay."""
    kept, result = choice.kept, {}
    for field, (before, after) in changed_sizes(model, choice.config).items():
        if field == "hidden_size" and kept.hidden is not None:
            result[field] = Axis(before, after, [_curve(found.scores.hidden, kept.hidden)])
        elif field in RANKED:
            name, score, summed = RANKED[field]
            curves = []
            for number, units in enumerate(kept.units):
                stays = number in kept.layers or number >= len(model.layers.main)
                if name in units and stays:
                    scores = found.scores.layers[number][score]
                    scores = scores if summed is None else np.sqrt(np.square(scores).sum(summed))
                    curves.append(_curve(scores, units[name]))
            result[field] = Axis(before, after, curves)
        elif field in OF:
            result[field] = Axis(before, after, [])
    return result


def layers_shown(model: ModelConfig, choice: Choice) -> Layers | None:
    """The layers with their scores and which are removed; None if all stay."""
    if not choice.depth.removed:
        return None
    return Layers(model.layers.main, choice.depth.scores, choice.depth.removed)


def table(shown: Axes, layers: Layers | None, sizes: tuple[int, int]) -> list[str]:
    """One line per size that changed: from, to, and the share of the scores' sum that stays, beside that of units."""
    rows = [("axis", "from", "to", "units", "importance")]
    for field, axis in shown.items():
        share = f"{axis.importance:.1%}" if axis.curves else ""
        rows.append((field, f"{axis.before:,}", f"{axis.after:,}", f"{axis.after / axis.before:.1%}", share))
    if layers is not None:
        left = len(layers.pattern) - len(layers.removed)
        share = f"{layers.importance:.1%}" if layers.scores else ""
        rows.append(("layers", f"{len(layers.pattern)}", f"{left}", f"{left / len(layers.pattern):.1%}", share))
    rows.append(("parameters", f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[1] / sizes[0]:.1%}", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    if layers is not None:
        lines.append("removed layers: " + ", ".join(f"{n} ({layers.pattern[n]})" for n in layers.removed))
    return [line.rstrip() for line in lines]


def _curve(scores: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scores of all units, and those of the kept ones, sorted; experts' hidden units side by side."""
    if kept.ndim == 2:
        return np.sort(scores.reshape(-1))[::-1], np.take_along_axis(scores, kept, axis=1).reshape(-1)
    return np.sort(scores)[::-1], scores[kept]


def _array(value: Any, file: Path) -> np.ndarray:
    rows = value if value and isinstance(value[0], list) else [value]
    if len({len(row) for row in rows if isinstance(row, list)}) != 1:
        raise ConfigError(f"{file} has scores in rows of different lengths; expected equal ones")
    return np.asarray(value, np.float64)


def _rounded(values: Any) -> Any:
    """Nested lists of the numbers with DIGITS digits."""
    array = np.asarray(values, np.float64)
    if array.ndim > 1:
        return [_rounded(row) for row in array]
    return [float(f"{number:.{DIGITS}g}") for number in array.tolist()]
