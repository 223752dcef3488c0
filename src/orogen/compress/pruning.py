"""What is known of a pruning: `pruning.json` and the arrays of `pruning.npz`, from which the same model can be pruned
again without text, a table, and a picture."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orogen.compress.choose import OF
from orogen.compress.depth import check_layer_scores
from orogen.compress.importance import Scores, Units, check_scores, random_scores
from orogen.compress.prune import RANDOM, Choice, Found, Taken, changed_sizes, no_distance
from orogen.compress.stored_scores import ARRAYS, encoded_arrays, read_arrays
from orogen.config.checks import ConfigError, require
from orogen.config.json_file import ListOf, MapOf, Number, Record, Whole, read_json
from orogen.config.model import ModelConfig
from orogen.config.prune import PruneConfig
from orogen.model.homes import homes
from orogen.report.pruning import Axes, Axis, Layers

FILE, PICTURE, REMOVAL = "pruning.json", "pruning.png", "removal.jsonl"
DIGITS = 7  # of a score in the file
NUMBERS = ListOf(Number())
SCORES, HIDDEN = "scores.", "hidden"  # of arrays: how their names begin, and the residual stream's
FORM = Record({
    "scores": Record({
        "widths": (str, None), "experts": str, "seed": Whole(), "weights": str, "of_layers": MapOf(NUMBERS),
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
    the old model, in the order in which the new one has them; layers are numbered along the old pattern. Matrices of
    them, one row per expert, are in `arrays` alone."""
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
            "units": [
                {name: index.tolist() for name, index in units.items() if index.ndim == 1}
                for units in choice.kept.units
            ],
        },
        "scores": {**found.taken._asdict(), "of_layers": of_layers},
    }


def arrays(found: Found, choice: Choice) -> bytes:
    """What `pruning.npz` holds: `scores.hidden`, and `scores.LAYER.NAME` by the names of Scores, unless they are
    placeholders; and `kept.LAYER.NAME`, the units that each expert keeps."""
    held: dict[str, np.ndarray] = {}
    if found.taken.widths is not None:
        held[f"{SCORES}{HIDDEN}"] = found.scores.hidden
        for number, units in enumerate(found.scores.layers):
            held |= {f"{SCORES}{number}.{name}": array for name, array in units.items()}
    for number, units in enumerate(choice.kept.units):
        held |= {f"kept.{number}.{name}": index for name, index in units.items() if index.ndim > 1}
    return encoded_arrays(held)


def encoded(facts: Mapping[str, Any]) -> bytes:
    """The facts as the file's bytes: no NaN, one line per entry."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in facts.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def removal_lines(choice: Choice, narrowed: Sequence[tuple[int, int, float]]) -> bytes:
    """The scores of leaving out one layer alone, and of narrowing one (layer, size, score), as `SearchConfig.scores`
    and `removal` read them."""
    scores = enumerate(_rounded(choice.depth.scores or []))
    lines: list[dict[str, Any]] = [{"layer": n, "removed": True, "score": one} for n, one in scores]
    lines += [{"layer": n, "intermediate_size": size, "score": _rounded([score])[0]} for n, size, score in narrowed]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def read_scores(file: Path, model: ModelConfig, prune: PruneConfig) -> Found:
    """The scores of an earlier pruning of the same model. Raises ConfigError if they are of another one, or if they
    lack the scores of layers that are asked for."""
    require(not prune.scored_sizes, prune, "scored_sizes", "() with --scores: no model runs")
    where, file = file, file / FILE if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(f"--scores {str(where)!r} has no {FILE}; expected the folder of an earlier pruning")
    facts = read_json(file, FORM)
    found, of_layers = facts["scores"], facts["scores"]["of_layers"]
    taken = Taken(**{name: found[name] for name in Taken._fields})
    if not taken.weights:
        raise ConfigError(f"{file} does not say which weights its scores are of; expected a fingerprint")
    if taken.widths is None:
        scores = random_scores(model, prune.seed)
    else:
        held = read_arrays(file.with_name(ARRAYS), SCORES)
        layers = [_of_layer(held, number) for number in range(len(homes(model)))]
        scores = Scores(held.get(HIDDEN, np.zeros(0)), layers, None)
        check_scores(model, scores, str(file))
    _check_taken(file, prune, taken)
    for kind, values in of_layers.items():
        check_layer_scores(model, values, f"{file}, {kind}")
    wanted = prune.depth_scores if prune.chooses_layers else None
    if wanted is not None and (wanted not in of_layers or prune.iterative):
        has = ", ".join(of_layers) or "none"
        why = "new ones for each layer" if prune.iterative else repr(wanted)
        raise ConfigError(f"{file} has scores of layers by {has}; PruneConfig.depth_scores asks for {why}")

    return Found(scores, of_layers.get(wanted), no_distance, taken, facts["rows"], facts["tokens"])


def _of_layer(held: Mapping[str, np.ndarray], number: int) -> Units:
    start = f"{number}."
    return {name.removeprefix(start): array for name, array in held.items() if name.startswith(start)}


def _check_taken(file: Path, prune: PruneConfig, taken: Taken) -> None:
    """Raises ConfigError unless the file's scores are those that the settings ask for."""
    if prune.widths and taken.widths != prune.width_scores:
        has = f"has no scores of units by {prune.width_scores!r}"
        raise ConfigError(f"{file} {has}; expected PruneConfig.width_scores = {taken.widths!r}, or to measure them")
    ranked = prune.n_routed_experts is not None and taken.widths != RANDOM
    if ranked and taken.experts != prune.expert_scores:
        asked = f"PruneConfig.expert_scores asks for {prune.expert_scores!r}"
        raise ConfigError(f"{file} has scores of experts by {taken.experts!r}; {asked}")
    drawn = (prune.widths and taken.widths == RANDOM) or (prune.chooses_layers and prune.depth_scores == RANDOM)
    if drawn and taken.seed != prune.seed:
        raise ConfigError(f"{file} has scores drawn with seed {taken.seed}; PruneConfig.seed asks for {prune.seed}")


def of_weights(found: Found, weights: str, where: Path | None) -> Found:
    """The scores, with the fingerprint of the weights that are pruned. Raises ConfigError if they were taken of others;
    where: the file or folder that they are from."""
    if found.taken.weights not in ("", weights):
        expected = "expected those of this checkpoint, whose weights differ"
        raise ConfigError(f"{where} has scores of other weights of a model of these sizes; {expected}")
    return found._replace(taken=found.taken._replace(weights=weights))


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
    grid = [("axis", "from", "to", "units", "importance")]
    for field, axis in shown.items():
        share = f"{axis.importance:.1%}" if axis.curves else ""
        grid.append((field, f"{axis.before:,}", f"{axis.after:,}", f"{axis.after / axis.before:.1%}", share))
    if layers is not None:
        left = len(layers.pattern) - len(layers.removed)
        share = f"{layers.importance:.1%}" if layers.scores else ""
        grid.append(("layers", f"{len(layers.pattern)}", f"{left}", f"{left / len(layers.pattern):.1%}", share))
    grid.append(("parameters", f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[1] / sizes[0]:.1%}", ""))
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in grid
    ]
    if layers is not None:
        lines.append("removed layers: " + ", ".join(f"{n} ({layers.pattern[n]})" for n in layers.removed))
    return [line.rstrip() for line in lines]


def _curve(scores: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scores of all units, and those of the kept ones, sorted; experts' hidden units side by side."""
    if kept.ndim == 2:
        return np.sort(scores.reshape(-1))[::-1], np.take_along_axis(scores, kept, axis=1).reshape(-1)
    return np.sort(scores)[::-1], scores[kept]


def _rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    """The numbers with DIGITS digits."""
    return [float(f"{number:.{DIGITS}g}") for number in np.asarray(values, np.float64).tolist()]
