"""Prunes a checkpoint: scores of its units and layers, the choice of what stays, and the new folder."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orogen.checkpoint.open import Opened
from orogen.compress.calibrate import Calibration, Idle, Measured
from orogen.compress.choose import Kept, best, choose, pruned_config
from orogen.compress.depth import Depth, Distance, check_depth, check_layer_scores, choose_layers
from orogen.compress.importance import CONTRIBUTIONS, Scores, check_scores, order_scores, random_scores, scores, weighed
from orogen.compress.outgoing import outgoing, require_finite
from orogen.config.checks import ConfigError, require
from orogen.config.data import DataConfig
from orogen.config.kinds import LAYERS, listed
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.prune import PruneConfig
from orogen.config.streams import say
from orogen.data.loader import open_corpus
from orogen.data.packing import Batch

ACTIVATIONS, COSINE, ORDER, RANDOM = "activations", "cosine", "order", "random"
MEASURED = ACTIVATIONS, CONTRIBUTIONS
CALIBRATION = "the pass over the text"


def no_distance(removed: Any) -> float:
    """The distance where there is no model to measure it. Raises ConfigError."""
    raise ConfigError("layers cannot be scored again without a model; expected PruneConfig.iterative = False")


class Taken(NamedTuple):
    """How the scores of units were taken. widths: by WIDTH_SCORES, None if they are placeholders that no size is chosen
    by; experts: by EXPERT_SCORES; seed: of random ones; weights: the model's fingerprint, "" before it is known."""

    widths: str | None
    experts: str
    seed: int
    weights: str = ""


class Found(NamedTuple):
    """The scores that a choice is made by. of_layers: by layer, None without them; distance: scores layers while others
    are removed; narrowed: scores a model that lacks hidden units. rows, tokens: of the text that was read."""

    scores: Scores
    of_layers: list[float] | None
    distance: Distance
    taken: Taken
    rows: int = 0
    tokens: int = 0
    narrowed: Callable[[Idle], float] = no_distance


class Choice(NamedTuple):
    """What stays, and the config of that model."""

    kept: Kept
    depth: Depth
    config: ModelConfig


def check_target(model: ModelConfig, prune: PruneConfig, plan: PlanConfig) -> None:
    """Raises ConfigError for sizes or layers that the pruned model cannot have. Reads no parameter."""
    prunable = [letter for letter, kind in LAYERS.items() if kind.units]
    foreign = sorted(set(model.layers.main + model.layers.mtp) - set(prunable))
    if foreign:
        raise ConfigError(
            f"ModelConfig.pattern has layers {' '.join(foreign)}; expected only {listed(prunable)}, to be pruned"
        )
    most = model.intermediate_size if "-" in model.layers.main else 0
    expected = f"sizes below {most}, ModelConfig.intermediate_size" if most else "(): the model has no dense MLP"
    require(all(size < (most or 0) for size in prune.scored_sizes), prune, "scored_sizes", expected)
    require(not model.score_head, model, "score_head", "False: a model with one cannot be pruned")
    check_depth(model, prune)
    pruned_config(model, prune, tuple(range(len(model.layers.main))), plan)


def measures(prune: PruneConfig) -> bool:
    """Whether the choice needs passes of the model over text."""
    return bool(prune.widths and prune.width_scores in MEASURED) or (
        prune.chooses_layers and prune.depth_scores != RANDOM
    )


def random_found(model: ModelConfig, prune: PruneConfig) -> Found:
    """Scores that no text is read for: of layers, drawn at random; of units, by their order or drawn. The latter count
    only if PruneConfig.width_scores asks for such."""
    of_layers = np.random.default_rng((prune.seed, 1)).random(len(model.layers.main)).tolist()
    unmeasured = prune.width_scores if prune.width_scores not in MEASURED else None
    of_units = order_scores(model) if unmeasured == ORDER else random_scores(model, prune.seed)
    return Found(of_units, of_layers, no_distance, Taken(unmeasured, prune.expert_scores, prune.seed))


def measured(
    opened: Opened, prune: PruneConfig, data: DataConfig, progress: Callable[[], None] = lambda: None
) -> Found:
    """The scores of an open model, measured on the text of `data`. Raises ConfigError for text that is too short, for
    shapes that the plan cannot split, and for weights that are not finite."""
    check_shape(prune, opened.config, opened.plan.config)
    require_finite(opened)
    found, calibration = random_found(opened.config, prune), Calibration(opened, prune.compute_dtype)
    batches = list(calibration_batches(opened, prune, data))
    tokens = int(sum(np.count_nonzero(batch.segments_bt) for batch in batches))
    taken = found.taken._replace(widths=prune.width_scores)
    found = found._replace(rows=prune.rows, tokens=tokens, taken=taken)
    if prune.width_scores in MEASURED or prune.depth_scores == COSINE:
        sums = calibration.measure(batches, progress)
        of_units = scores(opened.config, sums, prune.expert_scores)
        if prune.width_scores in MEASURED:
            of_units = weighed(of_units, outgoing(opened), prune.width_scores)
        check_scores(opened.config, of_units, CALIBRATION)
        check_layer_scores(opened.config, of_units.changes, CALIBRATION)
        _warn_of_idle(sums, prune)
        if prune.width_scores not in MEASURED:
            of_units = found.scores._replace(changes=of_units.changes)
        found = found._replace(scores=of_units)
    if not prune.chooses_layers or prune.depth_scores == RANDOM:
        return found
    if prune.depth_scores == COSINE:
        assert found.scores.changes is not None, "measured above"
        return found._replace(of_layers=found.scores.changes.tolist())
    finals = calibration.finals(_first_rows(batches, prune.depth_rows))

    def distance(removed: Sequence[int]) -> float:
        progress()
        return calibration.distance(prune.depth_scores, finals, removed)

    def narrowed(idle: Idle) -> float:
        progress()
        return calibration.distance(prune.depth_scores, finals, (), idle=idle)

    return found._replace(of_layers=None, distance=distance, narrowed=narrowed)


def replaced(model: ModelConfig, prune: PruneConfig, found: Found) -> list[tuple[int, int, float]]:
    """(layer, size, score) of each dense MLP that alone is narrowed to a size of `PruneConfig.scored_sizes`: its units
    with the lowest scores go. The score is that of DEPTH_SCORES, as for the removal of a layer."""
    lines = []
    for number, letter in enumerate(model.layers.main):
        for size in prune.scored_sizes if letter == "-" else ():
            scores_f = found.scores.layers[number]["mlp"]
            gone = np.setdiff1d(np.arange(len(scores_f)), best(scores_f, size))
            lines.append((number, size, found.narrowed(Idle(number, gone))))
    return lines


def decide(model: ModelConfig, prune: PruneConfig, found: Found, plan: PlanConfig) -> Choice:
    """What stays by these scores. Raises ConfigError as `check_target` does."""
    depth = choose_layers(model, prune, found.of_layers, found.distance)
    config = pruned_config(model, prune, depth.layers, plan)
    return Choice(choose(model, prune, found.scores, depth.layers), depth, config)


def check_shape(prune: PruneConfig, model: ModelConfig, plan: PlanConfig) -> None:
    """Raises ConfigError if the plan cannot split the passes' batches; the message has the nearest that it can."""
    routed = "E" in model.layers.main + model.layers.mtp
    parts = {
        "batch_size": (plan.data, prune.batch_size),
        "sequence_length": (plan.context * plan.sequence_pieces(routed=routed), prune.sequence_length),
    }
    for field, (unit, value) in parts.items():
        nearest = max(1, round(value / unit)) * unit
        require(value % unit == 0, prune, field, f"a multiple of {unit} under this plan, such as {nearest}")
    most = model.learned_positions
    expected = f"at most {most}, the positions of the model"
    require(most is None or prune.sequence_length <= most, prune, "sequence_length", expected)
    least = 2 * plan.context * model.reach
    expected = f"at least {least}: two parts per context rank, each longer than a layer's reach"
    require(plan.context == 1 or prune.sequence_length >= least, prune, "sequence_length", expected)


def calibration_batches(opened: Opened, prune: PruneConfig, data: DataConfig) -> Iterator[Batch]:
    """Batches with `rows` packed rows in all, from documents that are evenly spread over the training split; empty rows
    fill the last. Raises ConfigError if the split has fewer."""
    corpus = open_corpus(data, tokenizer=opened.tokenizer)
    most = corpus.tokenizer.vocab_size
    if most > opened.config.vocab_size:
        raise ConfigError(f"DataConfig gives {most} tokens; expected at most the model's {opened.config.vocab_size}")
    rows, every = 0, corpus.heldout_batches(
        "train", batch_size=prune.batch_size, sequence_length=prune.sequence_length
    )  # fmt: skip
    for batch in every.thinned(prune.rows):
        yield _first(batch, prune.rows - rows)
        rows += int((batch.segments_bt != 0).any(1).sum())
        if rows >= prune.rows:
            return
    expected = f"at most {rows}: the training split of DataConfig has no more rows of {prune.sequence_length} tokens"
    require(False, prune, "rows", expected)


def _warn_of_idle(sums: Measured, prune: PruneConfig) -> None:
    """One line on stderr if experts got no token, so that nothing is known of their hidden units."""
    counts = [layer["expert_count"] for layer in sums.layers if "expert_count" in layer]
    idle = int(sum(np.count_nonzero(count_e == 0) for count_e in counts))
    if idle and (prune.moe_intermediate_size is not None or prune.n_routed_experts is not None):
        say(f"orogen: warning: {idle} experts got no token of {prune.rows} rows, so their units have no scores; "
            "expected more rows")  # fmt: skip


def _first_rows(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The batches with the first `rows` rows in all."""
    starts = itertools.count(0, len(batches[0].tokens_bt))
    return [_first(batch, rows - start) for start, batch in zip(starts, batches, strict=False) if start < rows]


def _first(batch: Batch, rows: int) -> Batch:
    """The batch, whose rows from `rows` on are empty."""
    inside_b1 = (np.arange(len(batch.tokens_bt)) < rows)[:, None]
    return batch._replace(segments_bt=np.where(inside_b1, batch.segments_bt, 0))


def changed_sizes(before: ModelConfig, after: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """By field, the old and the new value of what differs."""
    pairs = {f.name: (getattr(before, f.name), getattr(after, f.name)) for f in dataclasses.fields(before)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def require_new(folder: Path) -> None:
    """Raises ConfigError if there is such a folder already, before anything is computed."""
    if folder.exists():
        raise ConfigError(f"--out {str(folder)!r} exists; expected a new name")
