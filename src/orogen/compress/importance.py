"""The importance of a model's units, from what calibration measured, or drawn at random. Pure numpy.

Letters: l layers, d model, f hidden, h heads, k head size, p Mamba head size, e experts, w latent width.
"""

from typing import NamedTuple

import numpy as np

from orogen.compress.calibrate import Measured
from orogen.config.checks import ConfigError
from orogen.config.model import ModelConfig
from orogen.model.homes import homes

CONTRIBUTIONS = "contributions"
# By name, of one layer, float64: `mlp` and `shared` (f), `heads` (h), `mamba` (h, p), `experts` (e), `expert_width`
# (e, f), `latent_in` and `latent_out` (w).
Units = dict[str, np.ndarray]


class Scores(NamedTuple):
    """The importance of the channels of the residual stream (d), and of the units of each layer, along the pattern,
    with the multi-token-prediction block's layers last; `changes` (l), of the backbone's layers, by cosine, None if
    nothing was measured."""

    hidden: np.ndarray
    layers: list[Units]
    changes: np.ndarray | None


def shapes(config: ModelConfig) -> tuple[int, list[dict[str, tuple[int, ...]]]]:
    """The shapes that Scores of the model have."""
    return config.hidden_size, [_shapes(config, home.letter) for home in homes(config)]


def _shapes(config: ModelConfig, letter: str) -> dict[str, tuple[int, ...]]:
    if letter == "-":
        return {"mlp": (config.intermediate_size,)}
    if letter in "*w+":
        return {"heads": (config.num_attention_heads,)}
    if letter == "M":
        return {"mamba": (config.mamba_num_heads, config.mamba_head_dim)}
    if letter != "E":
        return {}
    experts, latent = config.n_routed_experts, config.moe_latent_size
    found: dict[str, tuple[int, ...]] = {"experts": (experts,), "expert_width": (experts, config.moe_intermediate_size)}
    if config.moe_shared_expert_intermediate_size:
        found["shared"] = (config.moe_shared_expert_intermediate_size,)
    return found | ({"latent_in": (latent,), "latent_out": (latent,)} if latent else {})


def scores(config: ModelConfig, measured: Measured, expert_scores: str) -> Scores:
    """The scores of Minitron, with I_c = sqrt(Σ_rows (mean_t |a_tc|)²) of a channel c.

    Channels of the residual stream: Σ I over the outputs of all norms. Hidden units: I of the input of the second
    matrix; in experts over the batch's tokens of the expert. Heads: L2 of I over the head's output. Mamba: I of the x
    part of the input projection, whose L2 over heads ranks the channels of a head, and whose L2 over the channels that
    stay ranks heads. Experts, by EXPERT_SCORES: the mean norm of the output over their tokens, their number of tokens,
    or the sum of their weights.
    Latent: I of what the experts read, and of the sum of what they write. Sources: arXiv:2407.14679, section 2.2;
    arXiv:2504.11409.
    """
    hidden_d = np.sqrt(measured.final_d) + sum(np.sqrt(layer["hidden"]) for layer in measured.layers)
    layers = [
        {
            name: _units(name, layer, expert_scores).reshape(shape)
            for name, shape in _shapes(config, home.letter).items()
        }
        for home, layer in zip(homes(config), measured.layers, strict=True)
    ]
    return Scores(hidden_d, layers, measured.changes[: len(config.layers.main)])


def _units(name: str, layer: Units, expert_scores: str) -> np.ndarray:
    if name == "experts":
        total_e, count_e = layer[f"expert_{expert_scores}"], np.maximum(layer["expert_count"], 1)
        return total_e / count_e if expert_scores == "output" else total_e
    if name == "heads":
        return np.sqrt(layer["heads"].sum(-1))
    return np.sqrt(layer[name])


def weighed(found: Scores, outgoing: list[Units], width_scores: str) -> Scores:
    """The scores with what reads the units (`outgoing`): by `contributions` each is multiplied by the norm of the
    weights that leave the unit; by `activations` only units that nothing reads change, to 0."""
    factor = lambda norms: norms if width_scores == CONTRIBUTIONS else norms > 0  # noqa: E731
    layers = [
        {name: score * factor(read[name]) if name in read else score for name, score in units.items()}
        for units, read in zip(found.layers, outgoing, strict=True)
    ]
    return found._replace(layers=layers)


def random_scores(config: ModelConfig, seed: int) -> Scores:
    """Scores from U(0, 1), the same for the same model and seed."""
    random = np.random.default_rng(seed)
    hidden, layers = shapes(config)
    units = [{name: random.random(shape) for name, shape in layer.items()} for layer in layers]
    return Scores(random.random(hidden), units, None)


def order_scores(config: ModelConfig) -> Scores:
    """Scores by which the first units are the most important ones."""
    falling = lambda shape: 1 / np.prod(np.indices(shape) + 1.0, axis=0)  # noqa: E731
    hidden, layers = shapes(config)
    units = [{name: falling(shape) for name, shape in layer.items()} for layer in layers]
    return Scores(falling((hidden,)), units, None)


def check_scores(config: ModelConfig, found: Scores, where: str) -> None:
    """Raises ConfigError unless the scores are finite and have the model's shapes."""
    hidden, layers = shapes(config)
    expected = [{"hidden": (hidden,)}, *layers]
    have = [{"hidden": found.hidden}, *found.layers]
    if len(have) != len(expected):
        raise ConfigError(f"{where} has scores of {len(have) - 1} layers; expected {len(layers)}, the model's")
    for number, (units, wanted) in enumerate(zip(have, expected, strict=True), -1):
        shaped = {name: array.shape for name, array in units.items()}
        if shaped != wanted:
            place = "the residual stream" if number < 0 else f"layer {number}"
            raise ConfigError(f"{where} has scores of {place} with shapes {shaped}; expected {wanted}")
        for name, array in units.items():
            if not np.isfinite(array).all():
                raise ConfigError(f"{where} has scores {name} that are no finite numbers; expected finite ones")
