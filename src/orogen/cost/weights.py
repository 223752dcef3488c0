"""The parameters of each part of a model, from its config alone.

The modules that create the parameters state the same shapes. Tests compare the two for every shipped model, each option
and each field that a letter reads. They are repeated here and in `kinds` because `orogen simulate` answers in less than
two seconds and a search looks at thousands of widths: for Nemotron 3 Nano this table takes 0.02 CPU seconds. Reading
the modules takes 1.5 to import jax and the model, 1.0 for the abstract model, and 0.3 for each further one.

Letters of dimensions: d model, f hidden, i inner channels.
"""

import copy
import functools
from typing import Any, NamedTuple

from orogen.config.model import ModelConfig
from orogen.cost.kind import costs_of
from orogen.cost.kinds.attention import projections
from orogen.cost.kinds.mlp import mlp_weights
from orogen.cost.weight import Weight, norm, vector

# Hidden units of the resampler's MLP over its width (model/resampler.py).
RESAMPLER_WIDENING = 4


class Weights(NamedTuple):
    """The parameters of one layer, its norm included, by letter; of the model's other parts (`embedding`, `norm`,
    `head` if it is not tied, `score` of a reward model, the `resampler` of images) by name; and of the
    multi-token-prediction block without its
    layers."""

    layers: dict[str, tuple[Weight, ...]]
    parts: dict[str, tuple[Weight, ...]]
    mtp: tuple[Weight, ...]


@functools.lru_cache(maxsize=256)
def weights(model: ModelConfig, vocab_rows: int | None = None) -> Weights:
    """The parameters of `model`. vocab_rows: rows of the vocabulary with a plan's padding; None: not padded."""
    size, rows = model.hidden_size, vocab_rows or model.vocab_size
    letters = dict.fromkeys(model.layers.main + model.layers.mtp)
    positions = model.learned_positions
    learned = (Weight((positions, size), ("positions", "embed")),) if positions else ()
    parts = {"embedding": (Weight((rows, size), ("vocab", "embed")), *learned), "norm": norm(model)}
    if not model.tie_word_embeddings:
        parts["head"] = (Weight((size, rows), ("embed", "vocab")),)
    if "x" in model.layers.main:
        parts["resampler"] = tuple(_resampler(model))
    if model.score_head:
        parts["score"] = (vector(size, "norm"),)
    block = (Weight((2 * size, size), (None, "embed")), *(3 * norm(model))) if model.layers.mtp else ()
    return Weights({letter: (*costs_of(letter).weights(model), *norm(model)) for letter in letters}, parts, block)


def changed(model: ModelConfig, **fields: Any) -> ModelConfig:
    """The model with other values, which are not checked: its parameters can be counted even if it cannot run."""
    found = copy.copy(model)
    for name, value in fields.items():
        object.__setattr__(found, name, value)
    return found


def _resampler(model: ModelConfig) -> list[Weight]:
    size = model.hidden_size
    mlp = mlp_weights(model, RESAMPLER_WIDENING * size, bias=False)
    layer = [*projections(model), *mlp, *(3 * norm(model))]
    first = [Weight((model.image_feature_size, size), (None, "embed"))]
    first.append(Weight((model.resampler_latents, size), ("positions", "norm")))
    found = [*first, *(layer * model.resampler_layers), *norm(model)]
    if model.retrieved_captions is None:
        return found
    tables = [Weight((length, size), (None, "embed")) for length in (model.vocab_size, model.caption_tokens)]
    layer = [*projections(model), *mlp, *(2 * norm(model))]
    return [*found, *tables, *(layer * model.resampler_layers), *norm(model)]
