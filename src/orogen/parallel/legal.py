"""Checks that a plan's sizes divide a model and fold into one mesh. No jax here."""

import dataclasses
from typing import NamedTuple

from orogen.config.checks import ConfigError
from orogen.config.kinds import LAYERS
from orogen.config.model import ModelConfig
from orogen.config.plan import PlanConfig
from orogen.config.reads import layers_read
from orogen.parallel.fold import FoldError, Folding, expert_shards, fold, nearest

# Legal sizes are searched up to twice this, or twice the model's size: no plan has more ranks.
MOST_RANKS = 2**16


class _Check(NamedTuple):
    """A size of the model, and the number of pieces into which an axis splits it.

    copied: whether there may be fewer pieces than ranks, each replicated. axis: a field of PlanConfig or, in words, a
    product or share of several.
    """

    field: str
    value: int
    axis: str
    size: int
    copied: bool = False

    @property
    def passes(self) -> bool:
        return self.value % self.size == 0 or (self.copied and self.size % self.value == 0)


def fold_plan(config: PlanConfig, model: ModelConfig) -> Folding:
    """The folding of `config` for `model`. Raises ConfigError if sizes do not fold or do not divide."""
    for check in _checks(config, model):
        if not check.passes:
            expected = "a multiple or a divisor" if check.copied else "a multiple"
            legal = ", ".join(map(str, _nearest(check, config, model)))
            raise ConfigError(
                f"ModelConfig.{check.field} is {check.value}; expected {expected} of PlanConfig.{check.axis} = "
                f"{check.size} (nearest legal {check.axis}: {legal})"
            )
    try:
        return _fold(config, model)
    except FoldError as error:
        raise ConfigError(f"PlanConfig: {error}") from None


def _fold(config: PlanConfig, model: ModelConfig) -> Folding:
    key_heads, groups = (_read(model, field) for field in ("num_key_value_heads", "n_groups"))
    norm_groups = _read(model, "mamba_norm_groups") or groups
    split = (("kv_heads", key_heads), ("groups", groups), ("norm_groups", norm_groups))
    sizes = ("stage", "data", "context", "tensor", "expert", "expert_tensor", "fsdp_size")
    return fold(
        **{axis: getattr(config, axis) for axis in sizes},
        outer={name: ("tensor", pieces) for name, pieces in split if pieces is not None and pieces < config.tensor},
    )


def _checks(config: PlanConfig, model: ModelConfig) -> list[_Check]:
    letters = {*model.layers.main, *model.layers.mtp}
    kinds = [kind for letter, kind in LAYERS.items() if letter in letters]
    split = dict.fromkeys(field for kind in kinds for field in kind.split.split())
    copied = ("num_key_value_heads", "n_groups", "mamba_norm_groups")
    pieces = [(field, "tensor", config.tensor) for field in split]
    pieces += [("n_routed_experts", "expert", config.expert)]
    pieces += [("moe_intermediate_size", "expert_tensor", config.expert_tensor)]
    if config.context > 1:
        pieces += _context_pieces(config)
    if config.fsdp != "none":
        pieces += _fsdp_pieces(config, model)
    pieces += [(field, "tensor", config.tensor) for field in copied]
    return [
        _Check(field, value, axis, size, copied=field in copied)
        for field, axis, size in pieces
        if (value := _read(model, field)) is not None
    ]


def _read(model: ModelConfig, field: str) -> int | None:
    """The size, if a layer of the model reads it."""
    return getattr(model, field) if layers_read(model.pattern, field) else None


def _context_pieces(config: PlanConfig) -> list[tuple[str, str, int]]:
    """(field, axis, pieces) of the heads that layers exchange for the sequence."""
    by_heads = config.context_ssm == "heads"
    exchanged = {
        "num_attention_heads": config.context_attention == "alltoall",
        "mamba_num_heads": by_heads,
        "mamba_intermediate_size": by_heads,
    }
    return [(field, "context x tensor", config.context * config.tensor) for field, asked in exchanged.items() if asked]


def _fsdp_pieces(config: PlanConfig, model: ModelConfig) -> list[tuple[str, str, int]]:
    """(field, axis, pieces) of what is sharded over data, for dense layers and for experts."""
    ranks = config.data * config.context
    size, dense, within = config.fsdp_size, "fsdp_size", "expert_data inside fsdp_size"
    if size is None:
        size, dense, within = ranks, "data x context", "expert_data"
    pieces = [(field, dense, size) for field in ("hidden_size", "q_lora_rank", "kv_lora_rank")]
    if _read(model, "n_routed_experts") is not None:
        field = "moe_latent_size" if model.moe_latent_size else "hidden_size"
        shards = expert_shards(size, tensor=config.tensor, expert=config.expert, expert_tensor=config.expert_tensor)
        pieces.append((field, within, shards))
    return pieces


def _nearest(failed: _Check, config: PlanConfig, model: ModelConfig) -> list[int]:
    """The legal sizes of the axis closest to the one that failed: those that divide everything that it splits, and at
    which the plan folds."""
    most = max(failed.value, min(failed.size, MOST_RANKS))
    pieces = [n for n in range(1, 2 * most + 1) if failed._replace(size=n).passes]
    if hasattr(config, failed.axis):
        plans = {n: dataclasses.replace(config, **{failed.axis: n}) for n in pieces}
        divide = [
            n for n, plan in plans.items() if all(c.passes for c in _checks(plan, model) if c.axis == failed.axis)
        ]
        # A plan may also fail to fold for another reason, which is reported after this one.
        return nearest(failed.size, [n for n in divide if _folds(plans[n], model)] or divide)
    alike = [check for check in _checks(config, model) if check.axis == failed.axis]
    return nearest(failed.size, [n for n in pieces if all(check._replace(size=n).passes for check in alike)])


def _folds(config: PlanConfig, model: ModelConfig) -> bool:
    try:
        _fold(config, model)
    except FoldError:
        return False
    return True


def fits(config: PlanConfig, model: ModelConfig) -> bool:
    """Whether `fold_plan` accepts the plan; fast, since it looks for no others."""
    return all(check.passes for check in _checks(config, model)) and _folds(config, model)
