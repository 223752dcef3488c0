"""Which units of a model stay, and the config of the model that is left. Pure numpy.

Letters: l layers, d model, h heads, p Mamba head size, e experts, f hidden.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from orogen.compress.importance import Scores, Units
from orogen.config.checks import ConfigError, require
from orogen.config.kinds import either
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.prune import PruneConfig
from orogen.model.homes import homes
from orogen.parallel.legal import fold_plan

# The letters of the layers that have a size.
OF = {
    "intermediate_size": "-", "num_attention_heads": "*w+", "num_key_value_heads": "*w", "mamba_num_heads": "M",
    "mamba_head_dim": "M", "n_routed_experts": "E", "moe_intermediate_size": "E",
    "moe_shared_expert_intermediate_size": "E", "moe_latent_size": "E",
}  # fmt: skip
# The axis of a plan whose ranks split a size.
RANKS = {
    "intermediate_size": "tensor", "num_attention_heads": "tensor", "mamba_num_heads": "tensor",
    "moe_shared_expert_intermediate_size": "tensor", "n_routed_experts": "expert",
    "moe_intermediate_size": "expert_tensor",
}  # fmt: skip


class Kept(NamedTuple):
    """What stays: numbers of the backbone's layers in order; channels of the residual stream (None: all of them); and,
    of every layer of the old model, the units by name, as indices in the old ones, the most important first.
    `key_heads` and `query_heads` are heads of attention, `mamba_heads` and `mamba_dims` those of Mamba and their
    channels; the other names are those of the scores. A name that is missing has all its units."""

    layers: tuple[int, ...]
    hidden: np.ndarray | None
    units: list[Units]


def pruned_config(model: ModelConfig, prune: PruneConfig, layers: tuple[int, ...], plan: PlanConfig) -> ModelConfig:
    """The config of the pruned model, whose backbone has these layers of the old one.

    Raises ConfigError for a size that the model does not have, or that its groups or the plan's ranks do not divide;
    the message has the nearest that they do.
    """
    sizes = prune.widths
    for field in sizes:
        _check_present(model, prune, field)
    if "num_key_value_heads" in sizes:
        sizes["num_attention_heads"] = _query_heads(model, prune)
    for field, value in sizes.items():
        _check_size(model, prune, field, value, plan)
    text = model.pattern
    if len(layers) < len(model.layers.main):
        _, *mtp = model.pattern.split("/")
        text = "/".join(["".join(model.layers.main[number] for number in layers), *mtp])
    pruned = dataclasses.replace(model, pattern=text, **sizes)
    fold_plan(plan, pruned)
    return pruned


def _check_present(model: ModelConfig, prune: PruneConfig, field: str) -> None:
    letters = OF.get(field)
    if letters is not None and not set(letters) & set(model.layers.main + model.layers.mtp):
        require(False, prune, field, f"None: the model has no layers of {either(letters)}")
    require(getattr(model, field) is not None, prune, field, f"None: ModelConfig.{field} is None")


def _check_size(model: ModelConfig, prune: PruneConfig, field: str, value: int, plan: PlanConfig) -> None:
    """Raises ConfigError unless `value` is at most the old size, and a multiple of what has to divide it."""
    most, factors = getattr(model, field), {}
    if field == "num_attention_heads" and set("*w") & set(model.layers.main + model.layers.mtp):
        keys = prune.num_key_value_heads or model.num_key_value_heads
        factors["num_key_value_heads"] = keys
        most = model.num_attention_heads // model.num_key_value_heads * keys
    if field == "mamba_num_heads":
        factors |= {"n_groups": model.n_groups, "mamba_norm_groups": model.mamba_norm_groups or 1}
    if field == "n_routed_experts":
        factors["n_group"] = model.n_group
    if field == "hidden_size" and plan.fsdp != "none":
        factors["PlanConfig.fsdp_size"] = plan.fsdp_size or plan.data * plan.context
    if field in RANKS:
        factors[f"PlanConfig.{RANKS[field]}"] = getattr(plan, RANKS[field]) or 1
    step, least = math.lcm(*factors.values()), 1
    if field == "n_routed_experts":
        least = math.ceil(model.num_experts_per_tok / model.topk_group) * model.n_group
    if value <= most and value % step == 0 and value >= least:
        return
    nearest = min(max(round(value / step), math.ceil(least / step), 1), most // step) * step
    why = " and ".join(f"{name} = {factor}" for name, factor in factors.items() if factor > 1)
    expected = f"{nearest}, the nearest that is at most {most}" if nearest else f"none: no size up to {most} fits"
    expected += f", as ModelConfig.{field} is" if most == getattr(model, field) else ""
    expected += f", at least {least} for num_experts_per_tok = {model.num_experts_per_tok}" if least > 1 else ""
    expected += f" and a multiple of {why}" if why else ""
    name = field if getattr(prune, field) is not None else "num_key_value_heads"
    if name != field:
        raise ConfigError(f"PruneConfig.{name} asks for {value} {field}; expected {expected}")
    require(False, prune, field, expected)


def choose(model: ModelConfig, prune: PruneConfig, scores: Scores, layers: tuple[int, ...]) -> Kept:
    """The units with the highest scores, of equal ones the first, and the layers given."""
    hidden = None if prune.hidden_size is None else best(scores.hidden, prune.hidden_size)
    letters = [home.letter for home in homes(model)]
    units = [_of_layer(model, prune, letter, of) for letter, of in zip(letters, scores.layers, strict=True)]
    return Kept(layers, hidden, units)


def best(score_n: np.ndarray, count: int, groups: int = 1) -> np.ndarray:
    """Indices (count) of the highest scores, the highest first, equally many of each of `groups` runs of units, which
    stay in the order of the groups."""
    score_gn = score_n.reshape(groups, -1)
    kept_gn = np.argsort(-score_gn, axis=1, kind="stable")[:, : count // groups]
    return (kept_gn + np.arange(groups)[:, None] * score_gn.shape[1]).reshape(-1)


def _of_layer(model: ModelConfig, prune: PruneConfig, letter: str, scores: Units) -> Units:
    if letter == "-":
        return _chosen(scores, mlp=prune.intermediate_size)
    if letter in "*w+":
        return _attention(model, prune, scores["heads"], latent=letter == "+")
    if letter == "M":
        return _mamba(model, prune, scores["mamba"])
    return _experts(model, prune, scores) if letter == "E" else {}


def _chosen(scores: Units, **counts: int | None) -> Units:
    return {name: best(scores[name], count) for name, count in counts.items() if count is not None}


def _attention(model: ModelConfig, prune: PruneConfig, score_h: np.ndarray, *, latent: bool) -> Units:
    """Heads are ranked inside the group of their key head; a group's score is the L2 of its heads' scores."""
    if prune.num_attention_heads is None and prune.num_key_value_heads is None:
        return {}
    if latent:
        return {"query_heads": best(score_h, _query_heads(model, prune))}
    groups = model.num_key_value_heads
    score_gh = score_h.reshape(groups, -1)
    found: Units = {}
    kept_g = np.arange(groups)
    if prune.num_key_value_heads is not None:
        kept_g = found["key_heads"] = best(np.linalg.norm(score_gh, axis=1), prune.num_key_value_heads)
    heads, each = score_gh.shape[1], _query_heads(model, prune) // len(kept_g)
    order_gh = np.argsort(-score_gh[kept_g], axis=1, kind="stable")[:, :each]
    found["query_heads"] = (order_gh + heads * kept_g[:, None]).reshape(-1)
    return found


def _query_heads(model: ModelConfig, prune: PruneConfig) -> int:
    """How many stay: all of each key head that stays, unless the number is given."""
    if prune.num_attention_heads is not None or prune.num_key_value_heads is None:
        return prune.num_attention_heads
    return model.num_attention_heads // model.num_key_value_heads * prune.num_key_value_heads


def _mamba(model: ModelConfig, prune: PruneConfig, score_hp: np.ndarray) -> Units:
    """One ranking of channels for all heads; heads are ranked by the channels that stay, inside the group that shares B
    and C, and inside a group of the gated norm if that is smaller: one left with fewer heads would be normalised over
    other channels."""
    found: Units = {}
    if prune.mamba_head_dim is not None:
        found["mamba_dims"] = best(np.linalg.norm(score_hp, axis=0), prune.mamba_head_dim)
        score_hp = score_hp[:, found["mamba_dims"]]
    if prune.mamba_num_heads is not None:
        groups = math.lcm(model.n_groups, model.mamba_norm_groups or 1)
        found["mamba_heads"] = best(np.linalg.norm(score_hp, axis=1), prune.mamba_num_heads, groups)
    return found


def _experts(model: ModelConfig, prune: PruneConfig, scores: Units) -> Units:
    """Experts are ranked inside their routing group, and each expert's hidden units by themselves."""
    latent: Any = prune.moe_latent_size
    found = _chosen(scores, shared=prune.moe_shared_expert_intermediate_size, latent_in=latent, latent_out=latent)
    if prune.n_routed_experts is not None:
        found["experts"] = best(scores["experts"], prune.n_routed_experts, model.n_group)
    if prune.moe_intermediate_size is not None:
        order_ef = np.argsort(-scores["expert_width"], axis=1, kind="stable")
        found["expert_width"] = order_ef[:, : prune.moe_intermediate_size]
    return found
